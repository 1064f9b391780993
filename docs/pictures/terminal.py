"""Draw what a command prints as an SVG picture of a terminal.

    python docs/pictures/terminal.py session.svg "python scripts/generate.py index.path=.demo/index" < LINES

Lines on stdin are typed at the prompts "> " of the command.
"""

import re
import subprocess
import sys
from io import StringIO

from rich.console import Console
from rich.text import Text


def main(output: str, command: str) -> None:
    """Run the command, and write the picture of its two streams, stderr first."""
    lines = [] if sys.stdin.isatty() else sys.stdin.read().splitlines()
    done = subprocess.run(
        command, shell=True, input="\n".join(lines), capture_output=True, text=True, check=True
    )
    typed = iter(lines)
    shown = re.sub(r"^> ", lambda _: f"> {next(typed, '')}\n", done.stdout, flags=re.MULTILINE)
    console = Console(record=True, width=112, file=StringIO())
    for line in f"$ {command}\n{done.stderr}{shown}".rstrip().splitlines():
        console.print(Text(line, style="bold" if line.startswith(("$ ", "> ")) else ""))
    console.save_svg(output, title="terminal")


if __name__ == "__main__":
    main(*sys.argv[1:])
