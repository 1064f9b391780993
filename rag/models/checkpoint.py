"""Map the tensors of a checkpoint to the parameters of an NNX module, strictly, by tables of names.

A table is a sequence of `Rule`s. Each maps a tensor's name in the file to a parameter's path in the module; `{i}`
stands for a layer's number on both sides. A tensor without a rule, a parameter without a tensor and a tensor of another
shape are errors: a model that loads is the model that was saved.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from rag.models.tensor_files import count_names
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.types import UserError

M = TypeVar("M", bound=nnx.Module)


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a weight table."""

    name: str  # in the file, with {i} for the layer
    path: str | None  # in the module, dotted, with {i}; None: known and not used
    transform: Callable[[np.ndarray], np.ndarray] | None = None


def fill(module: M, tensors: Mapping[str, np.ndarray], table: Sequence[Rule], source: str) -> M:
    """Return the abstract `module` (from `nnx.eval_shape`) with every parameter taken from `tensors`.

    Args:
        module: shapes in place of weights.
        tensors: by their names in the file.
        table: the rules.
        source: the checkpoint's name in errors.

    Raises:
        UserError: tensors are unknown, missing or of another shape.
    """
    found: dict[str, np.ndarray] = {}
    unknown = []
    for name in tensors:
        rule, layer = _match(table, name)
        if rule is None:
            unknown.append(name)
        elif rule.path is not None:
            array = tensors[name]
            found[rule.path.replace("{i}", layer)] = rule.transform(array) if rule.transform else array
    return fill_paths(module, found, unknown, source)


def _match(table: Sequence[Rule], name: str) -> tuple[Rule | None, str]:
    for rule in table:
        pattern = re.escape(rule.name).replace(r"\{i\}", r"(\d+)")
        if found := re.fullmatch(pattern, name):
            return rule, found.group(1) if found.groups() else ""
    return None, ""


def fill_paths(module: M, found: Mapping[str, np.ndarray], unknown: Sequence[str], source: str) -> M:
    """Return the abstract `module` with every parameter taken from arrays.

    Args:
        module: shapes in place of weights.
        found: the arrays by the parameters' dotted paths.
        unknown: names in the file that have no rule, for the error.
        source: the checkpoint's name in errors.

    Raises:
        UserError: tensors are unknown, missing or of another shape.
    """
    graph, state = nnx.split(module)
    flat = {dotted(path): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    missing = sorted(flat.keys() - found.keys())
    surplus = sorted(unknown) + sorted(found.keys() - flat.keys())
    if missing or surplus:
        raise UserError(
            f"{source} does not hold this architecture: {count_names('missing', missing)}; "
            f"{count_names('unknown', surplus)}; check that the checkpoint is complete and of a supported model family"
        )
    for name, (_, leaf) in flat.items():
        if found[name].shape != leaf.get_value().shape:
            raise UserError(
                f"{source} holds {name} with shape {tuple(found[name].shape)} where its own configuration says "
                f"{tuple(leaf.get_value().shape)}; the checkpoint is damaged or of another model"
            )
    values = [(path, leaf.replace(found[name])) for name, (path, leaf) in flat.items()]
    return nnx.merge(graph, nnx.from_flat_state(values))


def dotted(path: Iterable[Any]) -> str:
    """Return a parameter's path in a module as text, such as "layers.0.mlp.up_proj.weight"."""
    return ".".join(map(str, path))


def check_layers(names: Iterable[str], pattern: str, count: int, source: str) -> None:
    """Compare the number of layers in a configuration with the layers in the tensors' names.

    Args:
        names: of the tensors.
        count: the layers in the configuration.
        source: the checkpoint's name in errors.
        pattern: how the names of a layer's tensors begin, with {i} for its number.

    Raises:
        UserError: they differ.
    """
    start = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d{1,9})"))
    found = {int(match[1]) for match in map(start.match, names) if match}
    if len(found) != count or max(found) != count - 1:
        raise UserError(
            f"{source} counts {count:,} layers in its configuration, and holds tensors of {len(found):,}; the "
            "checkpoint is damaged or incomplete, fetch it again"
        )


def check_vocabulary(tokenizer: Tokenizer, rows: int, source: str) -> None:
    """Raise UserError if the tokenizer has an id for which the model's embedding of `rows` rows has none."""
    if tokenizer.largest_id >= rows:
        raise UserError(
            f"{source} has {rows:,} rows in its embedding, and a tokenizer with an id {tokenizer.largest_id:,}; its "
            "files are of different models, fetch it again"
        )
