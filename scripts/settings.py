"""Check the values of a configuration against their declared types and ranges, and build objects from it.

The type of a setting is declared where it is used: for a script's own settings in its class Settings, for those under a
`_target_` by the annotations of the class or function that it names. rag/runtime/options.py has the types and the check
of plain values.
"""

import difflib
import functools
import importlib.util
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

import own_stages
from omegaconf import DictConfig, ListConfig, OmegaConf

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
from rag.runtime.stages import wrong_result
from rag.types import UserError

CONF = Path(__file__).resolve().parent.parent / "conf"


def default_weights(stage: str) -> str:
    """Return the URI of the default weights of "embedder" or "generator"; conf/ writes ${default_weights:embedder}."""
    from rag.models import hub

    return {"embedder": hub.DEFAULT_EMBEDDER, "generator": hub.DEFAULT_GENERATOR}[stage]


OmegaConf.register_new_resolver("default_weights", default_weights, replace=True)


class Part:
    """The type of a setting that is a part: a mapping with a `_target_`, most often a file of a folder of conf/.

    `build` makes the object of a part, such as a stage (an embedder, a retriever) or a record of options.
    """


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The settings that every script takes: conf/shared.yaml."""

    device: Literal["auto", "cpu", "gpu"]
    profile: bool
    stages: Filled | None


@dataclass(frozen=True)
class CorpusFolder:
    """A folder of files."""

    path: Filled


@dataclass(frozen=True)
class IndexFolder:
    """The folder of an index."""

    path: Filled


class Setting(NamedTuple):
    """One value of a configuration and its declared type."""

    key: str
    value: object
    hint: object


def build(config: DictConfig, **arguments: object) -> Any:
    """Build the object that `_target_` names, and all objects inside it.

    Args:
        config: A part. With `_partial_: true` a function that makes the object is returned, as Hydra does.
        arguments: Further arguments of the target, which are handed on as they are.

    Raises:
        UserError: A setting is unknown to the target, or its value is not as declared; the message has its name.
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
    if config.get("_partial_"):
        return functools.partial(make, **arguments)
    if (built := make(**arguments)) is None:
        raise wrong_result(target_of(config), config._target_, None, "what it builds")
    return built


def user_error(error: BaseException | None) -> str | None:
    """Return the sentence of the UserError that was raised, or that caused what was raised; None without one."""
    while error is not None:
        if isinstance(error, UserError):
            return str(error)
        error = error.__cause__
    return None


def check(config: DictConfig, schema: Any = Part, given: Collection[str] = ()) -> None:
    """Check all values of a configuration, or of a part, against their declarations; nothing is built.

    Args:
        config: The configuration.
        schema: The dataclass that declares its settings; Part where `_target_` does.
        given: Names of arguments that the target gets from elsewhere.

    Raises:
        UserError: The first setting that is unknown, missing or not as declared.
    """
    for setting in settings_of(config, schema, given):
        check_setting(setting)


def check_setting(setting: Setting) -> None:
    """Raise UserError where the value is not as declared; a parameter without a declared type takes anything."""
    name, value, hint = setting
    if is_plain(hint):
        convert(name, value, hint)
    elif not _accepts(hint, value):
        raise UserError(type_error(name, value, _expected(name, hint)))


def _accepts(hint: Any, value: object) -> bool:
    """Return whether a value, of plain values and parts, fits a type.

    Only a class or protocol that is not Python's own requires a part; a type that we cannot judge accepts anything.
    """
    if is_plain(hint):
        try:
            convert("", value, hint)
        except UserError:
            return False
        return True
    kind, members = _bare(hint), typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        return _accepts(members[0], value)
    if kind in (typing.Union, types.UnionType):
        return any(_accepts(member, value) for member in members)
    if kind in (typing.Any, object, inspect.Parameter.empty) or not isinstance(kind, type):
        return True
    if isinstance(value, Mapping) and "_target_" in value:  # makes anything
        return True
    if issubclass(kind, Mapping) or typing.is_typeddict(kind):
        each = members[1] if len(members) == 2 else typing.Any
        return isinstance(value, Mapping) and all(_accepts(each, item) for item in value.values())
    if _is_list(kind) and isinstance(value, list):
        if kind is tuple and members and ... not in members:
            return len(value) == len(members) and all(map(_accepts, members, value))
        return all(_accepts(members[0] if members else typing.Any, item) for item in value)
    if issubclass(kind, Enum) or (_of_python(kind) and not _is_list(kind) and kind is not Callable):
        return value is not None
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol
        return False


