"""Write the tables of figures in results/bench/*.md, docs/performance.md and README.md from results/bench/*.jsonl.

    python scripts/bench.py bench=search keep=results/bench && python scripts/tables.py

No figure in these tables is written by hand; rag/bench/tables.py says which table shows what.
"""

import sys
from pathlib import Path

from rag.bench.tables import write_tables
from rag.types import UserError

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    try:
        changed = write_tables(ROOT)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(f"{path.relative_to(ROOT)}: written" for path in changed) or "All tables are up to date.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
