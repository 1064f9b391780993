"""From a configuration to objects: every value is checked against its declared type and range, then they are built.

What a setting takes is declared where it is used: those of a script by its class Settings, those of a part with a
`_target_` by the annotations of the class or function that it names. rag/values.py has the types and the check.
"""

import difflib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rag.types import UserError
from rag.values import Filled, fitted, is_plain, parameters_of, refusal, spelled

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


class ArgumentsOf(NamedTuple):
    """Metadata of a mapping whose entries are arguments of `target`: Annotated[Mapping[str, Any], ArgumentsOf(f)]."""

    target: Callable


class Setting(NamedTuple):
    """One value of a configuration, and what is declared for it."""

    key: str
    value: object
    hint: object


def build(config, **arguments: object):
    """Make what `_target_` names, and all inside it, from plain Python values and the given `arguments`.

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
    return make(**arguments)


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
        fitted(name, value, hint)
    elif hint is not inspect.Parameter.empty and not (value is None and _optional(hint)):
        raise UserError(refusal(name, value, _asked(name, hint)))


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
    for key, (hint, required) in entries.items():
        if OmegaConf.is_missing(config, key):  # so far
            continue
        if key not in config.keys() and (not required or key in given):  # noqa: SIM118
            continue
        value = config.get(key)
        if isinstance(value, DictConfig) and _entries(value, hint) is not None:
            inside.append((value, hint))
        else:
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            yield Setting(config._get_full_key(key), plain, hint)
    for part, hint in inside:
        yield from settings_of(part, hint)


class _Entry(NamedTuple):
    hint: Any
    required: bool


def _entries(config, hint: Any) -> dict[str, _Entry] | None:
    """What a mapping of the type `hint` may hold, by name; None where its type says nothing of that."""
    if "_target_" in config:
        return _arguments(parameters_of(_target(config)), config)
    for kind in typing.get_args(hint) if _optional(hint) else [hint]:
        for metadata in getattr(kind, "__metadata__", ()):
            if isinstance(metadata, ArgumentsOf):
                known = _arguments(parameters_of(metadata.target), config)
                return {name: _Entry(entry.hint, False) for name, entry in known.items()}
        if is_dataclass(kind):
            return _arguments(parameters_of(kind), config)
        if typing.get_origin(kind) is Mapping and not is_plain(kind):
            return {key: _Entry(typing.get_args(kind)[1], True) for key in config}
    return None


def _arguments(parameters: Mapping[str, inspect.Parameter], config) -> dict[str, _Entry]:
    """The arguments that parameters allow; with **others whatever the configuration has besides."""
    entries = {}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            others = [key for key in config if key not in parameters and not str(key).startswith("_")]
            entries |= {key: _Entry(parameter.annotation, False) for key in others}
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            entries[name] = _Entry(parameter.annotation, parameter.default is parameter.empty)
    return entries


def _target(config) -> Callable:
    name, path = config._get_full_key("_target_"), config._target_
    try:
        found = pkgutil.resolve_name(path)
        parameters_of(found)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{name}={spelled(path)} is nothing that can be built ({reason}): name a class or function."
        ) from error
    return found


def _optional(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def _asked(name: str, hint: Any) -> str:
    """What the type of a part asks for, to stand behind "it must be"."""
    group = name.rpartition(".")[2]
    choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    nothing = " or null" if _optional(hint) else ""
    if choices and group == name:
        return f"one of {', '.join(choices)}{nothing}"
    if is_dataclass(hint):
        return f"settings: {', '.join(f'{name}.{key}' for key in parameters_of(hint))}"
    place = f", as in conf/{group}" if choices else ""
    return f"settings{place if typing.get_origin(hint) is Mapping else f' with a _target_{place}'}{nothing}"


def _unknown(name: str, target: str | None, entries: Collection[str]) -> str:
    """The sentence for a setting that nothing declares, with those that look like it."""
    before = name.rpartition(".")[0]
    near = difflib.get_close_matches(name.rpartition(".")[2], list(entries), n=3)
    if near:
        return f"There is no setting {name!r}: did you mean {' or '.join(f'{before}.{n}'.lstrip('.') for n in near)}?"
    return f"There is no setting {name!r}: {target or before or 'the script'} takes {', '.join(entries)}."
