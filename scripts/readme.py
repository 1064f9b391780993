"""Copy the benchmark tables of results/bench into README.md.

    python scripts/readme.py        -> results/bench/NAME.md between <!-- bench:NAME --> and <!-- /bench:NAME -->

`scripts/bench.py ... keep=results/bench` writes the tables; nothing in them is written by hand.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "results" / "bench"

_BLOCK = re.compile(r"(<!-- bench:([\w.-]+) -->\n).*?(<!-- /bench:\2 -->)", re.S)


def included(text: str, tables: Path = TABLES) -> str:
    """Return the text with the table in each marked block. Raises FileNotFoundError for a mark without a table."""
    return _BLOCK.sub(
        lambda found: f"{found[1]}\n{(tables / f'{found[2]}.md').read_text()}\n{found[3]}", text
    )


def main() -> int:
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    try:
        after = included(before)
    except FileNotFoundError as error:
        name = Path(error.filename).stem
        print(
            f"README.md marks bench:{name}, but there is no {error.filename}: run its benchmark.",
            file=sys.stderr,
        )
        return 2
    readme.write_text(after, encoding="utf-8")
    print(
        f"README.md: {len(_BLOCK.findall(after))} tables, {'as they were' if after == before else 'renewed'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
