"""A tiny reader with its questions, for tests of training."""

from pathlib import Path

import jax
import jax.numpy as jnp

from rag.models.llama import checkpoint
from rag.prompt import PromptTemplate
from rag.train import Trainable
from rag.train.contexts import ContextMix, ReaderExample, TargetStyle
from rag.train.reader import ReaderObjective, ReaderOptions, make_reader
from tests.tiny_models import write_decoder

TEMPLATE = PromptTemplate(user="{context}\n{question}\n", abstain_answer="no")
STYLES = {
    "short": TargetStyle(TEMPLATE, 0.7, "span"),
    "cited": TargetStyle(PromptTemplate(user="{context}? {question}", abstain_answer="no."), 0.3, "cited"),
}
PASSAGES = tuple(
    f"{a} {b} is {a[0]}{b[::-1]}." for a in ("King", "River", "Hill") for b in ("Lom", "Ase", "Tor")
)


def examples(count: int = len(PASSAGES)) -> list[ReaderExample]:
    """Return questions on the passages; the passages after the gold one are the distractors."""
    found = []
    for i in range(count):
        text = PASSAGES[i % len(PASSAGES)]
        name, answer = text[:-1].split(" is ")
        others = [(i + step) % len(PASSAGES) for step in range(1, 5)]
        found.append(ReaderExample(f"q{i}", f"{name}{i}?", (answer,), i % len(PASSAGES), tuple(others)))
    return found


def options(**changes) -> ReaderOptions:
    values = {"styles": STYLES, "rows": 2, "row_tokens": 192, "rank": 2, "dtype": "float32", "holdout": 0}
    return ReaderOptions(**values | changes)


def make(folder: Path, some: ReaderOptions, count: int = len(PASSAGES)) -> tuple[ReaderObjective, Trainable]:
    """Return the objective of so many questions, of which the last two are for validation, and the model."""
    if not folder.exists():
        write_decoder(folder)
    model, tokenizer = checkpoint.load(folder)
    asked = examples(count)
    objective = ReaderObjective(asked[:-2], asked[-2:], PASSAGES, tokenizer, some)
    smaller = jax.tree.map(lambda a: jnp.asarray(a / 3 if a.ndim == 2 else a), model)  # to learn from
    return objective, make_reader(smaller, some)


def no_distractors(**changes) -> ContextMix:
    return ContextMix(**{"passages": (1.0,), "unanswerable": 0.0} | changes)
