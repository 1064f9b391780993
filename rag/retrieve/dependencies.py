"""What the results of a retrieval stage depend on beside the passages: models, or the queries of a dataset."""

from collections.abc import Sequence
from typing import Any

from rag.runtime.stages import name_with_file
from rag.types import UserError

_NAMES = ("embedder", "generator", "queries")


def dependencies_of(*stages: Any) -> tuple[str, ...]:
    """Return which of "embedder", "generator" and "queries" the results of the stages depend on.

    A stage names them in its `depends_on`; one without this attribute depends on the passages alone. Raises UserError
    for a stage that names anything else, or names them as earlier versions of this project did.
    """
    return tuple(dict.fromkeys(name for stage in stages for name in _named_by(stage)))


def _named_by(stage: Any) -> Sequence[str]:
    if not hasattr(stage, "depends_on") and hasattr(stage, "uses"):
        raise UserError(
            f"{name_with_file(stage)} names its models in `uses`, which is called `depends_on` now: rename it, or its "
            "results would be found again under another model."
        )
    named = getattr(stage, "depends_on", ())
    if not isinstance(named, list | tuple) or any(name not in _NAMES for name in named):
        raise UserError(
            f"{name_with_file(stage)} has depends_on = {named!r}: write a tuple of some of {', '.join(_NAMES)}, such "
            'as ("embedder",).'
        )
    return named


def check_declared(name: str, running: Sequence[Any]) -> None:
    """Raise UserError if one of the running stages depends on this without naming it in its `depends_on`.

    Its results are cached under a key of what it names, so they would be found again under another model.
    """
    for stage in running:
        if name not in dependencies_of(stage):
            raise UserError(
                f"{name_with_file(stage)} uses the {name} and does not say so: write "
                f'depends_on: ClassVar = ("{name}",) into the class, so that its cached results belong to it.'
            )