def _bare(hint: Any) -> Any:
    """Return a type without its arguments: list for list[str]."""
    return typing.get_origin(hint) or hint


def _of_python(kind: type) -> bool:
    """Return whether a type belongs to Python's standard library."""
    return kind.__module__.partition(".")[0] in sys.stdlib_module_names


def _is_list(kind: Any) -> bool:
    """Return whether a type of Python's own is a collection, which a configuration gives as a list."""
    several = isinstance(kind, type) and issubclass(kind, Iterable) and not issubclass(kind, Mapping)
    return several and _of_python(kind) and not issubclass(kind, str | bytes | bytearray)


def check_presence(config: DictConfig, schema: Any) -> None:
    """Raise UserError for a required setting or part that was removed on the command line: embedder=null, ~k."""
    for name, (hint, required) in _declarations(config, schema).items():
        if required and name not in config.keys():  # noqa: SIM118 (`in config` is false for "???" too)
            check_setting(Setting(name, None, hint))


def settings_of(config: DictConfig, schema: Any = Part, given: Collection[str] = ()) -> Iterator[Setting]:
    """Yield every value of a configuration with its declaration, those of a part before those of parts inside it.

    A part that is missing, null, or a plain value, is yielded too. Interpolations are resolved; a value that one refers
    to has the name of the setting with the interpolation. Raises UserError for a setting that nothing declares.
    """
    entries, inside = _declarations(config, schema), []
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
        if isinstance(value, DictConfig) and _declarations(value, hint) is not None:
            inside.append((value, hint))
        else:
            inside += ((part, Part) for part in _parts_in(value))
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            yield Setting(config._get_full_key(key), plain, hint)
    for part, hint in sorted(inside, key=lambda pair: "_target_" in pair[0]):  # a script's own come first
        yield from settings_of(part, hint)


def _parts_in(value: object) -> Iterator:
    """Yield the parts in a list or mapping, and in those inside it."""
    items = list(value.values()) if isinstance(value, DictConfig) else value
    for item in items if isinstance(items, list | ListConfig) else ():
        if isinstance(item, DictConfig) and "_target_" in item:
            yield item
        else:
            yield from _parts_in(item)


class _Declaration(NamedTuple):
    """A declared setting: its type, and whether it is required."""

    hint: Any
    required: bool


def _declarations(config, hint: Any) -> dict[str, _Declaration] | None:
    """Return the declared settings of a mapping of type `hint`, by name; None where its type declares none."""
    if "_target_" in config:
        return _arguments(parameters_of(target_of(config)), config)
    for kind in typing.get_args(hint) if _optional(hint) else [hint]:
        for metadata in getattr(kind, "__metadata__", ()):
            if isinstance(metadata, ArgumentsOf):
                known = _arguments(parameters_of(metadata.target), config)
                return {name: _Declaration(entry.hint, False) for name, entry in known.items()}
        if is_dataclass(kind):
            return _arguments(parameters_of(kind), config)
        if typing.get_origin(kind) in (Mapping, dict) and typing.get_args(kind) and not is_plain(kind):
            return {key: _Declaration(typing.get_args(kind)[1], True) for key in config}
    return None


