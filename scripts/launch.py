"""What every script shares: `launch(main, "name")` runs `main(config)` under Hydra, as a person expects it.

    if __name__ == "__main__":
        launch(main, "generate")

Free text arrives as typed, a wrong setting is one sentence and exit code 2, and `device=`, `profile=` and the
compilation cache are in place before JAX starts. Hydra and JAX are imported late: a typo costs no JAX start.
"""

import contextlib
import difflib
import functools
import gc
import inspect
import os
import re
import signal
import sys
import types
import typing
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from this_run import label, overrides, record_failure, run_dir, sweeping

from rag.cache import enable_compilation_cache
from rag.types import UserError

CONF = Path(__file__).resolve().parent.parent / "conf"

# Settings whose value is a person's text; a leading dot means the last word of any dotted key.
FREE_TEXT = (
    "question",
    "runs",
    "baseline",
    "output",
    ".path",
    ".url",
    ".model",
    ".uri",
    ".weights",
    ".system",
    ".user",
    ".passage",
    ".separator",
    ".query_prompt",
    ".document_prompt",
    ".abstain_answer",
)
# Imports and programs leave hundreds of thousands of objects that stay. With Python's own 700 between two looks for
# cycles, and 10 looks at the youngest before one at older ones, half a second of every start went into looking.
_COLLECT_EVERY = (50_000, 50)
_DEVICES = {"auto": None, "cpu": "cpu", "gpu": "cuda,cpu"}  # what JAX_PLATFORMS calls them


def launch(
    main: Callable, config_name: str, *, config_dir: Path = CONF, free_text: Sequence[str] = FREE_TEXT
) -> typing.NoReturn:
    """Run `main(config)` with conf/<config_name>.yaml and the command line's overrides, then exit.

    Exit codes: 0; 2 for what a person can put right (one sentence on stderr); 130 after Ctrl-C; 141 when the
    reader of stdout went away. Any other exception is a bug of ours: it keeps its traceback and exits with 1.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored, as by nohup
        signal.signal(signal.SIGINT, _ctrl_c)
    gc.set_threshold(*_COLLECT_EVERY)
    sys.exit(_exit_code(main, config_name, config_dir, free_text))


class _Raised(BaseException):
    """Carries main's exception out through Hydra, which would report an Exception in its own way."""


def _exit_code(main: Callable, config_name: str, config_dir: Path, free_text: Sequence[str]) -> int:
    failures: list[BaseException] = []  # of a sweep's jobs: the others run all the same

    def task(config) -> None:
        try:
            _require_all(config)
            _choose_device(config.device)
            enable_compilation_cache()
            with _profile(config.profile):
                main(config)
        except BrokenPipeError as error:
            raise _Raised from error
        except Exception as error:
            if not sweeping():
                raise _Raised from error
            failures.append(error)
            record_failure(run_dir(), label(), overrides(), error, _user_error(error))

    def left_out(settings: Sequence[str], folder: Path, error: Exception) -> None:
        failures.append(UserError(_explain(error, config_name, config_dir)))
        record_failure(folder, " ".join(settings), settings, error, str(failures[-1]))

    try:
        _run_hydra(functools.wraps(main)(task), config_name, config_dir, free_text, left_out)
        sys.stdout.flush()
        if failures:
            print(f"{len(failures)} of the sweep's jobs failed; each has said why above.", file=sys.stderr)
            return 2 if all(_user_error(error) for error in failures) else 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _reader_gone()
    except _Raised as raised:
        if isinstance(raised.__cause__, BrokenPipeError):
            return _reader_gone()
        return _tell(raised.__cause__, _user_error(raised.__cause__))
    except Exception as error:
        return _tell(error, _explain(error, config_name, config_dir))
    return 0


def _ctrl_c(number: int, frame: types.FrameType | None) -> None:
    """KeyboardInterrupt, except during an import, where extensions swallow it or crash: there, leave at once."""
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"\nInterrupted.\n")
            os._exit(130)
        caller = caller.f_back
    signal.default_int_handler(number, frame)


def _tell(error: BaseException, sentence: str | None) -> int:
    """Print the sentence and return its exit code; without one the error is a bug, and goes on its way."""
    if sentence is None:
        raise error from error.__cause__
    print(" ".join(sentence.split()), file=sys.stderr)
    return 2


