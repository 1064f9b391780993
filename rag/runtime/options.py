"""Types of option values with their ranges, and the one check of values against them.

An option declares what it takes where it is defined: `size: Count`, `order: Literal["score", "reverse"]`. Pydantic
checks it, strictly: 1.5 and "1" are no whole numbers, true is not 1, and NaN and infinity are no numbers; a whole
number is a number too. scripts/settings.py checks configurations by the same declarations.
"""

import functools
import inspect
import json
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from annotated_types import DocInfo, Ge, Gt, Le, Lt, MinLen, Predicate

from rag.types import UserError

_MOST = 2**31 - 1  # of what is counted: sizes and positions are 32-bit numbers in many places
_SHOWN = 100  # characters of a wrong value in its sentence

Whole = Annotated[int, Ge(0), Le(_MOST)]
Count = Annotated[int, Ge(1), Le(_MOST)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Share = Annotated[float, Ge(0), Le(1)]
Weight = Annotated[float, Ge(0), Le(1e6)]  # only the ratio to others matters
Filled = Annotated[str, MinLen(1)]
Counts = Annotated[Sequence[Count], MinLen(1)]

# Sampling's, which several stages take.
Temperature = Annotated[float, Ge(0), Le(100)]
TopP = Annotated[float, Gt(0), Le(1)]
Penalty = Annotated[float, Gt(0), Le(1e6)]


def is_question(text: str) -> bool:
    """Whether there is anything but white space in a text."""
    return bool(text.strip())


def is_date(text: str) -> bool:
    """Whether a text is a day of the calendar in ISO 8601, such as 2026-01-31."""
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


Date = Annotated[str, Predicate(is_date), DocInfo("a date, as 2026-01-31")]
Question = Annotated[str, Predicate(is_question), DocInfo("a question that is not empty")]

F = TypeVar("F", bound=Callable)


def check_fields(options: Any) -> None:
    """Check the fields of a frozen dataclass, in its __post_init__; lists become tuples, 1 a float where one is asked.

    Raises UserError for the first value that is not as declared. Fields that take objects are not looked at.
    """
    for name, parameter in parameters_of(type(options)).items():
        if is_plain(parameter.annotation):
            place = f"{type(options).__name__}.{name}"
            object.__setattr__(options, name, convert(place, getattr(options, name), parameter.annotation))


def checked(function: F) -> F:
    """Decorate a function, or the __init__ of a class, so that it checks its arguments as check_fields does."""
    place = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = inspect.signature(function).bind(*args, **kwargs)
        for name, value in given.arguments.items():
            if is_plain(hint := parameters_of(function)[name].annotation):
                given.arguments[name] = convert(f"{place}.{name}", value, hint)
        return function(*given.args, **given.kwargs)

    return call


@functools.cache
def parameters_of(target: Callable) -> Mapping[str, inspect.Parameter]:
    """The parameters of a class or function, by name, with their annotations evaluated.

    An annotation that cannot be evaluated, such as a name that is imported for type checkers alone, counts as none.
    What is written in C may not tell its parameters: it takes any.
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
    except Exception:  # of any kind: it is a user's expression
        return inspect.Parameter.empty


def _names_around(target: Callable) -> dict[str, Any]:
    """The names that the annotations of a class or function see."""
    functions = [target.__init__, target.__new__] if isinstance(target, type) else [target]
    for function in map(inspect.unwrap, functions):
        while isinstance(function, functools.partial):
            function = inspect.unwrap(function.func)
        if hasattr(function, "__globals__"):
            return function.__globals__
    return vars(sys.modules[target.__module__])


def convert(name: str, value: object, hint: object) -> object:
    """The value as the plain type `hint` has it. Raises UserError, one sentence with `name`, for one that is not."""
    from pydantic import ValidationError

    try:
        found = _validator(hint).validate_python(value)
    except ValidationError as error:
        raise UserError(type_error(name, value, wanted(name, hint), _takes_text(hint))) from error
    return tuple(found) if isinstance(found, list) else found


def type_error(name: str, value: object, asked: str, takes_text: bool = False) -> str:
    """The sentence for a value that is not what is asked for."""
    as_text = takes_text and isinstance(value, int | float)
    hint = f"; as text write {name}='\"{spelled(value)}\"'" if as_text else ""
    return f"{name}={spelled(value)} will not do: it must be {asked}{hint}."


@functools.cache
def _validator(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(_of_lists(hint), config=ConfigDict(strict=True, allow_inf_nan=False))


def _of_lists(hint: Any) -> Any:
    """The same plain type, but its tuples may be given as lists: YAML has no tuples."""
    from pydantic import Strict

    origin, members = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return Annotated[_of_lists(members[0]), *members[1:]]
    if origin is tuple:
        return Annotated[tuple[*map(_of_lists, members)], Strict(False)]
    if origin in (Union, types.UnionType):
        return Union[*map(_of_lists, members)]
    return origin[*map(_of_lists, members)] if origin in (list, Sequence, Mapping) else hint


def is_plain(hint: Any) -> bool:
    """Whether a type is of plain values through and through: numbers, text, choices, and lists and mappings of them."""
    if get_origin(hint) in (Annotated, list, tuple, Sequence, Mapping, Union, types.UnionType):
        return bool(_members(hint)) and all(map(is_plain, _members(hint)))
    return get_origin(hint) is Literal or hint in (int, float, bool, str, Path, None, types.NoneType)


def _members(hint: Any) -> list[Any]:
    """The types that a type is made of."""
    if get_origin(hint) is Annotated:
        return [get_args(hint)[0]]
    return [kind for kind in get_args(hint) if kind is not ...]


def _takes_text(hint: Any) -> bool:
    if get_origin(hint) in (Annotated, Union, types.UnionType):
        return any(map(_takes_text, _members(hint)))
    return hint is str


def wanted(name: str, hint: Any) -> str:
    """What a plain type asks of the setting `name`, to stand behind "it must be"."""
    limits: tuple[Any, ...] = ()
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
            each = [wanted(name, kind) for kind in _members(hint)]
            return f"a list of {len(each)}: {', '.join(each)}"
        [kind] = _members(hint)
        each = wanted(f"{name}.0", kind)
        return (
            f"a list{' that is not empty' * filled}, as in {name}={_example(kind)}, of which each is {each}"
        )
    if get_origin(hint) is Mapping:
        return "settings by name"
    if hint in (int, float):
        return _number(hint, limits)
    words = {bool: "true or false", str: "text", Path: "a path", None: "null", types.NoneType: "null"}
    return words[hint] + " that is not empty" * filled


def _either(words) -> str:
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
    """A value as a person would type it; text that would be taken for something else stands in quotes."""
    match value:
        case str():
            text = json.dumps(value, ensure_ascii=False) if _ambiguous(value) else value.replace("\n", "\\n")
        case list() | tuple():
            text = f"[{','.join(map(spelled, value))}]"
        case Mapping():
            text = f"{{{','.join(f'{key}:{spelled(item)}' for key, item in value.items())}}}"
        case None | bool():
            text = json.dumps(value)
        case int() if abs(value) >= 10**_SHOWN:  # Python writes no number of thousands of digits
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
    """Metadata of a mapping whose entries are arguments of `target`: Annotated[Mapping[str, Any], ArgumentsOf(f)]."""

    target: Callable
