"""The metrics of a training, one JSON object a line."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from rag.runtime.files import atomic_file


class MetricsFile:
    """metrics.jsonl of a training, from a step on: later lines, which a killed process wrote, are removed.

    Lines are {"step": ..., "loss": ..., ...} or {"step": ..., "validation_loss": ...}, in the order of steps.
    """

    def __init__(self, path: Path, step: int, track: Callable[[int, Mapping[str, float]], None]):
        self._path, self._track = path, track
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        with atomic_file(path, "w") as file:
            file.writelines(
                line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line, and hand it to the trackers."""
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self._track(step, values)
