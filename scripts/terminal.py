"""Show progress and problems on stderr while a script works."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_console = Console(stderr=True)


def print_problem(text: str) -> None:
    """Print one line that deserves attention."""
    _console.print(text, style="yellow", highlight=False, markup=False)


class progress_bars:
    """Show a bar for each stage: `with progress_bars() as progress: progress(stage, done, total)`; total 0: unknown."""

    def __enter__(self):
        columns = [
            TextColumn("{task.description:>6}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        ]
        self._bars, self._tasks = Progress(*columns, console=_console), {}
        self._bars.start()
        return self._update

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def _update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total or None)
        self._bars.update(self._tasks[stage], completed=done)
