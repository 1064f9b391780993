"""Adapters of tiny decoders with random tensors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from rag.models.adapters import LoraAdapter, save_adapter
from rag.models.checkpoint import dotted
from rag.models.layers import Linear
from rag.models.llama.checkpoint import checkpoint_sha256
from rag.models.llama.model import LlamaConfig, abstract
from tests.tiny_models import DECODER

CARD = {"base": {}, "data": [], "metrics": {"F1": 0.5}, "commit": None, "seconds": 1.5, "recipe": "mine"}


def tiny_adapter(
    config: LlamaConfig = DECODER,
    paths: Sequence[str] | None = None,
    rank: int = 2,
    alpha: float = 4.0,
    base_sha256: str = "0" * 64,
    seed: int = 0,
) -> LoraAdapter:
    """Return a random adapter of these linear layers (None: all), large enough that greedy tokens change."""
    rng = np.random.default_rng(seed)
    linears = {
        dotted(path): part for path, part in nnx.iter_modules(abstract(config)) if type(part) is Linear
    }
    tensors = {}
    for path in linears if paths is None else paths:
        shape = linears[path].weight.shape
        tensors[path] = tuple(rng.normal(0, 0.5, (rank, n)).astype(np.float32) for n in shape[::-1])
    return LoraAdapter(rank, alpha, base_sha256, tensors)


def write_adapter(folder: Path, base: Path, seed: int = 0) -> Path:
    """Write an adapter of the checkpoint `base`, which is one of `write_decoder`, and return its folder."""
    save_adapter(folder, tiny_adapter(base_sha256=checkpoint_sha256(base), seed=seed), CARD)
    return folder
