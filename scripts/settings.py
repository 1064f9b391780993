"""From a configuration to objects: every value is checked against its declared type and range, then they are built.

What a setting takes is declared where it is used: those of a script by its class Settings, those of a part with a
`_target_` by the annotations of the class or function that it names. rag/values.py has the types and the check.
"""

import difflib
import functools
import inspect
import pkgutil
import sys
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rag.runtime.options import (
    ArgumentsOf,
    Filled,
    convert,
    is_plain,
    parameters_of,
    spelled,
    type_error,
    wanted,
)
from rag.types import UserError

CONF = Path(__file__).resolve().parent.parent / "conf"


class Part:
    """The type of a setting that is a part: settings under a `_target_`, most often a file of a folder of conf/."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every script takes: conf/shared.yaml."""

    device: Literal["auto", "cpu", "gpu"]
    profile: bool


@dataclass(frozen=True)
class IndexFolder:
    """Where an index is."""

    path: Filled


class Setting(NamedTuple):
    """One value of a configuration, and what is declared for it."""

    key: str
    value: object
    hint: object


def build(config, **arguments: object):
    """Make what `_target_` names, and all inside it, from plain Python values and the given `arguments`.

    With `_partial_: true` it is not made: what would make it is returned, as Hydra does.
    Raises UserError naming the setting that the target does not have, or whose value is not as declared.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    check(config, given=arguments)
    try:
        # The arguments stay out of instantiate: it would copy them, and take dataclasses for configurations.
        make = instantiate(config, _convert_="all", _partial_=True)
    except InstantiationException as error:  # of something inside
        if (sentence := user_error(error)) is None:
            raise
        raise UserError(sentence) from error
    return functools.partial(make, **arguments) if config.get("_partial_") else make(**arguments)


def user_error(error: BaseException | None) -> str | None:
    """The sentence of the UserError that was raised, or that caused what was raised."""
    while error is not None:
        if isinstance(error, UserError):
            return str(error)
        error = error.__cause__
    return None


def check(config, schema: Any = Part, given: Collection[str] = ()) -> None:
    """Check all values of a configuration, or of a part of one, against their declarations; nothing is built.

    `given` names arguments that the target has from elsewhere. Raises UserError for the first setting that is
    unknown, missing or not as declared.
    """
    for setting in settings_of(config, schema, given):
        check_setting(setting)


def check_setting(setting: Setting) -> None:
    """Raise UserError where the value is not as declared; a parameter that declares nothing takes anything."""
    name, value, hint = setting
    if is_plain(hint):
        convert(name, value, hint)
    elif not _takes(hint, value):
        raise UserError(type_error(name, value, _asked(name, hint)))


def _takes(hint: Any, value: object) -> bool:
    """Whether a value, of plain values and parts, may be what a type means.

    Only a class or protocol of others than Python itself asks for a part; what we cannot judge takes anything.
    """
    if is_plain(hint):
        try:
            convert("", value, hint)
        except UserError:
            return False
        return True
    kind, members = _bare(hint), typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        return _takes(members[0], value)
    if kind in (typing.Union, types.UnionType):
        return any(_takes(member, value) for member in members)
    if kind in (typing.Any, object, inspect.Parameter.empty) or not isinstance(kind, type):
        return True
    if isinstance(value, Mapping) and "_target_" in value:  # makes anything
        return True
    if issubclass(kind, Mapping) or typing.is_typeddict(kind):
        each = members[1] if len(members) == 2 else typing.Any
        return isinstance(value, Mapping) and all(_takes(each, item) for item in value.values())
    if _is_list(kind) and isinstance(value, list):
        if kind is tuple and members and ... not in members:
            return len(value) == len(members) and all(map(_takes, members, value))
        return all(_takes(members[0] if members else typing.Any, item) for item in value)
    if issubclass(kind, Enum) or (_of_python(kind) and not _is_list(kind) and kind is not Callable):
        return value is not None
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol
        return False


def _bare(hint: Any) -> Any:
    """A type without what it is made of: list for list[str]."""
    return typing.get_origin(hint) or hint


def _of_python(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in sys.stdlib_module_names


def _is_list(kind: Any) -> bool:
    """Whether a type of Python's is one of several values, which a configuration gives as a list."""
    several = isinstance(kind, type) and issubclass(kind, Iterable) and not issubclass(kind, Mapping)
    return several and _of_python(kind) and not issubclass(kind, str | bytes | bytearray)


def check_presence(config, schema: Any) -> None:
    """Raise UserError for a setting or part that a script asks for and that was taken away: embedder=null, ~k."""
    for name, (hint, required) in _entries(config, schema).items():
        if required and name not in config.keys():  # noqa: SIM118 (`in config` is false for "???" too)
            check_setting(Setting(name, None, hint))


def settings_of(config, schema: Any = Part, given: Collection[str] = ()) -> Iterator[Setting]:
    """Every value of a configuration with its declaration, those of a part before those of the parts inside it.

    A part that is not there, null, or a plain value, is a setting too. Interpolations are resolved, and what they
    lead to bears the name of where it stands. Raises UserError for a setting that nothing declares.
    """
    from omegaconf import DictConfig, OmegaConf

    entries, inside = _entries(config, schema), []
    for key in config:
        if key not in entries and not str(key).startswith("_"):
            raise UserError(_unknown(config._get_full_key(key), config.get("_target_"), entries))
    inside += ((part, Part) for part in _parts_in(config.get("_args_")))
    for key, (hint, required) in entries.items():
        if OmegaConf.is_missing(config, key):  # so far
            continue
        if key not in config.keys() and (not required or key in given):  # noqa: SIM118
            continue
        value = config.get(key)
        if isinstance(value, DictConfig) and _entries(value, hint) is not None:
            inside.append((value, hint))
        else:
            inside += ((part, Part) for part in _parts_in(value))
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            yield Setting(config._get_full_key(key), plain, hint)
    for part, hint in sorted(inside, key=lambda pair: "_target_" in pair[0]):  # a script's own come first
        yield from settings_of(part, hint)


