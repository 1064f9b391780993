"""Show progress and problems on stderr while a script works."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from rag.train.loop import StepReport

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


@contextmanager
def training_bar() -> Iterator[Callable[["StepReport"], None]]:
    """Show the steps of a training with the loss, smoothed over some 50 steps, tokens a second and the time left."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    smoothed: float | None = None
    with Progress(*columns, console=_console) as bar:
        task = bar.add_task("train", total=None)

        def show(report: "StepReport") -> None:
            nonlocal smoothed
            smoothed = report.loss if smoothed is None else 0.98 * smoothed + 0.02 * report.loss
            left = timedelta(seconds=round(report.seconds_left))
            text = f"loss {smoothed:.3f}, {report.tokens_per_s:.0f} tokens/s, {left} left"
            bar.update(task, description=text, completed=report.step, total=report.steps)

        yield show
