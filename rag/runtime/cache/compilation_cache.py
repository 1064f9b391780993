"""Put JAX's persistent compilation cache into the cache folder."""

import contextlib
import functools
import glob
import platform
import re
import warnings
import zlib
from pathlib import Path
from typing import TextIO

from rag.runtime.cache.folder import cache_root, make_private_folder, notice
from rag.runtime.cache.keys import content_key

_ZSTD = b"\x28\xb5\x2f\xfd"  # the first bytes of JAX's entries where zstandard is installed


def enable_compilation_cache() -> None:
    """Store every compiled program on disk, so that a second process does not compile it again.

    The folder is JAX_COMPILATION_CACHE_DIR if set, else a folder of the cache for this kind of processor: XLA compiles
    for the instructions of the machine it runs on, and machines of several kinds may share a home folder.
    """
    import jax  # imported here: most users of this file need no JAX

    if not jax.config.values["jax_compilation_cache_dir"]:
        folder = cache_root() / "xla" / content_key(platform.machine(), _processor())[:16]
        with contextlib.suppress(OSError):  # a cache that cannot be written
            make_private_folder(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _remove_damaged_programs(Path(jax.config.values["jax_compilation_cache_dir"]))


@functools.cache
def _remove_damaged_programs(folder: Path) -> None:
    """Remove every program that JAX warns it cannot read, and print one line instead of a warning at every start.

    JAX never runs such a program (zlib, which compresses the entries, compares a checksum) and compiles it again, but
    it never overwrites the entry.
    """
    show = warnings.showwarning

    def remove(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        name = re.search("reading persistent compilation cache entry for '([^']+)'", str(message))
        damaged = (
            [path for path in folder.glob(f"{glob.escape(name[1])}-*") if not _unpacks(path)] if name else []
        )
        if not damaged:
            return show(message, category, filename, lineno, file, line)
        for path in damaged:
            with contextlib.suppress(OSError):  # a cache that cannot be written
                path.unlink()
            notice(f"The compiled program {path} has changed since it was written: it is compiled again.")

    warnings.filterwarnings("always", "Error reading persistent compilation cache entry")
    warnings.showwarning = remove


def _unpacks(path: Path) -> bool:
    """Return whether an entry of JAX's is whole; a missing entry, or one compressed by zstandard, counts as whole."""
    try:
        zlib.decompress(path.read_bytes())
    except zlib.error:
        return path.read_bytes().startswith(_ZSTD)
    except OSError:
        return True
    return True


def _processor() -> str:
    """Return the processor's model and instruction sets as Linux lists them, or its name on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
