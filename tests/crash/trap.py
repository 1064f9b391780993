"""Fork processes whose file system calls are counted or recorded, or fail or kill the process (trap.c).

A forked process can only import JAX, not use it, so the functions that run here compute with numpy alone.
"""

import ctypes
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Kind = Literal["create", "write", "truncate", "fsync", "rename", "link", "unlink", "mkdir"]
_KINDS: tuple[Kind, ...] = ("create", "write", "truncate", "fsync", "rename", "link", "unlink", "mkdir")
_NOTE = len(_KINDS) + 1
_HEAD = struct.Struct("<4I2Q")
_HANGS_S = 60  # a process that takes longer counts as a hang


class Unavailable(Exception):
    """This machine cannot trap system calls. The message says why."""


@dataclass(frozen=True, slots=True)
class Event:
    """A call that changed a file or folder, as trap.c recorded it."""

    kind: Kind
    path: str
    other: str  # where rename and link put it
    inode: int
    offset: int  # of a write, or the length to which a file is truncated
    data: bytes
    site: str  # of an fsync: the lines of the project that called it, the innermost first


@dataclass(frozen=True, slots=True)
class Ended:
    """How a forked process ended: with a result, an exception, or a signal."""

    result: Any = None
    error: BaseException | None = None
    text: str = ""  # the traceback of `error`
    signal: int = 0

    @property
    def hung(self) -> bool:
        return self.signal == signal.SIGALRM


@cache
def library() -> ctypes.CDLL:
    """Compile trap.c for this process and load it. Raises Unavailable without a compiler, or on another system."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("there is no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "trap.so")
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", built, Path(__file__).with_name("trap.c")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"{compiler} does not compile trap.c: {done.stderr.strip()[:300]}")
        loaded = ctypes.CDLL(str(built))
    loaded.crash_start.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_long]
    loaded.crash_calls.restype = ctypes.c_long
    return loaded


def forked(run: Callable[[], Any]) -> Ended:
    """Run a function in a forked process; its result and its exception must be picklable."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        signal.alarm(_HANGS_S)
        try:
            ended = Ended(run())
        except BaseException as error:
            ended = Ended(error=_picklable(error), text=traceback.format_exc())
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(ended, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(process, 0)
    return Ended(signal=os.WTERMSIG(status)) if os.WIFSIGNALED(status) else pickle.loads(sent)


def _picklable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # the constructor of an exception may need other arguments
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def trapped(
    run: Callable[[], Any],
    root: Path,
    *,
    die_at: int = 0,
    torn: bool = False,
    full_at: int = 0,
    log: int = -1,
) -> Ended:
    """Run a function in a forked process with its calls below `root` trapped.

    Args:
        run: the function.
        root: the folder whose calls are trapped.
        die_at: the process is killed at this call, counted from 1; 0: never.
        torn: half of the bytes of that call are written before.
        full_at: from this call on the disk is full; 0: never.
        log: the descriptor of an open file for records of the calls; -1: none.

    Returns:
        The end of the process, with the result of `run` and the number of calls.
    """
    loaded, folder = library(), os.fsencode(root.resolve())

    def traps() -> tuple[Any, int]:
        if log >= 0:
            os.fsync = _noting(loaded, os.fsync)
        if refused := loaded.crash_start(folder, log, die_at, torn, full_at):
            raise Unavailable(f"the kernel refuses a seccomp filter: {os.strerror(refused)}")
        return run(), loaded.crash_calls()

    ended = forked(traps)
    if isinstance(ended.error, Unavailable):
        raise ended.error
    return ended


def _noting(loaded: ctypes.CDLL, fsync: Callable[[int], None]) -> Callable[[int], None]:
    """Return an os.fsync that writes to the log which lines of the project called it."""

    def noted(descriptor: int) -> None:
        loaded.crash_note(_site().encode())
        fsync(descriptor)

    return noted


def _site() -> str:
    lines, frame = [], sys._getframe(2)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if "rag" in file.parts[-3:-1] and frame.f_code.co_name != "_sync":
            lines.append(f"{file.name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(lines[:2])


def recorded(run: Callable[[], Any], root: Path) -> list[Event]:
    """Return the calls of `run` that changed something below `root`, in their order. `run` must succeed."""
    with tempfile.TemporaryFile() as log:
        ended = trapped(run, root, log=log.fileno())
        if ended.result is None:
            raise RuntimeError(f"the writer failed (signal {ended.signal}): {ended.text}")
        log.seek(0)
        return _events(log.read())


def _events(log: bytes) -> list[Event]:
    events, at, site = [], 0, ""
    while at < len(log):
        kind, *lengths, inode, offset = _HEAD.unpack_from(log, at)
        at += _HEAD.size
        parts = []
        for length in lengths:
            parts.append(log[at : at + length])
            at += length
        if kind == _NOTE:
            site = parts[0].decode()
            continue
        path, other = map(os.fsdecode, parts[:2])
        name = _KINDS[kind - 1]
        events.append(Event(name, path, other, inode, offset, parts[2], site if name == "fsync" else ""))
    return events