def _arguments(parameters: Mapping[str, inspect.Parameter], config) -> dict[str, _Declaration]:
    """Return the settings that parameters declare; with **others these include every other key of the configuration.

    Positional arguments in `_args_` are no settings, and with `_partial_` none is required.
    """
    entries = {}
    ordered = [
        name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    given = ordered[: len(_hydra_key(config, "_args_", list[typing.Any], ()))]
    partial = _hydra_key(config, "_partial_", bool, False)
    for name, parameter in parameters.items():
        if name in given:
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            others = [key for key in config if key not in parameters and not str(key).startswith("_")]
            entries |= {key: _Declaration(parameter.annotation, False) for key in others}
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            required = parameter.default is parameter.empty and not partial
            entries[name] = _Declaration(_with_default(parameter), required)
    return entries


def _hydra_key(config, key: str, hint: Any, default: Any) -> Any:
    """Return the checked value of one of Hydra's own keys in a part."""
    if (value := config.get(key)) is None:
        return default
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    check_setting(Setting(config._get_full_key(key), plain, hint))
    return value


def _with_default(parameter: inspect.Parameter) -> Any:
    """Return the type of a parameter; null is allowed where it is the default."""
    hint = parameter.annotation
    known = is_plain(hint) or isinstance(_bare(hint), type)
    return typing.Optional[hint] if known and parameter.default is None else hint  # noqa: UP045


def target_of(config: DictConfig) -> Callable:
    """Return the class or function that the `_target_` of a part names. Raises UserError where it names none."""
    name, path = config._get_full_key("_target_"), config._target_
    try:
        found = _resolve(path)
        parameters_of(found)
    except Exception as error:  # of any kind, from a module's own lines
        raise UserError(
            f"{name}={spelled(path)} is nothing that can be built ({_reason(error)}): name a class or function."
        ) from error
    return found


def _resolve(path: str) -> Any:
    """Import what a dotted path names. Raises what a module raised on import, which pkgutil hides in a package."""
    try:
        return pkgutil.resolve_name(path)
    except AttributeError as error:
        if isinstance(error.obj, types.ModuleType) and hasattr(error.obj, "__path__"):
            module = f"{error.obj.__name__}.{error.name}"
            if importlib.util.find_spec(module):
                importlib.import_module(module)
        raise


def _reason(error: Exception) -> str:
    """Return what went wrong in an import, with module and line where the module's own code failed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"]
    match error:
        case SyntaxError(filename=str(file), lineno=line):
            cause = f"{type(error).__name__} in {file}, line {line}: {error.msg}"
        case AttributeError(obj=types.ModuleType(__file__=str(file)), name=name):
            cause = f"{file} has no {name!r}"
        case ModuleNotFoundError(name=name) if not frames:
            cause = f"No module named {name!r} is installed{own_stages.searched()}"
        case _ if frames:
            cause = f"{type(error).__name__} in {frames[-1].filename}, line {frames[-1].lineno}: {error}"
        case _:
            cause = str(error)
    return " ".join(cause.split()).rstrip(".:")


def _optional(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def _expected(name: str, hint: Any) -> str:
    """Return what a type requires, as words that follow "it must be"."""
    group = name.rpartition(".")[2]
    choices = own_stages.choices(group, CONF)
    nothing = " or null" if _optional(hint) else ""
    kinds = dict.fromkeys(_noun(name, kind) for kind in _alternatives(hint))
    if choices and group == name:
        return f"one of {', '.join(choices)}{nothing}"
    if is_dataclass(hint):
        return f"settings: {', '.join(f'{name}.{key}' for key in parameters_of(hint))}"
    example = f", as in conf/{group}" if choices else ""
    return f"{' or '.join(kinds)}{example}{nothing}"


def _alternatives(hint: Any) -> list[Any]:
    """Return the types of a union without null, or the one type."""
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
        return f"a list of which each is {_expected(name, members[0])}" if len(members) == 1 else "a list"
    mapping = typing.is_typeddict(kind) or (isinstance(kind, type) and issubclass(kind, Mapping))
    return "settings" if mapping else "settings with a _target_"


def _unknown(name: str, target: str | None, entries: Collection[str]) -> str:
    """Return the sentence for an undeclared setting, with declared ones of similar names."""
    before = name.rpartition(".")[0]
    near = difflib.get_close_matches(name.rpartition(".")[2], list(entries), n=3)
    if near:
        return f"There is no setting {name!r}: did you mean {' or '.join(f'{before}.{n}'.lstrip('.') for n in near)}?"
    return f"There is no setting {name!r}: {target or before or 'the script'} takes {', '.join(entries)}."
