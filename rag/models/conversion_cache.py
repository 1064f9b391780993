"""Cache converted checkpoints: parameters as .npy files, which later starts memory-map.

Reading and dequantising a GGUF file takes seconds. So the result is written once, as one float32 or int8 .npy file a
parameter, below the names and SHA-256 of the source files and the version of the code that converts them:

    converted/<sources>/<code>/   a file equal to one that other code made is a hard link to it

A folder with a missing or changed file is converted again (rag.runtime.cache.entries).
"""

import filecmp
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from flax import nnx

from rag.models.checkpoint import dotted, fill_paths
from rag.runtime.cache import entries, file_hash
from rag.runtime.cache.folder import cache_root
from rag.runtime.cache.keys import content_key
from rag.runtime.code.import_closure import code_version
from rag.types import UserError

M = TypeVar("M", bound=nnx.Module)


def converted_folder(kind: str, sources: Sequence[Path], convert: Callable[[Path], None]) -> Path:
    """Return the cache folder with what `convert(folder)` writes, called once for the same sources and code.

    Args:
        kind: what the sources are converted to, since one file may be converted to several models.
        sources: the checkpoint's files.
        convert: writes the converted files into a given folder. Its code is part of the cache key.

    Raises:
        UserError: the cache cannot be written, or a source file has changed while its time stamp has not.
    """
    digests = file_digests(sources)
    parent = cache_root() / "converted" / content_key(kind, digests)
    folder = parent / code_version(convert)

    def fill(unfinished: Path) -> None:
        convert(unfinished)
        _link_equal_files(unfinished, parent)

    def make() -> None:
        _check_unchanged(sources, digests)
        entries.write_folder(folder, fill)

    return entries.get_or_make(folder, make, entries.check_folder, lock=parent)


def file_digests(sources: Sequence[Path], *, fresh: bool = False) -> list[tuple[str, str]]:
    """Return (name, SHA-256) of a checkpoint's files.

    In a folder a name says what a file is, so a renamed file makes another checkpoint. The name of a single file, such
    as a GGUF file, is left out. With `fresh` the files are hashed again, whatever digests are remembered.
    """
    digests = [file_hash.file_sha256(path, fresh=fresh) for path in sources]
    if len(sources) == 1:
        return [("", digests[0])]
    folder = sources[0].parent
    return [(os.path.relpath(path, folder), digest) for path, digest in zip(sources, digests, strict=True)]


def _check_unchanged(sources: Sequence[Path], known: list[tuple[str, str]]) -> None:
    """Raise UserError for a file that differs from its remembered digest: a disk decays without a new time stamp."""
    now = file_digests(sources, fresh=True)
    if changed := [path for path, old, new in zip(sources, known, now, strict=True) if old != new]:
        raise UserError(f"{changed[0]} has changed although nobody wrote to it: fetch it again.")


def _link_equal_files(folder: Path, parent: Path) -> None:
    """Replace files of `folder` by links to equal ones of the newest earlier folder in `parent`: weights are large."""
    earlier = [path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for other in sorted(earlier, key=lambda path: path.stat().st_mtime, reverse=True)[:1]:
        for file in folder.iterdir():
            if (other / file.name).is_file() and filecmp.cmp(other / file.name, file, shallow=False):
                with suppress(OSError):  # a file system without links
                    link = folder / f".{file.name}"
                    os.link(other / file.name, link)
                    os.replace(link, file)


def save_module(module: nnx.Module, folder: Path) -> None:
    """Write every parameter of `module` as `<dotted path>.npy`."""
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        np.save(folder / f"{dotted(path)}.npy", leaf.get_value())


def load_module(module: M, folder: Path) -> M:
    """Return the abstract `module` with its parameters memory-mapped from the files of `save_module`."""
    paths = [dotted(path) for path, _ in nnx.to_flat_state(nnx.state(module))]
    tensors = {path: np.load(folder / f"{path}.npy", mmap_mode="r") for path in paths}
    return fill_paths(module, tensors, (), str(folder))
