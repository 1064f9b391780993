"""Types of option values with their ranges, and the check of values against them.

An option declares its type where it is defined: `size: Count`, `order: Literal["score", "reverse"]`. Pydantic
checks it strictly: 1.5 and "1" are not integers, true is not 1, and NaN and infinity are not numbers; an integer is
accepted as a float. scripts/settings.py checks configurations by the same declarations.
"""

import functools
import inspect
import json
import operator
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin

from annotated_types import DocInfo, Ge, Gt, Le, Lt, MinLen, Predicate

from rag.types import UserError

_MAX_COUNT = 2**31 - 1  # sizes and positions are 32-bit integers in many places
_SHOWN = 100  # characters of a wrong value in its error message

Whole = Annotated[int, Ge(0), Le(_MAX_COUNT)]
Count = Annotated[int, Ge(1), Le(_MAX_COUNT)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Share = Annotated[float, Ge(0), Le(1)]
Weight = Annotated[float, Ge(0), Le(1e6)]  # only its ratio to other weights matters
Filled = Annotated[str, MinLen(1)]
Counts = Annotated[Sequence[Count], MinLen(1)]

# Of sampling, which several stages have.
Temperature = Annotated[float, Ge(0), Le(100)]
TopP = Annotated[float, Gt(0), Le(1)]
Penalty = Annotated[float, Gt(0), Le(1e6)]


def is_question(text: str) -> bool:
    """Return whether a text has a character that is not white space."""
    return bool(text.strip())


def is_date(text: str) -> bool:
    """Return whether a text is a date in ISO 8601, such as 2026-01-31."""
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


Date = Annotated[str, Predicate(is_date), DocInfo("a date, as 2026-01-31")]
Question = Annotated[str, Predicate(is_question), DocInfo("a question that is not empty")]

P = ParamSpec("P")
T = TypeVar("T")


def check_fields(options: Any) -> None:
    """Check the fields of a frozen dataclass, from its __post_init__.

    Lists become tuples, and integers become floats where the field is a float. Fields of other than plain types
    (`is_plain`) are not checked. Raises UserError for the first value that is not of the declared type.
    """
    kind: Callable = type(options)
    for name, parameter in parameters_of(kind).items():
        if is_plain(parameter.annotation):
            full_name = f"{kind.__name__}.{name}"
            value = convert(full_name, getattr(options, name), parameter.annotation)
            object.__setattr__(options, name, value)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function, or the __init__ of a class, so that it checks its arguments as `check_fields` does."""
    function_name = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        given = inspect.signature(function).bind(*args, **kwargs)
        for name, value in given.arguments.items():
            if is_plain(hint := parameters_of(function)[name].annotation):
                given.arguments[name] = convert(f"{function_name}.{name}", value, hint)
        return function(*given.args, **given.kwargs)

    return call


@functools.cache
def parameters_of(target: Callable) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a class or function, by name, with their annotations evaluated.

    An annotation that cannot be evaluated, such as a name that is imported only for type checkers, counts as none. A
    function in C may not list its parameters: it then counts as taking any.
    """
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        return {"others": inspect.Parameter("others", inspect.Parameter.VAR_KEYWORD)}
    names = _names_around(target)
    return {
        name: parameter.replace(annotation=_evaluated(parameter.annotation, names))
        for name, parameter in parameters.items()
    }


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, names)
    except Exception:  # of any kind: the expression is a user's
        return inspect.Parameter.empty


def _names_around(target: Callable) -> dict[str, Any]:
    """Return the global names that are visible to the annotations of a class or function."""
    functions = [target]
    if isinstance(target, type):
        functions = [getattr(target, name) for name in ("__init__", "__new__")]
    for function in map(inspect.unwrap, functions):
        while isinstance(function, functools.partial):
            function = inspect.unwrap(function.func)
        if hasattr(function, "__globals__"):
            return function.__globals__
    return vars(sys.modules[target.__module__])


def convert(name: str, value: object, hint: object) -> object:
    """Return a value converted to the plain type `hint`. Raises UserError, with `name`, for a value of another type."""
    from pydantic import ValidationError

    try:
        found = _validator(hint).validate_python(value)
    except ValidationError as error:
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(
                f"{name}={value!r} has bytes that are not UTF-8: give it another name."
            ) from error
        raise UserError(type_error(name, value, wanted(name, hint), _takes_text(hint))) from error
    return tuple(found) if isinstance(found, list) else found


def type_error(name: str, value: object, asked: str, takes_text: bool = False) -> str:
    """Return the error message for a value of the wrong type.

    Args:
        name: of the setting.
        value: the wrong value.
        asked: describes the right type.
        takes_text: whether text is one of the right types; the message then says how to write a number as text.
    """
    as_text = takes_text and isinstance(value, int | float)
    hint = f"; as text write {name}='\"{spelled(value)}\"'" if as_text else ""
    return f"{name}={spelled(value)} is not valid: it must be {asked}{hint}."


