"""Handle what the system gives to a process or refuses: streams, signals, memory, open files, disk space, folders.

scripts/launch.py uses this for every script, so that such an error is one sentence, or the usual exit code of a signal.
"""

import contextlib
import errno
import io
import os
import resource
import signal
import sys
import types
from typing import NoReturn, TextIO

from rag.types import UserError

_INTERRUPTED = b"\nInterrupted.\n"
_OPEN_FILES = 65_536  # the limit that we ask for
_MEMORY = (
    *("resource_exhausted", "bad_alloc", "cannot allocate memory", "out of memory"),
    *("failed to map segment", "can't start new thread"),
)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO)


# --- streams


class StdoutLost(BaseException):
    """Stdout cannot be written to. It is no Exception, so that no handler between a print and launch catches it."""


class _Stdout(io.FileIO):
    """The file descriptor of stdout, which raises StdoutLost where it cannot be written to."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            raise StdoutLost from error


class _Stderr(io.FileIO):
    """The file descriptor of stderr, which drops what cannot be written."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Make stdout, stderr and stdin safe to use. Raises UserError where stdout is closed.

    A character that an encoding does not have is written as an escape; undecodable bytes are read as U+FFFD. A closed
    descriptor is opened on /dev/null, since the next file to be opened would otherwise get its number, and with it what
    libraries print. `sys.stdin` stays None where it is closed. Streams that replace the process's own stay as they are.
    """
    closed = sys.__stdout__ is None
    for descriptor in range(3):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(_Stderr(2, "w", closefd=False), sys.__stderr__)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _stream(_Stdout(1, "w", closefd=False), sys.__stdout__)
    if sys.stdin is not None and sys.stdin is sys.__stdin__:
        sys.stdin.reconfigure(errors="replace")
    if closed:
        raise UserError("Stdout is closed, so the result has nowhere to go: give a file, or /dev/null.")


def _stream(raw: io.FileIO, before: TextIO | None) -> TextIO:
    """Return a text stream in the encoding of the one before, or in UTF-8 where there was none.

    It is line-buffered also into a pipe or a file, where lines of stdout and stderr would else be out of order.
    """
    encoding = "utf-8" if before is None else before.encoding
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)


def report_lost_stdout(lost: StdoutLost) -> int:
    """Print on stderr that stdout is lost, unless its reader closed it, and return the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more at the end
    if isinstance(lost.__cause__, BrokenPipeError):
        return 141  # 128 + SIGPIPE, as a shell reports it
    reason = lost.__cause__.strerror
    print(f"Cannot write to stdout ({reason}): at least a part of the output is lost.", file=sys.stderr)
    return 2


def check_current_folder() -> None:
    """Raise UserError where the current folder was deleted or cannot be entered."""
    try:
        os.getcwd()
    except OSError as error:
        os.chdir("/")  # imports look into the current folder, and fail in a way of their own
        raise UserError(
            f"The current folder is gone ({error.strerror}): change to one that is there."
        ) from error


# --- Ctrl-C

_pressed = False  # since the script began


def prepare_ctrl_c() -> None:
    """Let the first Ctrl-C raise KeyboardInterrupt and the second end the process, unless SIGINT is ignored (nohup)."""
    global _pressed
    _pressed = False
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):
        signal.signal(signal.SIGINT, _ctrl_c)
        sys.unraisablehook = _unraisable


def end_ctrl_c() -> None:
    """Let Ctrl-C end the process at once, since only the interpreter and libraries still have to shut down."""
    if signal.getsignal(signal.SIGINT) is _ctrl_c:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted() -> bool:
    """Return whether there was a Ctrl-C; a later error is its consequence, since libraries convert it."""
    return _pressed


def _ctrl_c(number: int, frame: types.FrameType | None) -> None:
    """Raise KeyboardInterrupt, but exit at once during an import, where extensions swallow it or crash."""
    global _pressed
    _pressed = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename == "<frozen importlib._bootstrap>":
            leave(_INTERRUPTED, 130)
        caller = caller.f_back
    signal.default_int_handler(number, frame)


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Exit on a KeyboardInterrupt in a callback or a finalizer, where Python would print it and continue."""
    if unraisable.exc_type is KeyboardInterrupt:
        leave(_INTERRUPTED, 130)
    sys.__unraisablehook__(unraisable)


def leave(sentence: bytes, code: int) -> NoReturn:
    """End the process at once with a sentence on stderr, without any clean-up."""
    with contextlib.suppress(OSError):
        os.write(2, sentence)
    os._exit(code)


# --- errors of the system


def allow_open_files() -> None:
    """Raise the limit of open files as far as allowed: each memory-mapped array counts, and a model has hundreds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some systems have a limit of their own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def out_of_files(error: BaseException | None) -> str | None:
    """Return the sentence for an error whose cause is too many open files; None for another error."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        cause = str(error).lower() if isinstance(error, ImportError | RuntimeError) else ""
        if code in (errno.EMFILE, errno.ENFILE) or "too many open files" in cause:
            return f"Too many open files: this process may have {most}. Allow more with `ulimit -n`."
        error = error.__cause__ or error.__context__
    return None


def system_error(error: BaseException | None) -> str | None:
    """Return the sentence for an error of the system, or one caused by it; None where it may be a bug of ours."""
    if sentence := out_of_files(error):
        return sentence
    while error is not None:
        if sentence := _sentence(error):
            return sentence
        error = error.__cause__  # not __context__: an error that was being handled does not explain a bug
    return None


def _sentence(error: BaseException) -> str | None:
    code = error.errno if isinstance(error, OSError) else None
    cause = str(error).lower() if isinstance(error, ImportError | RuntimeError) else ""
    where = f" {error.filename}" if code and error.filename else ""
    if code == errno.ENOMEM or isinstance(error, MemoryError) or any(words in cause for words in _MEMORY):
        reason = " ".join(str(error).split())[:200] or "no reason given"
        return f"Not enough memory ({reason}): use a smaller model or batch, or allow more (`ulimit -v`)."
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"Cannot write{where} ({error.strerror}): make room, or choose another place."
    if code in _REFUSED:
        return f"Cannot use{where or ' a file'} ({error.strerror}): correct that, or choose another place."
    if "determine home directory" in cause:
        return "There is no home folder for `~`: set HOME, or write the path in full."
    return None
