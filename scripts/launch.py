"""Run the `main(config)` of a script under Hydra.

    if __name__ == "__main__":
        launch(main, "generate", GenerateSettings)

Free text arrives as typed (quoting.py), every value is checked against its declaration (settings.py), a mistake is
answered by one sentence and exit code 2, and `device=`, `profile=` and the compilation cache are set before JAX starts.
Hydra, pydantic and JAX are imported late: a typo is reported before JAX has started.
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
from hydra_run import groups, label, overrides, record_failure, run_dir, sweeping
from quoting import quote_overrides
from settings import CONF, check, check_presence, user_error

from rag.runtime.compilation_cache import enable_compilation_cache
from rag.runtime.options import type_error
from rag.types import UserError

# Old names of settings and their new ones; a name also covers the settings below it. The first match counts.
RENAMED = {
    "reading": "ablation",
    "certificate": "sensitivity",
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
# Imports and programs make hundreds of thousands of objects that stay. With Python's default of 700 new objects between
# two collections, and 10 young collections before an older one, half a second of every start was garbage collection.
_COLLECT_EVERY = (50_000, 50)
_DEVICES = {"auto": None, "cpu": "cpu", "gpu": "cuda,cpu"}  # device -> JAX_PLATFORMS


def launch(main: Callable, config_name: str, schema: type, *, config_dir: Path = CONF) -> typing.NoReturn:
    """Run `main(config)` with conf/<config_name>.yaml and the command line's overrides, then exit.

    Exit codes: 0; 2 for a mistake that the user can correct (one sentence on stderr); 130 after Ctrl-C; 141 when the
    reader of stdout has closed it. Any other exception is a bug: it keeps its traceback, and the exit code is 1.

    Args:
        main: The script's job.
        config_name: The configuration's name, without .yaml.
        schema: The dataclass that declares its settings.
        config_dir: The folder of the configuration.
    """
    gc.set_threshold(*_COLLECT_EVERY)
    process.prepare_ctrl_c()
    try:
        code = _exit_code(main, config_name, schema, config_dir)
        process.end_ctrl_c()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        code = 130
    except MemoryError:  # while another error was being explained
        process.leave(b"Not enough memory: use a smaller model or batch, or allow more (`ulimit -v`).\n", 2)
    except process.StdoutLost as lost:
        process.end_ctrl_c()
        code = process.report_lost_stdout(lost)
    sys.exit(code)


class _Raised(BaseException):
    """Carry main's exception through Hydra, which would report an Exception in its own way."""


def _exit_code(main: Callable, config_name: str, schema: type, config_dir: Path) -> int:
    """Run the script and return its exit code. Raises KeyboardInterrupt, StdoutLost, and what is a bug."""
    failures: list[BaseException] = []  # of jobs of a sweep, whose other jobs still run

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
            record_failure(run_dir(), label(), overrides(), error, _sentence(error))

    def leave_out(settings: Sequence[str], folder: Path, error: Exception) -> None:
        failures.append(UserError(_explain(error, config_name, config_dir)))
        record_failure(folder, " ".join(settings), settings, error, str(failures[-1]))

    try:
        process.allow_open_files()
        process.prepare_streams()
        process.check_current_folder()
        _run_hydra(functools.wraps(main)(task), config_name, config_dir, leave_out)
        code = 0
        if failures:
            print(f"{len(failures)} of the sweep's jobs failed; each has said why above.", file=sys.stderr)
            code = 2 if all(_sentence(error) for error in failures) else 1
    except _Raised as raised:
        code = _report(raised.__cause__, _sentence(raised.__cause__))
    except Exception as error:
        if process.interrupted():
            raise KeyboardInterrupt from error
        code = _report(error, _explain(error, config_name, config_dir))
    sys.stdout.flush()
    if process.interrupted():  # a library may have swallowed the exception
        raise KeyboardInterrupt
    return code


def _sentence(error: BaseException) -> str | None:
    """Return the sentence for an error that the user can correct, ours or the system's; None for a bug."""
    return process.out_of_files(error) or user_error(error) or process.system_error(error)


def _report(error: BaseException, sentence: str | None) -> int:
    """Print the sentence and return exit code 2; without one the error is a bug, which is raised again."""
    if sentence is None:
        raise error from error.__cause__
    sys.stdout.flush()
    print(" ".join(sentence.split()), file=sys.stderr)
    return 2


def _run_hydra(task: Callable, config_name: str, config_dir: Path, leave_out: Callable) -> None:
    import hydra
    from hydra.core.plugins import Plugins

    # Hydra finds and imports the modules of hydra_plugins/ by itself.
    sweeper = Plugins.instance().class_name_to_class["hydra_plugins.patient_sweeper.PatientSweeper"]
    sweeper.leave_out = staticmethod(leave_out)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises exceptions instead of printing them: we explain them
    os.environ["RAG_RUN"] = uuid.uuid4().hex[:8]  # part of the output folder's name: conf/shared.yaml
    sys.argv[1:] = quote_overrides(sys.argv[1:], config_dir=config_dir)
    hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)(task)()


# --- one sentence for each mistake that the user can correct


def _explain(error: Exception, config_name: str, config_dir: Path) -> str | None:
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
            choices = sorted(path.stem for path in (config_dir / group).glob("*.yaml"))
            return type_error(group, value, f"one of {', '.join(choices)}")
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _unknown_key(key: str, config_name: str, config_dir: Path) -> str:
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


def _require_all(config) -> None:
    """Raise UserError for mandatory settings (`???`) not given, and for a `${...}` that refers to nothing."""
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
    """Set the device before JAX starts. Raises UserError where JAX finds no such device."""
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
    """Record a JAX trace of the run into its folder, if wanted, and print its path."""
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
