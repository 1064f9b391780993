"""Print what a sweep of evaluations found: a leaderboard for each dataset, and the command that makes a report."""

import shlex
from pathlib import Path


def show_leaderboards(folder: Path) -> None:
    """Print the leaderboards of the results below a folder; nothing where there are none."""
    if not any(folder.rglob("metrics.json")):
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rag.report import results
    from rag.report.leaderboard import leaderboards
    from rag.report.numbers import difference, with_interval

    console = Console()
    runs, _ = results.read([folder])
    for board in leaderboards(runs):
        title = f"{board.dataset}, {board.measure} (baseline: {board.name(board.baseline)})"
        table = Table(title=Text(title))  # not rich's markup: a label has lists in brackets
        for heading in ("#", "system", "mean", "difference", "significant"):
            table.add_column(heading)
        for rank, run in enumerate(board.runs, 1):
            found = board.comparison(run)
            mean = with_interval(run.means.get(board.measure), run.intervals.get(board.measure))
            compared = difference(found.difference) if found else ""
            significance = {"open": "no"}.get(board.significance(run), board.significance(run))
            table.add_row(str(rank), Text(board.name(run)), mean, compared, significance)
        console.print(table)
    print(
        f"All measures, costs and queries on one page: python scripts/report.py {shlex.quote(f'runs={folder}')}"
    )
