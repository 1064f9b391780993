"""What every script shares: `launch(main, "name", Settings)` runs `main(config)` under Hydra, as a person expects it.

    if __name__ == "__main__":
        launch(main, "generate", Settings)

Free text arrives as typed, every value is checked against its declaration (settings.py), a wrong one is one sentence
and exit code 2, and `device=`, `profile=` and the compilation cache are in place before JAX starts. Hydra, pydantic
and JAX are imported late: a typo costs no JAX start.
"""

import contextlib
import difflib
import functools
import gc
import os
import re
import sys
import typing
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import process
from settings import CONF, check, check_presence, user_error
from this_run import groups, label, overrides, record_failure, run_dir, sweeping

from rag.runtime.compilation_cache import enable_compilation_cache
from rag.runtime.options import type_error
from rag.types import UserError

# Settings whose value is a person's text; a leading dot means the last word of any dotted key.
FREE_TEXT = (
    *("question", "runs", "baseline", "output", "keep"),
    *(".path", ".url", ".model", ".uri"),
    *("generator.weights", "bench.weights", "bench.reading.weights"),
)
# Texts and lists of texts that are written in YAML with \n for a line break, and so on a command line, where shells
# leave the backslash: \n, \t and \r are what they are in YAML, \\ is a backslash, and any other backslash stays.
TEMPLATES = (
    *(".system", ".user", ".passage", ".separator", ".abstain_answer"),
    *(".query_prompt", ".document_prompt", ".finished", "reranker.prompt"),
)
TEXT_LISTS = (".stop", ".separators")
# Settings whose names were changed, and what they are called now; a name stands for the settings below it too.
RENAMED = {
    "reading": "ablation",
    "certificate": "sensitivity",
    "generator.drafting": "generator.speculative",
    "bench.drafting": "bench.speculative",
    "embedder.relevant_from": "embedder.score_threshold",
}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
# Imports and programs leave hundreds of thousands of objects that stay. With Python's own 700 between two looks for
# cycles, and 10 looks at the youngest before one at older ones, half a second of every start went into looking.
_COLLECT_EVERY = (50_000, 50)
_DEVICES = {"auto": None, "cpu": "cpu", "gpu": "cuda,cpu"}  # what JAX_PLATFORMS calls them


def launch(main: Callable, config_name: str, schema: type, *, config_dir: Path = CONF) -> typing.NoReturn:
    """Run `main(config)` with conf/<config_name>.yaml and the command line's overrides, then exit.

    `schema`, a dataclass, declares what that file holds.

    Exit codes: 0; 2 for what a person can put right (one sentence on stderr); 130 after Ctrl-C; 141 when the
    reader of stdout went away. Any other exception is a bug of ours: it keeps its traceback and exits with 1.
    """
    gc.set_threshold(*_COLLECT_EVERY)
    process.prepare_ctrl_c()
    try:
        code = _exit_code(main, config_name, schema, config_dir)
        process.end_ctrl_c()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        code = 130
    except MemoryError:  # while another error was being told
        process.leave(b"Not enough memory: use a smaller model or batch, or allow more (`ulimit -v`).\n", 2)
    except process.StdoutLost as lost:
        process.end_ctrl_c()
        code = process.told_lost(lost)
    sys.exit(code)


class _Raised(BaseException):
    """Carries main's exception out through Hydra, which would report an Exception in its own way."""


def _exit_code(main: Callable, config_name: str, schema: type, config_dir: Path) -> int:
    """Do all of it. Raises KeyboardInterrupt, StdoutLost, and what is a bug."""
    failures: list[BaseException] = []  # of a sweep's jobs: the others run all the same

    def task(config) -> None:
        try:
            check_presence(config, schema)
            _require_all(config)
            check(config, schema)
            _choose_device(config.device)
            enable_compilation_cache()
            with _profile(config.profile):
                main(config)
        except Exception as error:
            if process.interrupted():
                raise KeyboardInterrupt from error
            if not sweeping():
                raise _Raised from error
            failures.append(error)
            record_failure(run_dir(), label(), overrides(), error, _told(error))

    def left_out(settings: Sequence[str], folder: Path, error: Exception) -> None:
        failures.append(UserError(_explain(error, config_name, config_dir)))
        record_failure(folder, " ".join(settings), settings, error, str(failures[-1]))

    try:
        process.allow_open_files()
        process.prepare_streams()
        process.check_current_folder()
        _run_hydra(functools.wraps(main)(task), config_name, config_dir, left_out)
        code = 0
        if failures:
            print(f"{len(failures)} of the sweep's jobs failed; each has said why above.", file=sys.stderr)
            code = 2 if all(_told(error) for error in failures) else 1
    except _Raised as raised:
        code = _tell(raised.__cause__, _told(raised.__cause__))
    except Exception as error:
        if process.interrupted():
            raise KeyboardInterrupt from error
        code = _tell(error, _explain(error, config_name, config_dir))
    sys.stdout.flush()
    if process.interrupted():  # and something on the way has dropped the exception
        raise KeyboardInterrupt
    return code