def _parts_in(value: object) -> Iterator:
    """The parts in a list or mapping, and in those inside it."""
    from omegaconf import DictConfig, ListConfig

    items = list(value.values()) if isinstance(value, DictConfig) else value
    for item in items if isinstance(items, list | ListConfig) else ():
        if isinstance(item, DictConfig) and "_target_" in item:
            yield item
        else:
            yield from _parts_in(item)


class _Entry(NamedTuple):
    hint: Any
    required: bool


def _entries(config, hint: Any) -> dict[str, _Entry] | None:
    """What a mapping of the type `hint` may hold, by name; None where its type says nothing of that."""
    if "_target_" in config:
        return _arguments(parameters_of(target_of(config)), config)
    for kind in typing.get_args(hint) if _optional(hint) else [hint]:
        for metadata in getattr(kind, "__metadata__", ()):
            if isinstance(metadata, ArgumentsOf):
                known = _arguments(parameters_of(metadata.target), config)
                return {name: _Entry(entry.hint, False) for name, entry in known.items()}
        if is_dataclass(kind):
            return _arguments(parameters_of(kind), config)
        if typing.get_origin(kind) in (Mapping, dict) and typing.get_args(kind) and not is_plain(kind):
            return {key: _Entry(typing.get_args(kind)[1], True) for key in config}
    return None


def _arguments(parameters: Mapping[str, inspect.Parameter], config) -> dict[str, _Entry]:
    """The arguments that parameters allow; with **others whatever the configuration has besides.

    Those that `_args_` gives are no settings, and with `_partial_` none is required.
    """
    entries = {}
    ordered = [
        name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    given = ordered[: len(_hydras(config, "_args_", list[typing.Any], ()))]
    partial = _hydras(config, "_partial_", bool, False)
    for name, parameter in parameters.items():
        if name in given:
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            others = [key for key in config if key not in parameters and not str(key).startswith("_")]
            entries |= {key: _Entry(parameter.annotation, False) for key in others}
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            required = parameter.default is parameter.empty and not partial
            entries[name] = _Entry(_with_default(parameter), required)
    return entries


def _hydras(config, key: str, hint: Any, default: Any) -> Any:
    """The value of one of Hydra's own keys in a part, as checked as any other."""
    from omegaconf import OmegaConf

    if (value := config.get(key)) is None:
        return default
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    check_setting(Setting(config._get_full_key(key), plain, hint))
    return value


def _with_default(parameter: inspect.Parameter) -> Any:
    """The type of a parameter, and null where it is the default."""
    hint = parameter.annotation
    known = is_plain(hint) or isinstance(_bare(hint), type)
    return typing.Optional[hint] if known and parameter.default is None else hint  # noqa: UP045


def target_of(config) -> Callable:
    """The class or function that the `_target_` of a part names. Raises UserError where it names none."""
    name, path = config._get_full_key("_target_"), config._target_
    try:
        found = pkgutil.resolve_name(path)
        parameters_of(found)
    except Exception as error:  # of any kind, from a module's own lines
        raise UserError(
            f"{name}={spelled(path)} is nothing that can be built ({_reason(error)}): name a class or function."
        ) from error
    return found


def _reason(error: Exception) -> str:
    """What went wrong in an import, and on which line of which module where it was one of its own."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"]
    match error:
        case SyntaxError(filename=str(file), lineno=line):
            told = f"{type(error).__name__} in {file}, line {line}: {error.msg}"
        case _ if frames:
            told = f"{type(error).__name__} in {frames[-1].filename}, line {frames[-1].lineno}: {error}"
        case _:
            told = str(error)
    return " ".join(told.split()).rstrip(".:")


def _optional(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def _asked(name: str, hint: Any) -> str:
    """What the type of a part asks for, to stand behind "it must be"."""
    group = name.rpartition(".")[2]
    choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    nothing = " or null" if _optional(hint) else ""
    kinds = dict.fromkeys(_noun(name, kind) for kind in _alternatives(hint))
    if choices and group == name:
        return f"one of {', '.join(choices)}{nothing}"
    if is_dataclass(hint):
        return f"settings: {', '.join(f'{name}.{key}' for key in parameters_of(hint))}"
    place = f", as in conf/{group}" if choices else ""
    return f"{' or '.join(kinds)}{place}{nothing}"


def _alternatives(hint: Any) -> list[Any]:
    """The types of a union without null, or the one type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return [hint]


def _noun(name: str, hint: Any) -> str:
    if is_plain(hint):
        return wanted(name, hint)
    if typing.get_origin(hint) is typing.Annotated:
        return _noun(name, typing.get_args(hint)[0])
    kind, members = _bare(hint), typing.get_args(hint)
    if _is_list(kind):
        return f"a list of which each is {_asked(name, members[0])}" if len(members) == 1 else "a list"
    mapping = typing.is_typeddict(kind) or (isinstance(kind, type) and issubclass(kind, Mapping))
    return "settings" if mapping else "settings with a _target_"


def _unknown(name: str, target: str | None, entries: Collection[str]) -> str:
    """The sentence for a setting that nothing declares, with those that look like it."""
    before = name.rpartition(".")[0]
    near = difflib.get_close_matches(name.rpartition(".")[2], list(entries), n=3)
    if near:
        return f"There is no setting {name!r}: did you mean {' or '.join(f'{before}.{n}'.lstrip('.') for n in near)}?"
    return f"There is no setting {name!r}: {target or before or 'the script'} takes {', '.join(entries)}."
