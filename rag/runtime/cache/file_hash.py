"""SHA-256 of files, cached between processes."""

import contextlib
import hashlib
import time
from pathlib import Path

from rag.runtime.cache.folder import cache_root, entry_name
from rag.runtime.cache.keys import content_key
from rag.runtime.files import file_stamp
from rag.types import UserError

_READ_BYTES = 1 << 20
# A file that changed less than 2 s ago could change again with the same mtime on a coarse clock: it is not cached.
_RACY_NS = 2_000_000_000


def file_sha256(path: str | Path, *, fresh: bool = False) -> str:
    """Return the SHA-256 of a file's bytes (64 hex digits), cached by path, size, mtime, ctime and inode.

    A file is read again only after it was changed or replaced, or with `fresh`. Raises OSError when it cannot be read.
    """
    # Imported here because they need numpy, and a typing error on a command line should be reported without waiting.
    from rag.runtime.cache import entries
    from rag.runtime.checksums import read_verified

    path = Path(path).resolve()
    before = file_stamp(path)
    entry = cache_root() / "sha256" / f"{content_key(str(path), *before)}.sha256"
    if (
        not fresh
        and (cached := entries.get(entry, lambda entry: read_verified(entry, entry_name(entry)))) is not None
    ):
        return cached.decode()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    changed_ns = max(before.mtime_ns, before.ctime_ns)
    if file_stamp(path) == before and time.time_ns() - changed_ns > _RACY_NS:
        with contextlib.suppress(UserError):  # if the cache cannot be written, the next process hashes again
            entries.write(entry, digest.hexdigest().encode())
    return digest.hexdigest()
