"""The sample dataset of this project (data/sample)."""

from pathlib import Path

from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.beir import load_beir
from rag.runtime.options import Count, Seed

SAMPLE = Path(__file__).resolve().parents[3] / "data" / "sample"


def load_sample(limit: Count | None = None, seed: Seed = 0) -> Dataset:
    """Load the sample dataset, or `limit` of its queries."""
    return load_beir(SAMPLE, limit=limit, seed=seed)