def _reader_gone() -> int:
    """Point stdout at nothing, since the interpreter flushes it once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141  # 128 + SIGPIPE, as a shell reports it


def _run_hydra(
    task: Callable, config_name: str, config_dir: Path, free_text: Sequence[str], left_out: Callable
) -> None:
    import hydra
    from hydra.core.plugins import Plugins

    # Hydra finds what is in hydra_plugins/ by itself, and imports it in its own way.
    sweeper = Plugins.instance().class_name_to_class["hydra_plugins.patient_sweeper.PatientSweeper"]
    sweeper.left_out = staticmethod(left_out)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions out: we tell them better
    os.environ["RAG_RUN"] = uuid.uuid4().hex[:8]  # part of the output folder's name: conf/shared.yaml
    sys.argv[1:] = quote_overrides(sys.argv[1:], free_text)
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


def quote_overrides(arguments: Sequence[str], free_text: Sequence[str] = FREE_TEXT) -> list[str]:
    """Quote the values of free-text keys in a command line; everything else stays as it is.

    In a sweep, `path=choice(a,b)` keeps Hydra's meaning; a plain comma is part of the text.
    """
    sweep = "-m" in arguments or "--multirun" in arguments
    keys = "|".join((r"[\w./-]+" if key.startswith(".") else "") + re.escape(key) for key in free_text)
    override = re.compile(rf"(\+{{0,2}}(?:{keys})=)(.*)", re.S)

    def quoted(argument: str) -> str:
        match = override.fullmatch(argument)
        if match is None or (sweep and re.fullmatch(r"choice\(.*\)", match[2], re.S)):
            return argument
        return match[1] + quote(match[2])

    return [quoted(argument) for argument in arguments]


# --- one sentence for what a person can put right


def _explain(error: Exception, config_name: str, config_dir: Path) -> str | None:
    """The sentence for an error raised before main began, or None for one that is no person's doing."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if (sentence := _user_error(error)) is not None:
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
        case OSError(filename=str(name)):
            return f"Cannot make {name} ({error.strerror}): choose the run's folder with hydra.run.dir=DIR."
    return None


def _user_error(error: BaseException | None) -> str | None:
    """The sentence of the UserError that was raised, or that caused what was raised."""
    while error is not None:
        if isinstance(error, UserError):
            return str(error)
        error = error.__cause__
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _unknown_key(key: str, config_name: str, config_dir: Path) -> str:
    """Name the key and the settings that look like it, of the configuration as it is without that key."""
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
    groups = {path.parent.relative_to(config_dir).as_posix() for path in config_dir.glob("*/**/*.yaml")}
    return groups | set(_leaves(config, ""))


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


# --- from a configuration to objects


def build(config, **arguments: object):
    """Make what `_target_` names, and all inside it, from plain Python values and the given `arguments`.

    Raises UserError naming the setting that the target does not have, or whose value is of the wrong type.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    check(config)
    try:
        # The arguments stay out of instantiate: it would copy them, and take dataclasses for configurations.
        make = instantiate(config, _convert_="all", _partial_=True)
    except InstantiationException as error:  # of something inside
        if (sentence := _user_error(error)) is None:
            raise
        raise UserError(sentence) from error
    return make(**arguments)


def check(config) -> None:
    """Compare settings with the parameters of their target, and with the plain types that these declare.

    YAML and Hydra leave both open. Raises UserError for the first that does not fit.
    """
    from hydra.utils import get_object
    from omegaconf import DictConfig, OmegaConf

    if not isinstance(config, DictConfig):
        return
    settings = {key: config[key] for key in config if not OmegaConf.is_missing(config, key)}
    for value in settings.values():
        check(value)
    if "_target_" not in config:
        return
    target = get_object(config._target_)
    parameters = inspect.signature(target, eval_str=True).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in settings.items():
        name = config._get_full_key(key)
        if key in parameters:
            if wanted := _mismatch(name, value, parameters[key].annotation):
                raise UserError(f"{name}={value} will not do: it must be {wanted}.")
        elif not key.startswith("_") and not open_ended:
            raise UserError(f"There is no setting {name!r}: {config._target_} takes {', '.join(parameters)}.")


def _mismatch(name: str, value: object, hint: object) -> str:
    """What `hint` asks of the setting `name`; "" if `value` is that, or if `hint` is no type of plain values."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        wanted = [_mismatch(name, value, kind) for kind in arguments]
        return "" if "" in wanted else " or ".join(sorted(wanted))
    if origin is typing.Literal:
        return "" if value in arguments else " or ".join(map(str, arguments))
    if origin in (list, tuple, Sequence):
        return _list_mismatch(name, value, [kind for kind in arguments if kind is not ...])
    if origin is float:
        return "" if type(value) in (float, int) else "float or int"
    if origin in (int, bool, str, type(None)):
        return "" if type(value) is origin else "null" if origin is type(None) else origin.__name__
    return ""


def _list_mismatch(name: str, value: object, kinds: Sequence[object]) -> str:
    """As _mismatch, for a list whose elements are each of one of `kinds`, or of any kind if there is none."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        wrong = [[_mismatch(name, item, kind) for kind in kinds] for item in value]
        if all(not wanted or "" in wanted for wanted in wrong):
            return ""
    example = "[10,100]" if int in kinds else "[0.1,0.9]" if float in kinds else "[a,b]"
    return f"a list, as in {name}={example}"


# --- device and profile


def _choose_device(device: str) -> None:
    """Tell JAX before it starts which device to use. Raises UserError for an unknown or missing one."""
    if device not in _DEVICES:
        raise UserError(f"There is no device {device!r}: choose one of {', '.join(_DEVICES)}.")
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
def _profile(wanted: object) -> Iterator[None]:
    """Record a JAX trace of the run into its folder, if wanted, and say where. Raises UserError for no bool."""
    if not isinstance(wanted, bool):  # yes and no are text to Hydra, and any text would count as true
        raise UserError(f"profile={wanted} will not do: it must be true or false.")
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