def _told(error: BaseException) -> str | None:
    """The sentence for what a person can put right, of our own or of the system; None for a bug."""
    return process.out_of_files(error) or user_error(error) or process.system_error(error)


def _tell(error: BaseException, sentence: str | None) -> int:
    """Print the sentence and return its exit code; without one the error is a bug, and goes on its way."""
    if sentence is None:
        raise error from error.__cause__
    sys.stdout.flush()
    print(" ".join(sentence.split()), file=sys.stderr)
    return 2


def _run_hydra(task: Callable, config_name: str, config_dir: Path, left_out: Callable) -> None:
    import hydra
    from hydra.core.plugins import Plugins

    # Hydra finds what is in hydra_plugins/ by itself, and imports it in its own way.
    sweeper = Plugins.instance().class_name_to_class["hydra_plugins.patient_sweeper.PatientSweeper"]
    sweeper.left_out = staticmethod(left_out)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions out: we tell them better
    os.environ["RAG_RUN"] = uuid.uuid4().hex[:8]  # part of the output folder's name: conf/shared.yaml
    sys.argv[1:] = quote_overrides(sys.argv[1:], config_dir=config_dir)
    hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)(task)()


# --- free text through Hydra's override grammar


def quote(text: str) -> str:
    """Spell any text as a Hydra override value that OmegaConf resolves to exactly that text.

    Two grammars lie in between. OmegaConf's sees interpolations: `${` and the backslashes right before it are
    escaped (its documentation: "Escaped interpolations"), and a lone "???", its mark of a missing value, goes
    through a resolver. Then come Hydra's quoted strings, which its own class writes.
    """
    from hydra.core.override_parser.types import Quote, QuotedString

    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text) if text != "???" else '${oc.select:_,"???"}'
    return QuotedString(literal, Quote.single).with_quotes()


def quote_overrides(
    arguments: Sequence[str], free_text: Sequence[str] = FREE_TEXT, config_dir: Path = CONF
) -> list[str]:
    """Spell a command line as Hydra reads it: free text in quotes, null for a group as an empty list of choices.

    `key=null` is null for every key but `question`. In a sweep, `path=choice(a,b)` keeps Hydra's meaning; a plain
    comma is part of the text.
    """
    sweep, chosen_from = "-m" in arguments or "--multirun" in arguments, groups(config_dir)

    def quoted(argument: str) -> str:
        match = re.fullmatch(r"(\+{0,2}([\w./-]+)(?:@[\w.]+)?=)(.*)", argument, re.S)
        if match is None:
            return argument
        start, key, value = match.groups()
        template = _is_one(key, TEMPLATES)
        if key in chosen_from:
            return start + re.sub(r"(?<![^,(])null(?![^,)])", "[]", value)
        if _is_one(key, TEXT_LISTS):
            return start + _unescaped_parts(value)
        if not template and not _is_one(key, free_text):
            return argument
        if (sweep and re.fullmatch(r"choice\(.*\)", value, re.S)) or (value == "null" and key != "question"):
            return argument
        return start + quote(_unescaped(value) if template else value)

    return [quoted(argument) for argument in arguments]


def _is_one(key: str, names: Sequence[str]) -> bool:
    return any(key.endswith(name) if name.startswith(".") else key == name for name in names)


def _unescaped(text: str, mark: str = "") -> str:
    """The text with its escapes resolved, that of the quotation mark it stood in among them."""
    return re.sub(r"\\(.)", lambda m: m[1] if m[1] == mark else _ESCAPES.get(m[1], m[0]), text, flags=re.S)


