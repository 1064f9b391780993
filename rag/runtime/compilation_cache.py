"""JAX's persistent compilation cache, in our cache folder."""

import contextlib
import functools
import glob
import platform
import re
import warnings
import zlib
from pathlib import Path

from rag.runtime.cache_key import content_key
from rag.runtime.files import cache_root, make_private_folder, notice

_ZSTD = b"\x28\xb5\x2f\xfd"  # JAX's entries begin with it where zstandard is installed


def enable_compilation_cache() -> None:
    """Keep every compiled program on disk, so that a second process does not compile it again.

    The folder is JAX_COMPILATION_CACHE_DIR if set, else one of the cache per kind of processor: XLA compiles
    for the instructions of the machine it runs on, and a home folder may be shared by several.
    """
    import jax  # here, not above: most users of this file need no JAX

    if not jax.config.jax_compilation_cache_dir:
        folder = cache_root() / "xla" / content_key(platform.machine(), _processor())[:16]
        with contextlib.suppress(OSError):  # a cache that cannot be written
            make_private_folder(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _remove_damaged_programs(Path(jax.config.jax_compilation_cache_dir))


@functools.cache
def _remove_damaged_programs(folder: Path) -> None:
    """Remove a program that JAX warns it cannot read, and tell of it in one line instead of a warning at every start.

    JAX never runs such a program (its entries are compressed by zlib, which compares a checksum) and compiles it anew,
    but it writes an entry only where there is none.
    """
    show = warnings.showwarning

    def remove(message, category, filename, lineno, file=None, line=None) -> None:
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
    """Whether an entry of JAX's is whole. Raises nothing: one that is gone, or packed in another way, is left alone."""
    try:
        zlib.decompress(path.read_bytes())
    except zlib.error:
        return path.read_bytes().startswith(_ZSTD)
    except OSError:
        return True
    return True


def _processor() -> str:
    """The processor's model and instruction sets as Linux lists them, or its name elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
