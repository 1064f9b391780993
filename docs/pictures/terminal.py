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

# Escape sequences of terminals, and other characters that XML does not have.
_CONTROL = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]|[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\x7f-\x9f]"
)


def main(output: str, command: str) -> None:
    """Run the command, and write the picture of its two streams, stderr first. Exits where the command fails."""
    lines = [] if sys.stdin.isatty() else sys.stdin.read().splitlines()
    done = subprocess.run(
        command, shell=True, input="\n".join(lines), capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        reason = " ".join(done.stderr.split())[-200:] or "without a word"
        sys.exit(f"The command {command!r} failed with exit code {done.returncode} ({reason}).")
    typed = iter(lines)
    shown = re.sub(r"^> ", lambda _: f"> {next(typed, '')}\n", done.stdout, flags=re.MULTILINE)
    console = Console(record=True, width=112, file=StringIO())
    for line in f"$ {command}\n{done.stderr}{shown}".rstrip().splitlines():
        line = _CONTROL.sub("", line)
        console.print(Text(line, style="bold" if line.startswith(("$ ", "> ")) else ""))
    console.save_svg(output, title="terminal")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Give two arguments, the file of the picture and the command in quotes.")
    main(*sys.argv[1:])
