"""Build the C++ library at first use and load it: the only module here that reads, writes or runs anything.

The library takes seconds to build. It is cached under a key of its sources, the compiler, the flags and the processor.
Where it cannot be built or loaded XLA does its work, and a notice says why.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache as once
from importlib import metadata
from pathlib import Path

import jax

from rag.runtime import files
from rag.runtime.cache import entries
from rag.runtime.cache.folder import cache_root, notice, private_file, private_folder, write_errors
from rag.runtime.cache.keys import content_key
from rag.runtime.machine.hardware import cpu_flags
from rag.types import UserError

_ENTRY = Path(__file__).with_name("cpp") / "calls.cc"
_WANTED = os.environ.get("RAG_NATIVE") != "0"
# Cached results depend on these files and variables, besides Python code; rag.runtime.code.import_closure reads both.
RAG_SOURCES = ("cpp/*.h", "cpp/*.cc")
RAG_ENVIRONMENT = ("RAG_NATIVE",)
_TARGETS = {
    "rag_attention": "RagAttention",
    "rag_attention_backward": "RagAttentionBackward",
    "rag_decoder": "RagDecoder",
    "rag_linear": "RagLinear",
}
# Not -ffast-math: a library linked with it makes the whole process flush small numbers to zero.
_FLAGS = (
    *"-std=c++17 -O3 -march=native -mprefer-vector-width=512 -fPIC -shared -pthread -w".split(),
    *"-fassociative-math -freciprocal-math -fno-signed-zeros -fno-trapping-math -fno-math-errno".split(),
)
_DAY_S = 86_400


@once
def load() -> ctypes.CDLL | None:
    """Return the library with its calls registered in JAX; None where it cannot be used.

    It needs the CPU to be JAX's default backend, AVX2 and a C++ compiler, and RAG_NATIVE must not be 0.
    """
    if not _WANTED or jax.default_backend() != "cpu" or "avx2" not in cpu_flags():
        return None
    try:
        if (path := library()) is None:
            return None
        loaded = ctypes.CDLL(str(path))
        loaded.RagHasTiles.restype = ctypes.c_bool
        functions = {target: getattr(loaded, symbol) for target, symbol in _TARGETS.items()}
    except (OSError, AttributeError, UserError) as error:  # not loaded, no such symbol, not written
        notice(f"The native library cannot be used, so XLA does its work: {error}")
        return None
    for target, function in functions.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    return loaded


def library() -> Path | None:
    """Return the path of the library, built if it is not there; None if there is no compiler, or it fails."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        return None
    key = content_key(
        [
            file.read_text(encoding="utf-8")
            for pattern in RAG_SOURCES
            for file in sorted(Path(__file__).parent.glob(pattern))
        ],
        _version(compiler),
        _FLAGS,
        list(cpu_flags()),
        metadata.version("jaxlib"),
        "sealed",
    )
    path = private_folder(cache_root() / "native") / f"{key}.so"
    log = path.with_suffix(".log")
    if not path.exists() and _failed_lately(log):
        return None

    def make() -> None:
        if not _failed_lately(log):
            _build(compiler, path, log)

    with suppress(FileNotFoundError):
        return private_file(entries.get_or_make(path, make, entries.verified_path))
    return None


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _failed_lately(log: Path) -> bool:
    """Return whether the compiler failed less than a day ago: it may be repaired later, but not at every start."""
    return log.exists() and time.time() - log.stat().st_mtime < _DAY_S


def _build(compiler: str, path: Path, log: Path) -> None:
    """Write the library to `path`, or the compiler's errors to `log`."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "library.so"
        includes = f"-I{jax.ffi.include_dir()}"
        command = [compiler, *_FLAGS, includes, str(_ENTRY), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == 0:
            entries.write(path, built.read_bytes())
            return
    with write_errors():
        files.discard(path)  # a damaged one
        with files.atomic_file(log) as file:
            file.write(done.stderr)
    notice(f"{compiler} cannot build {_ENTRY.name}, so XLA does its work: {log}")
