"""Write a report on evaluations, on one page: Markdown with pictures, and one self-contained HTML file.

python scripts/report.py runs=DIR baseline=bm25
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra_run import run_dir
from launch import launch
from settings import Shared

from rag.runtime.options import Filled


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Shared):
    """The settings of conf/report.yaml."""

    runs: Filled | Sequence[Filled]
    baseline: Filled | None
    measure: Filled | None
    output: Filled | None


def main(config) -> None:
    """Read the results, write the report, and print where it is."""
    from rag.report import compose, results

    paths = locations(config.runs)
    runs, failures = results.read(paths)
    blocks = compose.page(runs, failures, config.baseline, config.measure)
    output = folder(config.output, paths)
    compose.write(output, blocks)
    for failure in failures:
        print(f"failed: {failure.label}: {failure.error}")
    plural = "" if len(runs) == 1 else "s"
    print(f"{len(runs)} finished evaluation{plural}, {len(failures)} failed -> {output / 'report.html'}")


def locations(runs: str | Sequence[str]) -> list[Path]:
    """Return the paths of `runs`: a list, or text that is one path (of any characters) or a list `[A,B]` of paths."""
    import yaml

    from rag.types import UserError

    if isinstance(runs, str) and runs.startswith("[") and not Path(runs).exists():
        try:
            runs = yaml.load(runs, yaml.BaseLoader)  # whose scalars all stay text
        except (yaml.YAMLError, RecursionError) as error:
            raise UserError(
                f"Cannot read the list runs={runs}: write '...' around a path with marks."
            ) from error
    paths = [runs] if isinstance(runs, str) else list(runs)
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise UserError("runs= is empty or no list of paths: give a folder of results, or a list of them.")
    return [Path(path).expanduser() for path in paths]


def folder(output: str | None, paths: list[Path]) -> Path:
    """Return the report's folder: `output`, else that of the results if they are one folder, else the run's own."""
    if output is not None:
        return Path(output).expanduser()
    return paths[0] if len(paths) == 1 and paths[0].is_dir() else run_dir()


if __name__ == "__main__":
    launch(main, "report", ReportSettings)