@functools.cache
def _validator(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(_of_lists(hint), config=ConfigDict(strict=True, allow_inf_nan=False))


def _of_lists(hint: Any) -> Any:
    """Return the same plain type, but with tuples that may be given as lists, because YAML has no tuples."""
    from pydantic import Strict

    origin: Any = get_origin(hint)
    if origin is Annotated:
        kind, *limits = get_args(hint)
        return Annotated[_of_lists(kind), *limits]
    members = tuple(map(_of_lists, get_args(hint)))
    if origin is tuple:
        return Annotated[origin[members], Strict(False)]
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, members)
    return origin[members] if origin in (list, Sequence, Mapping) else hint


def is_plain(hint: Any) -> bool:
    """Return whether a type is made only of numbers, text, paths, choices, and lists and mappings of these."""
    if get_origin(hint) in (Annotated, list, tuple, Sequence, Mapping, Union, types.UnionType):
        return bool(_members(hint)) and all(map(is_plain, _members(hint)))
    return get_origin(hint) is Literal or hint in (int, float, bool, str, Path, None, types.NoneType)


def _members(hint: Any) -> list[Any]:
    """Return the types that a type is made of."""
    if get_origin(hint) is Annotated:
        return [get_args(hint)[0]]
    return [kind for kind in get_args(hint) if kind is not ...]


def _takes_text(hint: Any) -> bool:
    if get_origin(hint) in (Annotated, Union, types.UnionType):
        return any(map(_takes_text, _members(hint)))
    return hint is str


def wanted(name: str, hint: Any) -> str:
    """Describe a plain type for the error message of the setting `name`, as the words after "it must be"."""
    limits: list[Any] = []
    if get_origin(hint) is Annotated:
        hint, *limits = get_args(hint)
    for limit in limits:
        if isinstance(limit, DocInfo):
            return limit.documentation
    filled = any(isinstance(limit, MinLen) for limit in limits)
    if get_origin(hint) in (Union, types.UnionType):
        numbers = {int, float} & set(get_args(hint))
        kinds = [
            kind for kind in get_args(hint) if kind is not Path and (kind is not int or float not in numbers)
        ]
        kinds.sort(key=lambda kind: (get_origin(kind) in (list, tuple, Sequence), kind is types.NoneType))
        return _either(
            dict.fromkeys(wanted(name, Annotated[kind, *limits] if limits else kind) for kind in kinds)
        )
    if get_origin(hint) is Literal:
        return _either(map(spelled, get_args(hint)))
    if get_origin(hint) in (list, tuple, Sequence):
        if get_origin(hint) is tuple and ... not in get_args(hint):
            words = [wanted(name, kind) for kind in _members(hint)]
            return f"a list of {len(words)}: {', '.join(words)}"
        [kind] = _members(hint)
        each = wanted(f"{name}.0", kind)
        return (
            f"a list{' that is not empty' * filled}, as in {name}={_example(kind)}, of which each is {each}"
        )
    if get_origin(hint) is Mapping:
        return "settings by name"
    if hint in (int, float):
        return _number(hint, limits)
    names = {bool: "true or false", str: "text", Path: "a path", None: "null", types.NoneType: "null"}
    return names[hint] + " that is not empty" * filled


def _either(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _example(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _example(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return f"[{','.join(map(spelled, get_args(kind)[:2]))}]"
    known = {int: "[10,100]", float: "[0.1,0.9]", bool: "[false,true]"}
    numbers = [known[member] for member in (kind, *get_args(kind)) if member in known]
    return numbers[0] if numbers else "[10,100]" if any(map(get_args, get_args(kind))) else "[a,b]"


def _number(kind: type, limits: Sequence[Any]) -> str:
    noun = "a whole number" if kind is int else "a number"
    low = next((limit for limit in limits if isinstance(limit, Ge | Gt)), None)
    high = next((limit for limit in limits if isinstance(limit, Le | Lt)), None)
    if isinstance(low, Ge) and isinstance(high, Le):
        return f"{noun} from {low.ge:.10g} to {high.le:.10g}"
    below = (
        "" if high is None else f"at most {high.le:.10g}" if isinstance(high, Le) else f"below {high.lt:.10g}"
    )
    above = (
        "" if low is None else f"of {low.ge:.10g} or more" if isinstance(low, Ge) else f"above {low.gt:.10g}"
    )
    return " ".join([noun, " and ".join(filter(None, [above, below]))]).rstrip()


def spelled(value: object) -> str:
    """Return a value as a user would type it; text that could be taken for another type is quoted."""
    match value:
        case str():
            text = json.dumps(value, ensure_ascii=False) if _ambiguous(value) else value.replace("\n", "\\n")
        case list() | tuple():
            text = f"[{','.join(map(spelled, value))}]"
        case Mapping():
            text = f"{{{','.join(f'{key}:{spelled(item)}' for key, item in value.items())}}}"
        case None | bool():
            text = json.dumps(value)
        case int() if abs(value) >= 10**_SHOWN:  # Python cannot print an integer of thousands of digits
            text = f"{'-' * (value < 0)}a number of more than {_SHOWN} digits"
        case _:
            text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _ambiguous(text: str) -> bool:
    if text != text.strip() or not text or text in ("null", "true", "false"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


class ArgumentsOf(NamedTuple):
    """Metadata of a mapping whose items are arguments of `target`: Annotated[Mapping[str, Any], ArgumentsOf(f)]."""

    target: Callable
