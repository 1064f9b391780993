"""SHA-256 of files, remembered between processes."""

import contextlib
import hashlib
import os
import time
from pathlib import Path

from rag.runtime.cache_key import content_key
from rag.runtime.files import atomic_file, cache_root, entry_name, make_private_folder, notice

_READ_BYTES = 1 << 20
# A file changed this recently could change again under the same mtime on a coarse clock: don't remember it.
_RACY_NS = 2_000_000_000


def file_sha256(path: str | Path, *, fresh: bool = False) -> str:
    """SHA-256 of a file's bytes (64 hex digits), remembered by path, size, mtime, ctime and inode.

    A large file is read once; a changed or replaced one is read again, and with `fresh` any is. Raises OSError when it
    cannot be read.
    """
    from rag.runtime.checksums import (
        seal,  # here: it needs numpy, for which a typo on a command line should not wait
    )

    path = Path(path).resolve()
    before = path.stat()
    memory = cache_root() / "sha256" / f"{content_key(str(path), *_stamp(before), before.st_ino)}.sha256"
    if not fresh and (known := _remembered_digest(memory)) is not None:
        return known
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    changed_ns = max(before.st_mtime_ns, before.st_ctime_ns)
    if _stamp(path.stat()) == _stamp(before) and time.time_ns() - changed_ns > _RACY_NS:
        # A cache that cannot be written (read-only, full) costs the next start a reading, and no more.
        with contextlib.suppress(OSError):
            make_private_folder(memory.parent)
            with atomic_file(memory) as file:
                file.write(digest.hexdigest().encode())
                seal(file, entry_name(memory))
    return digest.hexdigest()


def _remembered_digest(memory: Path) -> str | None:
    from rag.runtime.checksums import Damaged, read_sealed

    try:
        return read_sealed(memory, entry_name(memory)).decode()
    except FileNotFoundError:
        return None
    except (Damaged, OSError) as error:
        notice(f"{error}: the file whose digest it holds is read again.")
        return None


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    """What tells that a file was written to; the mtime alone can be set to what it was."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
