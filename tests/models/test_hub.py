"""Weights URIs: fake stores of Ollama and Hugging Face, and plain paths; wheels are in test_hub_wheels.py."""

import json
import sys
import types
from pathlib import Path

import pytest

from rag.models import hub
from rag.runtime.cache import file_hash
from rag.types import UserError
from tests.models.test_hub_wheels import files_under

DIGEST = "ab" * 32


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "uri",
    [
        "pypi:tiny/x",
        "pypi:tiny==1.0/x",
        "pypi:tiny==1.0/x#sha256=12",
        f"pypi:--index-url==1.0/x#sha256={DIGEST}",
        f"pypi:tiny==1.0/../x#sha256={DIGEST}",
        f"pypi:tiny==1.0 evil/x#sha256={DIGEST}",
        "hf:justone",
        "hf:a/b/../c",
        "ollama:../../x",
        "ollama:a/b/c/d",
    ],
)
def test_malformed_uris(uri):
    with pytest.raises(UserError, match="is no weights URI of the form"):
        hub.local_path(uri)


# --- Ollama -------------------------------------------------------------------------------------------------

BLOB = "sha256:" + "ab" * 32


def pull(root: Path, model: str, layers: list[dict] | None = None) -> Path:
    """A models folder as `ollama pull` leaves it; the blob's path."""
    layers = layers or [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "00" * 32},
        {"mediaType": "application/vnd.ollama.image.model", "digest": BLOB},
    ]
    manifest = root / "manifests" / model
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    blob = root / "blobs" / BLOB.replace(":", "-")
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(b"GGUF")
    return blob


@pytest.mark.parametrize(
    ("uri", "model"),
    [
        ("ollama:llama3.2", "registry.ollama.ai/library/llama3.2/latest"),
        ("ollama:llama3.2:1b", "registry.ollama.ai/library/llama3.2/1b"),
        ("ollama:someone/model", "registry.ollama.ai/someone/model/latest"),
        ("ollama:hf.co/someone/model-GGUF:Q4_K_M", "hf.co/someone/model-GGUF/Q4_K_M"),
    ],
)
def test_ollama_models_are_found(tmp_path, monkeypatch, uri, model):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    blob = pull(tmp_path / "models", model)
    assert hub.local_path(uri) == blob


def test_ollama_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    blob = pull(tmp_path / ".ollama/models", "registry.ollama.ai/library/llama3.2/latest")
    assert hub.local_path("ollama:llama3.2") == blob


def test_ollama_says_what_to_pull(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    with pytest.raises(UserError, match=r"no model here.*ollama pull llama3\.2:latest"):
        hub.local_path("ollama:llama3.2")
    pull(tmp_path, "registry.ollama.ai/library/qwen3/4b")
    with pytest.raises(UserError, match="it has qwen3:4b"):
        hub.local_path("ollama:llama3.2")


def test_ollama_damage_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    model = "registry.ollama.ai/library/m/latest"
    pull(tmp_path, model).unlink()
    with pytest.raises(UserError, match="not there; pull m:latest again"):
        hub.local_path("ollama:m")
    (tmp_path / "manifests" / model).write_text("{}")
    with pytest.raises(UserError, match="is no Ollama manifest"):
        hub.local_path("ollama:m")
    pull(tmp_path, model, [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../x"}])
    with pytest.raises(UserError, match="does not name one GGUF"):
        hub.local_path("ollama:m")


# --- Hugging Face -------------------------------------------------------------------------------------------


@pytest.fixture
def client(monkeypatch):
    """A stand-in for huggingface_hub that records the calls and fails if asked to."""
    state = types.SimpleNamespace(calls=[], failure=None)

    def record(*args: object, **kwargs: object) -> str:
        state.calls.append((args, kwargs))
        if state.failure:
            raise state.failure
        return "/somewhere"

    errors = types.ModuleType("huggingface_hub.errors")
    errors.HFValidationError = type("HFValidationError", (ValueError,), {})
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = module.snapshot_download = record
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return state


def test_hugging_face_calls(client):
    assert hub.local_path("hf:owner/repo") == Path("/somewhere")
    assert hub.local_path("hf:owner/repo@v1.0/sub/model.gguf") == Path("/somewhere")
    (first, options), (second, revision) = client.calls
    assert first == ("owner/repo",)
    assert options["revision"] is None
    assert "*.safetensors" in options["allow_patterns"]
    assert second == ("owner/repo", "sub/model.gguf")
    assert revision == {"revision": "v1.0"}


def test_hugging_face_failures_are_one_sentence(client):
    client.failure = ConnectionError("cannot reach\n  the hub")
    with pytest.raises(UserError, match=r"could not get hf:owner/repo .*\(cannot reach the hub\)"):
        hub.local_path("hf:owner/repo")


def test_hugging_face_library_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        hub.local_path("hf:owner/repo")


# --- paths and defaults -------------------------------------------------------------------------------------


def test_plain_paths(tmp_path, monkeypatch):
    assert hub.local_path(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.local_path("~") == tmp_path
    (tmp_path / "model.gguf").touch()
    assert hub.local_path("~/model.gguf") == tmp_path / "model.gguf"
    with pytest.raises(UserError, match="no weights at ~nobody-of-this-name/x"):
        hub.local_path("~nobody-of-this-name/x")
    (tmp_path / "odd:name").touch()
    assert hub.local_path(str(tmp_path / "odd:name")) == tmp_path / "odd:name"
    with pytest.raises(UserError, match=r"no weights at .*nothing.*pypi:"):
        hub.local_path(str(tmp_path / "nothing"))


@pytest.mark.weights
def test_default_weights(embedder_weights, generator_weights):
    assert files_under(embedder_weights)[:2] == [".gitattributes", "1_Pooling/config.json"]
    assert hub.DEFAULT_EMBEDDER.endswith(file_hash.file_sha256(embedder_weights / "model.safetensors"))
    assert hub.DEFAULT_GENERATOR.endswith(file_hash.file_sha256(generator_weights))
    assert generator_weights.read_bytes()[:4] == b"GGUF"
