"""Run the `main(config)` of a script under Hydra.

    if __name__ == "__main__":
        launch(main, "generate", GenerateSettings)

Free text arrives as typed (quoting.py), every value is checked against its declaration (settings.py), a mistake is
answered by one sentence and exit code 2, and `device=`, `profile=` and the compilation cache are set before JAX starts.
Hydra, pydantic and JAX are imported late: a typo is reported before JAX has started.
"""

import contextlib
import functools
import gc
import os
import sys
import typing
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import own_stages
import process
from explain import check_divided, explain, first_line, require_all
from hydra_run import label, overrides, record_failure, run_dir, sweeping
from quoting import quote_overrides
from settings import CONF, check, check_presence, user_error

from rag.runtime.cache.compilation_cache import enable_compilation_cache
from rag.types import UserError

# Imports and programs make hundreds of thousands of objects that stay. With Python's default of 700 new objects between
# two collections, and 10 young collections before an older one, half a second of every start was garbage collection.
_COLLECT_EVERY = (50_000, 50)
_SWEEP = ("-m", "--multirun")
_DEVICES = {"auto": None, "cpu": "cpu", "gpu": "cuda,cpu"}  # device -> JAX_PLATFORMS


def launch(
    main: Callable,
    config_name: str,
    schema: type,
    *,
    config_dir: Path = CONF,
    after_sweep: Callable[[Path], None] = lambda folder: None,
) -> typing.NoReturn:
    """Run `main(config)` with conf/<config_name>.yaml and the command line's overrides, then exit.

    Exit codes: 0; 2 for a mistake that the user can correct (one sentence on stderr); 130 after Ctrl-C; 141 when the
    reader of stdout has closed it. Any other exception is a bug: it keeps its traceback, and the exit code is 1.

    Args:
        main: The script's job.
        config_name: The configuration's name, without .yaml.
        schema: The dataclass that declares its settings.
        config_dir: The folder of the configuration.
        after_sweep: Called with the folder of a sweep when its jobs are done.
    """
    gc.set_threshold(*_COLLECT_EVERY)
    process.prepare_ctrl_c()
    try:
        code = _exit_code(main, config_name, schema, config_dir, after_sweep)
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


def _exit_code(
    main: Callable, config_name: str, schema: type, config_dir: Path, after_sweep: Callable[[Path], None]
) -> int:
    """Run the script and return its exit code. Raises KeyboardInterrupt, StdoutLost, and what is a bug."""
    failures: list[BaseException] = []  # of jobs of a sweep, whose other jobs still run

    def task(config) -> None:
        try:
            check_presence(config, schema)
            require_all(config)
            check_divided(config)
            check(config, schema)
            _choose_device(config.device)
            enable_compilation_cache()
            with _profile(config.profile):
                main(config)
        except (Exception, SystemExit) as raised:
            ended = isinstance(raised, SystemExit)  # by a module of the user's own
            error = UserError(own_stages.exit_sentence(raised)) if ended else raised
            if process.interrupted():
                raise KeyboardInterrupt from error
            if not sweeping():
                raise _Raised from error
            failures.append(error)
            record_failure(run_dir(), label(), overrides(), error, _sentence(error))

    def leave_out(settings: Sequence[str], folder: Path, error: Exception) -> None:
        failures.append(UserError(explain(error, config_name, config_dir)))
        record_failure(folder, " ".join(settings), settings, error, str(failures[-1]))

    try:
        process.allow_open_files()
        process.prepare_streams()
        process.check_current_folder()
        stages = own_stages.folder_in(sys.argv[1:], config_dir)
        own_stages.import_from(stages)  # here too, so that an error before the job names the user's choices
        _run_hydra(functools.wraps(main)(task), config_name, config_dir, stages, leave_out, after_sweep)
        code = 0
        if failures:
            print(f"{len(failures)} of the sweep's jobs failed; each has said why above.", file=sys.stderr)
            code = 2 if all(_sentence(error) for error in failures) else 1
    except _Raised as raised:
        code = _report(raised.__cause__, _sentence(raised.__cause__))
    except Exception as error:
        if process.interrupted():
            raise KeyboardInterrupt from error
        code = _report(error, explain(error, config_name, config_dir))
    sys.stdout.flush()
    if process.interrupted():  # a library may have swallowed the exception
        raise KeyboardInterrupt
    return code


def _sentence(error: BaseException) -> str | None:
    """Return the sentence for an error that the user can correct, ours or the system's; None for a bug."""
    known = process.out_of_files(error) or user_error(error) or process.system_error(error)
    return known or own_stages.missing_attribute(error)


def _report(error: BaseException, sentence: str | None) -> int:
    """Print the sentence and return exit code 2; without one the error is a bug, which is raised again."""
    if sentence is None:
        raise error from error.__cause__
    sys.stdout.flush()
    print(" ".join(sentence.split()), file=sys.stderr)
    return 2


def _run_hydra(
    task: Callable,
    config_name: str,
    config_dir: Path,
    stages: Path | None,
    leave_out: Callable,
    after_sweep: Callable,
) -> None:
    import hydra
    from hydra.core.plugins import Plugins

    # Hydra finds and imports the modules of hydra_plugins/ by itself.
    plugins = Plugins.instance().class_name_to_class
    sweeper = plugins["hydra_plugins.patient_sweeper.PatientSweeper"]
    sweeper.leave_out, sweeper.after_sweep = staticmethod(leave_out), staticmethod(after_sweep)
    plugins["hydra_plugins.own_stages_path.OwnStagesPath"].folder = stages
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises exceptions instead of printing them: we explain them
    os.environ["RAG_RUN"] = uuid.uuid4().hex[:8]  # part of the output folder's name: conf/shared.yaml
    arguments = quote_overrides(sys.argv[1:], config_dir=config_dir)
    sys.argv[1:] = sorted(arguments, key=lambda text: text not in _SWEEP)  # Hydra refuses it between settings
    hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)(task)()


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
        raise UserError(f"device={device}, but JAX cannot start it: {first_line(error)}.") from error
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
