"""Training of a reader from a dataset to the files that `generator.adapter` or `generator.weights` take."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from rag.models import adapters, export, hub, placement
from rag.models.checkpoint import dotted, fill_paths
from rag.models.llama import checkpoint as llama_checkpoint
from rag.models.llama import model as llama
from rag.runtime.cache.keys import content_key
from rag.runtime.options import Filled
from rag.train import Trainable
from rag.train.examples import ExampleSet
from rag.train.lora import adapter_factors
from rag.train.reader import ReaderObjective, ReaderOptions, make_reader
from rag.types import UserError


@dataclass(frozen=True)
class ReaderTask:
    """Trains a decoder to answer questions from passages: adapters of its linear layers, or all its weights."""

    options: ReaderOptions
    weights: Filled = hub.DEFAULT_GENERATOR

    def __post_init__(self) -> None:
        if not any(style.weight for style in self.options.styles.values()):
            raise UserError("No style of task.options.styles has a weight above 0: give one.")

    @property
    def path(self) -> Path:
        return hub.local_path(self.weights)

    @property
    def base(self) -> dict[str, str]:
        """Return the weights that are trained, for the card."""
        return {"weights": self.weights, "sha256": llama_checkpoint.checkpoint_sha256(self.path)}

    def prepare(self, examples: ExampleSet, held_out: frozenset[str]) -> tuple[ReaderObjective, Trainable]:
        """Load the model and make its objective.

        Args:
            examples: to train on, but for those held out.
            held_out: ids of examples; the first of them are for validation.

        Raises:
            UserError: there is nothing to train on.
        """
        model, tokenizer = llama_checkpoint.load(self.path)
        some = [example for example in examples.examples if example.id not in held_out]
        held = [example for example in examples.examples if example.id in held_out]
        if not some:
            raise UserError("No question is left to train on: give more, or lower task.options.holdout.")
        options = self.options
        if options.limit is not None:
            some = sorted(some, key=lambda e: content_key("limit", options.seed, e.id))[: options.limit]
        objective = ReaderObjective(some, held[: options.validation], examples.passages, tokenizer, options)
        if not len(objective.batches(0)):
            raise UserError(
                f"{len(some)} questions do not fill a batch of {options.rows} rows of {options.row_tokens} tokens: "
                "lower task.options.rows or task.options.row_tokens, or give more questions."
            )
        return objective, make_reader(placement.to_device(model, np.dtype("float32")), options)

    def save(self, folder: Path, parameters: nnx.State, card: Mapping[str, Any]) -> Path:
        """Write the trained parameters and the card, and return the main file."""
        if not self.options.rank:
            model, tokenizer = llama_checkpoint.load(self.path)
            weights = {dotted(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(parameters)}
            trained = fill_paths(llama.abstract(model.config), weights, (), str(folder))
            export.write_huggingface(self.path, trained, tokenizer, folder, "float32")
            adapters.write_card(folder, card)
            return folder / "model.safetensors"
        base, factors = card["base"]["sha256"], adapter_factors(parameters)
        adapter = adapters.LoraAdapter(self.options.rank, self.options.alpha, base, factors)
        adapters.save_adapter(folder, adapter, card)
        return folder / adapters.ADAPTER
