"""A folder of files to an index.

python scripts/ingest.py corpus.path=data/sample/documents index.path=.demo/index
"""

from pathlib import Path

from launch import build, launch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rag import pipeline

console = Console(stderr=True)


def main(config) -> None:
    with progress_bars() as update:
        report = pipeline.ingest(
            Path(config.corpus.path),
            Path(config.index.path),
            build(config.chunker),
            build(config.embedder),
            update,
        )
    print(
        f"{report.documents} documents, {report.chunks} chunks, {report.tokens} tokens "
        f"in {report.seconds:.1f} s -> {config.index.path}"
    )
    for skipped in report.skipped:
        print(f"skipped {skipped.path}: {skipped.reason}")


class progress_bars:
    """A bar for each stage, as `progress(stage, done, total)` names them."""

    def __enter__(self):
        columns = [
            TextColumn("{task.description:>6}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        ]
        self._bars, self._tasks = Progress(*columns, console=console), {}
        self._bars.start()
        return self._update

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def _update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total or None)
        self._bars.update(self._tasks[stage], completed=done)


if __name__ == "__main__":
    launch(main, "ingest")
