"""Name stages in error messages; a stage may be a class of the user's own, in a file outside of this package."""

import sys
from dataclasses import fields
from typing import Any

from rag.types import UserError

_SHOWN = 100  # characters of a wrong result in its error message


def name_with_file(stage: object) -> str:
    """Return the class of a stage, or the name of a function, with the file that defines it."""
    kind = stage if hasattr(stage, "__qualname__") else type(stage)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return f"{kind.__module__}.{kind.__qualname__}" + (f" in {file}" if file else "")


def wrong_result(stage: object, method: str, result: object, wanted: str) -> UserError:
    """Return the error for a stage that does not return what its protocol says.

    Args:
        stage: The stage.
        method: The method that was called.
        result: What it returned.
        wanted: What it must return, as words that follow "it must return".
    """
    shown = repr(result)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return UserError(
        f"{name_with_file(stage)}: {method} returned {shown}; it must return {wanted}: correct the class."
    )


def check_frozen(value: Any) -> None:
    """Raise UserError for an object in a stage, or the stage itself, whose settings cannot be part of a cache key.

    These are all objects but plain values, lists, tuples, dicts and frozen dataclasses.
    """
    if isinstance(value, list | tuple):
        for item in value:
            check_frozen(item)
    elif isinstance(value, dict):
        for item in value.values():
            check_frozen(item)
    elif value is not None and not isinstance(value, bool | int | float | str | bytes):
        options = getattr(value, "__dataclass_params__", None)  # of the decorator
        if options is None or not options.frozen or isinstance(value, type):
            raise UserError(
                f"{name_with_file(value)} is no frozen dataclass, so that its results cannot be cached: write "
                "@dataclass(frozen=True) above the class."
            )
        for field in fields(value):
            check_frozen(getattr(value, field.name))