def _unescaped_parts(value: str) -> str:
    """A list, or a sweep over lists, with its texts as they were typed and their escapes resolved.

    Words without quotes that mean something to Hydra stay: null, numbers, and ${...} in place of the whole list.
    """
    if re.fullmatch(r"\$\{[^{}]*\}", value):
        return value

    def text(match: re.Match) -> str:
        mark = match[0][0]
        if mark in "\"'":
            return quote(_unescaped(match[0][1:-1], mark))
        literal = "\\" in match[0] or "${" in match[0] or match[0] == "???"
        return quote(_unescaped(match[0])) if literal else match[0]

    return re.sub(r"""(["'])(?:\\.|(?!\1|\\).)*\1|[^\s\[\](),"']+""", text, value, flags=re.S)


# --- one sentence for what a person can put right


def _explain(error: Exception, config_name: str, config_dir: Path) -> str | None:
    """The sentence for an error raised before main began, or None for one that is no person's doing."""
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
        case OverrideParseException():
            reason = error.message.splitlines()[0]
            return f"Cannot read the setting {error.override}: {reason}; write '\"...\"' around text."
        case HydraException(__cause__=ConfigAttributeError() | ConfigKeyError()):
            key = re.search(r"override '?([^'=\s]+)", str(error))
            return _unknown_key(key[1].lstrip("+"), config_name, config_dir) if key else str(error)
        case HydraException(__cause__=OmegaConfBaseException() as cause):
            return f"{_first_line(error)}: {_first_line(cause)}"
        case HydraException() | OmegaConfBaseException():
            return str(error)
        case RecursionError():
            return "A setting is nested too deep: Hydra cannot read it."
    return None


def _wrong_choice(config_dir: Path) -> str | None:
    """The sentence for a group that is given something else than the name of a choice, or a list of names."""
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
            choices = sorted(path.stem for path in (config_dir / group).glob("*.yaml"))
            return type_error(group, value, f"one of {', '.join(choices)}")
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _unknown_key(key: str, config_name: str, config_dir: Path) -> str:
    """Name the key and the settings that look like it, of the configuration as it is without that key."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return f"The setting {key!r} is called {new + key[len(old) :]!r} now."
    known = sorted(_settings(key, config_name, config_dir))
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    near = near or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}."
    return f"There is no setting {key!r}: {hint}"


def _settings(wrong: str, config_name: str, config_dir: Path) -> set[str]:
    """Every setting and group that the command line's other overrides leave to choose from."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    overrides = [
        o for o in sys.argv[1:] if "=" in o and not o.startswith("-") and o.lstrip("+").split("=")[0] != wrong
    ]
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        try:
            config = compose(config_name, overrides)
        except HydraException:  # a second mistake: it will have its own sentence
            config = compose(config_name)
    return groups(config_dir) | set(_leaves(config, ""))


def _leaves(config, prefix: str) -> Iterator[str]:
    """Dotted names of all settings, without Hydra's own."""
    from omegaconf import DictConfig

    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing()):
            yield from _leaves(node, f"{prefix}{key}.")
        elif not str(key).startswith("_"):
            yield f"{prefix}{key}"


def _require_all(config) -> None:
    """Raise UserError for mandatory settings (`???`) not given, and for a `${...}` that leads nowhere."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = sorted(OmegaConf.missing_keys(config))
    except OmegaConfBaseException as error:
        raise UserError(f"Cannot read the setting {error.full_key}: {_first_line(error)}.") from error
    if missing:
        raise UserError(f"Please say which: {' '.join(f'{key}=...' for key in missing)}")


# --- device and profile


def _choose_device(device: str) -> None:
    """Tell JAX before it starts which device to use. Raises UserError where it is not there."""
    if (platforms := _DEVICES[device]) is None:
        return
    import jax

    jax.config.update("jax_platforms", platforms)
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise UserError(f"device={device}, but JAX cannot start it: {_first_line(error)}.") from error
    if found != device:
        raise UserError(
            f"device={device}, but JAX runs on {found}: it finds no {device} here (for NVIDIA: pip install "
            "'jax[cuda13]'), or an earlier run of this process made it choose."
        )


@contextlib.contextmanager
def _profile(wanted: bool) -> Iterator[None]:
    """Record a JAX trace of the run into its folder, if wanted, and say where."""
    if not wanted:
        yield
        return
    import jax

    folder = run_dir() / "profile"
    try:
        with jax.profiler.trace(str(folder)):
            yield
    finally:
        print(f"JAX trace: {folder} (open it with xprof, TensorBoard or Perfetto)", file=sys.stderr)
