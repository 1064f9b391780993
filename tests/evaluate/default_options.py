"""Options with the defaults of conf/, for tests that name only the values that matter to them."""

from pathlib import Path
from typing import Any

import yaml

from rag.evaluate.sensitivity.options import SensitivityOptions
from rag.evaluate.tuning.grids import BM25Grid, ConvexGrid, ReciprocalRankGrid, Tuning

CONF = Path(__file__).resolve().parents[2] / "conf"


def defaults(file: str, key: str) -> dict[str, Any]:
    """Return the values below `key` in a file of conf/."""
    values = yaml.safe_load((CONF / file).read_text(encoding="utf-8"))[key]
    return {name: value for name, value in values.items() if name != "_target_"}


def sensitivity_options(**changes: Any) -> SensitivityOptions:
    return SensitivityOptions(**defaults("sensitivity.yaml", "sensitivity") | changes)


def convex_grid(**changes: Any) -> ConvexGrid:
    return ConvexGrid(**defaults("tuning/convex.yaml", "grid") | changes)


def rrf_grid(**changes: Any) -> ReciprocalRankGrid:
    return ReciprocalRankGrid(**defaults("tuning/rrf.yaml", "grid") | changes)


def bm25_grid(**changes: Any) -> BM25Grid:
    return BM25Grid(**defaults("tuning/bm25.yaml", "grid") | changes)


def tuning(grid: Any, **changes: Any) -> Tuning:
    return Tuning(**{"grid": grid, "measure": "nDCG@10", "folds": 5, "seed": 0} | changes)
