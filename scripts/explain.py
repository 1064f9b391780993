"""Explain a wrong command line in one sentence: unknown settings, old names, missing values, Hydra's own errors."""

import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import own_stages
import process
from hydra_run import groups
from settings import user_error

from rag.runtime.options import type_error
from rag.types import UserError

# Old names of settings and their new ones; a name also covers the settings below it. The first match counts.
RENAMED = {
    "reading": "ablation",
    "certificate": "sensitivity",
    "run.path": "retriever.path",
    "generator.drafting": "generator.speculative",
    "embedder.relevant_from": "embedder.score_threshold",
    "fusion.lows": "fusion.lower_bounds",
    "bench.drafting": "bench.speculative",
    "bench.path": "bench.questions.path",
    "bench.k": "bench.questions.k",
    "bench.seed": "bench.questions.seed",
    "bench.embedder": "bench.questions.embedder",
    "bench.prompt": "bench.questions.prompt",
    "bench.context": "bench.questions.context",
    "bench.reading.weights": "bench.weights",
    "bench.reading.max_new_tokens": "bench.max_new_tokens",
    "bench.reading.stop": "bench.stop",
    "bench.reading.questions": "bench.questions.limit",
    "bench.reading": "bench.questions",
}
# Settings that took one value and are several settings now, and the one of them that takes this value.
DIVIDED = {"bench.questions": "bench.questions.limit"}


def explain(error: Exception, config_name: str, config_dir: Path) -> str | None:
    """Return the sentence for an error raised before main began; None where it is not the user's."""
    if sentence := process.out_of_files(error):
        return sentence
    if isinstance(error, OSError) and error.filename:
        return f"Cannot make {error.filename} ({error.strerror}): choose the run's folder with hydra.run.dir=DIR."
    if sentence := process.system_error(error):
        return sentence
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if (sentence := user_error(error) or _wrong_choice(config_dir)) is not None:
        return sentence
    match error:
        case MissingConfigException(missing_cfg_file=str(name), options=options) if options:
            group, _, choice = name.rpartition("/")
            return f"There is no {group} {choice!r}: choose one of {', '.join(options)}."
        case HydraException() if names := re.match(r"Could not override '(\S+)'\.\s.* (\S+)\?", str(error)):
            return f"There is no group {names[1]!r}: did you mean {names[2]!r}?"
        case HydraException(__cause__=None) if names := re.match(r"Could not override '(\S+)'", str(error)):
            return f"scripts/{config_name}.py has no group {names[1]!r}: leave it out."
        case HydraException() if names := re.match(
            r"In '(\S+)/(\S+)': Could not override '(\w+)'", str(error)
        ):
            chosen = f"{names[1]}={names[2]}"
            return f"{chosen} chooses {names[3]}, which only scripts/eval.py has: choose another {names[1]}."
        case OverrideParseException():
            reason = error.message.splitlines()[0]
            return f"Cannot read the setting {error.override}: {reason}; write '\"...\"' around text."
        case HydraException(__cause__=ConfigAttributeError() | ConfigKeyError()):
            key = re.search(r"override '?([^'=\s]+)", str(error))
            return unknown_key(key[1].lstrip("+"), config_name, config_dir) if key else str(error)
        case HydraException(__cause__=OmegaConfBaseException() as cause):
            return f"{first_line(error)}: {first_line(cause)}"
        case HydraException() | OmegaConfBaseException():
            return str(error)
        case RecursionError():
            return "A setting is nested too deep: Hydra cannot read it."
    return None


def _wrong_choice(config_dir: Path) -> str | None:
    """Return the sentence for a group that is given a value that is no name of a choice, or list of names."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    for argument in sys.argv[1:]:
        group = argument.partition("=")[0].lstrip("+").partition("@")[0]
        if "=" not in argument or group not in groups(config_dir):
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except OverrideParseException:  # has its own sentence
            continue
        value = override.value()
        names = value if isinstance(value, list) else [value]
        if not override.is_sweep_override() and not all(isinstance(name, str) for name in names):
            return type_error(group, value, f"one of {', '.join(own_stages.choices(group, config_dir))}")
    return None


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def unknown_key(key: str, config_name: str, config_dir: Path) -> str:
    """Return the sentence for an unknown key: its new name, else settings of similar names."""
    known = sorted(_settings(key, config_name, config_dir))
    for old, new in RENAMED.items():
        if f"{key}.".startswith(f"{old}.") and any(f"{name}.".startswith(f"{new}.") for name in known):
            return f"The setting {key!r} is called {new + key[len(old) :]!r} now."
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    near = near or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}."
    return f"There is no setting {key!r}: {hint}"


def _settings(wrong: str, config_name: str, config_dir: Path) -> set[str]:
    """Return all settings and groups of the configuration that the other overrides compose."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    overrides = [
        o for o in sys.argv[1:] if "=" in o and not o.startswith("-") and o.lstrip("+").split("=")[0] != wrong
    ]
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        try:
            config = compose(config_name, overrides)
        except HydraException:  # a second mistake, which has its own sentence later
            config = compose(config_name)
    return groups(config_dir) | set(_leaves(config, ""))


def _leaves(config, prefix: str) -> Iterator[str]:
    """Yield the dotted names of all settings, without Hydra's own."""
    from omegaconf import DictConfig

    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing()):
            yield from _leaves(node, f"{prefix}{key}.")
        elif not str(key).startswith("_"):
            yield f"{prefix}{key}"


def require_all(config) -> None:
    """Raise UserError for mandatory settings (`???`) not given, and for a `${...}` that refers to nothing."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = sorted(OmegaConf.missing_keys(config))
    except OmegaConfBaseException as error:
        raise UserError(f"Cannot read the setting {error.full_key}: {first_line(error)}.") from error
    if missing:
        raise UserError(f"Please say which: {' '.join(f'{key}=...' for key in missing)}")


def check_divided(config) -> None:
    """Raise UserError with the new name for a value of a setting that is several settings now."""
    from omegaconf import OmegaConf

    for old, new in DIVIDED.items():
        value = OmegaConf.select(config, old)
        if value is not None and not OmegaConf.is_config(value):
            raise UserError(f"The setting {old!r} is called {new!r} now: write {new}={value}.")
