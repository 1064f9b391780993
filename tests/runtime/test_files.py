"""Content keys, locks, atomic files and folders."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.runtime import file_hash, files
from rag.runtime.cache_key import content_key
from rag.runtime.checksums import seal
from rag.runtime.file_hash import file_sha256
from rag.runtime.files import atomic_file, atomic_folder, cache_root, locked, write_errors
from rag.types import UserError
from tests.damage import WAYS

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


@dataclasses.dataclass(frozen=True)
class Options:
    size: int = 1
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class OtherOptions:
    size: int = 1
    name: str = "a"


def typed(value: object) -> object:
    """The value with every leaf's type beside it, so that == tells 1 from True and -0.0 from 0.0."""
    if isinstance(value, list):
        return [typed(item) for item in value]
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    return type(value).__name__, repr(value)


@given(PLAIN, PLAIN)
def test_keys_are_equal_exactly_when_the_values_are(a, b):
    assert (content_key(a) == content_key(b)) == (typed(a) == typed(b))


def test_every_type_has_its_own_key():
    values = [
        None,
        False,
        True,
        0,
        1,
        1.0,
        0.0,
        -0.0,
        "1",
        b"1",
        "",
        b"",
        [],
        {},
        [1],
        ["1"],
        {"1": 1},
        {1: 1},
    ]
    values += [
        math.inf,
        math.nan,
        [[]],
        [[], []],
        Options(),
        OtherOptions(),
        Options(size=2),
        {"size": 1, "name": "a"},
    ]
    keys = {content_key(value) for value in values}
    assert len(keys) == len(values)
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys)


def test_parts_do_not_run_together():
    keys = {
        content_key(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), ("ab", "c", ""), (["ab", "c"],)]
    }
    assert len(keys) == 5


def test_what_must_not_change_a_key():
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key((1, (2,))) == content_key([1, [2]])
    assert content_key(float("nan")) == content_key(-float("nan"))
    assert content_key("\udcff")  # a file name that is no UTF-8


def test_a_key_is_the_same_in_every_process_and_version():
    expected = "a34fdf727eb528456613fdec701671693e6144ef"
    assert content_key("passage", 1, 2.5, None, [True, b"x"], {"k": "v"})[:40] == expected


def test_unknown_types_are_refused():
    for value in (object(), {1, 2}, Options, os.curdir.__class__):
        with pytest.raises(TypeError, match="content_key"):
            content_key(value)


def test_cache_root_is_made_where_it_was_asked_for(tmp_path, monkeypatch):
    assert cache_root() == tmp_path / "cache"
    assert cache_root().is_dir()
    monkeypatch.delenv("RAG_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "rag-jax"


def test_the_cache_is_for_the_user_alone(tmp_path, monkeypatch):
    assert cache_root().stat().st_mode & 0o777 == 0o700
    os.chmod(cache_root(), 0o755)  # as earlier versions made it: others may look
    assert cache_root() == tmp_path / "cache"
    for mode in (0o770, 0o702):
        os.chmod(tmp_path / "cache", mode)
        with pytest.raises(UserError, match=r"Others may write to .*cache, so .*chmod -R go-w .*/cache`"):
            cache_root()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "link"))
    with pytest.raises(UserError, match=rf"chmod -R go-w {tmp_path}/cache`"):  # where the link leads
        cache_root()
    os.chmod(tmp_path / "cache", 0o700)
    assert cache_root() == tmp_path / "cache"
    monkeypatch.setattr(files.os, "geteuid", lambda: 12345)
    with pytest.raises(UserError, match="belongs to another user"):
        cache_root()


def test_a_cache_that_cannot_be_made_is_a_users_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="RAG_CACHE"):
        cache_root()


def test_file_sha256_follows_the_content(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"one" * 1_000_000)
    assert file_sha256(path) == hashlib.sha256(b"one" * 1_000_000).hexdigest()
    path.write_bytes(b"two" * 1_000_000)  # at once, and of the same size: the clock may not have moved
    assert file_sha256(path) == hashlib.sha256(b"two" * 1_000_000).hexdigest()


def test_file_sha256_reads_a_file_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    os.utime(path, (1000, 1000))
    monkeypatch.setattr(file_hash, "_RACY_NS", 0)
    first = file_sha256(path)
    [memory] = (tmp_path / "cache" / "sha256").iterdir()
    with atomic_file(memory) as file:
        file.write(b"as remembered")
        seal(file, files.entry_name(memory))
    assert file_sha256(path) == "as remembered"
    assert file_sha256(path, fresh=True) == file_sha256(path) == first
    path.write_bytes(b"two")
    os.utime(path, (1000, 1000))  # the same inode, size and mtime: as a copy that keeps times leaves it
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest() != first
    os.utime(path, (2000, 2000))
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()
    other = tmp_path / "other"
    other.write_bytes(b"six")
    os.utime(other, (2000, 2000))
    os.replace(other, path)
    assert file_sha256(path) == hashlib.sha256(b"six").hexdigest()


def test_file_sha256_needs_no_memory(tmp_path, monkeypatch):
    path, tried = tmp_path / "weights", []

    def read_only(memory):
        tried.append(memory)
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(file_hash, "atomic_file", read_only)
    monkeypatch.setattr(file_hash, "_RACY_NS", 0)
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert len(tried) == 1
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "nothing")


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_digest_is_never_believed(tmp_path, monkeypatch, way, capsys):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    monkeypatch.setattr(file_hash, "_RACY_NS", 0)
    right = file_sha256(path)
    [memory] = (tmp_path / "cache" / "sha256").iterdir()
    before = memory.read_bytes()
    WAYS[way](memory)
    assert file_sha256(path) == right
    told = capsys.readouterr().err
    assert (memory.name in told and told.count("\n") == 1) == (way != "gone")
    assert memory.read_bytes() == before


def test_a_failure_to_write_is_a_users_error(tmp_path):
    with (
        pytest.raises(UserError, match=r"folder .*cache \(Read-only file system\).*RAG_CACHE"),
        write_errors(),
    ):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    with pytest.raises(UserError, match=r"\(10 requested and 4 written\)"), write_errors():
        raise OSError("10 requested and 4 written")  # as numpy does
    with pytest.raises(KeyError), write_errors():
        raise KeyError("ours")


def test_atomic_file_replaces_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_file(path, "w") as file:
        file.write("caf\u00e9\r\n")
        assert not path.exists()
    assert path.read_bytes() == "caf\u00e9\r\n".encode()
    with atomic_file(path) as file:
        file.write(b"second")
        assert path.read_bytes() == "caf\u00e9\r\n".encode()
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_file_leaves_nothing_behind(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_file_obeys_the_umask_and_knows_two_modes(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as file:
            file.write(b"")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    with pytest.raises(ValueError, match="mode"), atomic_file(tmp_path / "file", "ab"):
        pass


def test_atomic_folder_appears_whole(tmp_path):
    path = tmp_path / "index"
    with atomic_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("1")
        assert folder.parent == tmp_path  # beside it: a rename never crosses file systems
        assert not path.exists()
    assert (path / "inner" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["index"]


def test_atomic_folder_never_replaces(tmp_path):
    path = tmp_path / "index"
    path.mkdir()
    with pytest.raises(FileExistsError), atomic_folder(path):
        pytest.fail("the block must not run")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "late") as folder:
        (folder / "a").write_text("mine")
        (tmp_path / "late").mkdir()  # another process was faster
        (tmp_path / "late" / "a").write_text("theirs")
    assert (tmp_path / "late" / "a").read_text() == "theirs"
    assert sorted(os.listdir(tmp_path)) == ["index", "late"]


def test_atomic_folder_replaces_where_it_is_asked_to(tmp_path):
    path = tmp_path / "index"
    for text in ("first", "second"):
        with atomic_folder(path, replace=True) as folder:
            (folder / text).write_text(text)
        assert os.listdir(path) == [text]
    with pytest.raises(ValueError, match="stop"), atomic_folder(path, replace=True):
        raise ValueError("stop")
    assert os.listdir(path) == ["second"]
    assert os.listdir(tmp_path) == ["index"]


def test_atomic_folder_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "index") as folder:
        (folder / "a").write_text("half")
        raise ValueError("stop")
    assert os.listdir(tmp_path) == []


def test_locked_lets_one_in_at_a_time(tmp_path):
    path, inside, most = tmp_path / "deep" / "entry", [], []

    def work():
        for _ in range(50):
            with locked(path):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 200
    assert max(most) == 1


def test_locked_holds_between_processes_and_dies_with_its_holder(tmp_path):
    hold = """
import sys, time
from rag.runtime.files import locked
with locked(sys.argv[1]):
    print("in", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "entry")], stdout=subprocess.PIPE)
    entered = threading.Event()

    def enter():
        with locked(tmp_path / "entry"):
            entered.set()

    with holder:
        assert holder.stdout.readline() == b"in\n"
        waiter = threading.Thread(target=enter)
        waiter.start()
        assert not entered.wait(0.2)
        holder.kill()
        assert entered.wait(30)
        waiter.join()


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    program = """
import jax, jax.numpy as jnp
from rag.runtime.compilation_cache import enable_compilation_cache
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
enable_compilation_cache()
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((5, 5))).block_until_ready()
print(sum(hits))
"""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert int(runs[0].stdout) == 0
    assert int(runs[1].stdout) >= 1
    assert list((tmp_path / "cache" / "xla").glob("*/*"))


def test_a_damaged_program_is_compiled_again_and_replaced(tmp_path):
    """In one process, which forgets its programs between the ways of damage."""
    program = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from rag.runtime.compilation_cache import enable_compilation_cache
from tests.damage import WAYS
enable_compilation_cache()
def value():
    jax.clear_caches()
    return float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((5, 5))).sum())
right = value()
[entry] = pathlib.Path(sys.argv[1]).glob("xla/*/jit__lambda-*-cache")
for way in WAYS:
    print(way, file=sys.stderr)
    WAYS[way](entry)
    assert value() == right, way
    print(json.dumps([way, entry.stat().st_size]))
"""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "cache")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    sizes = dict(map(json.loads, done.stdout.splitlines()))
    assert sizes.keys() == WAYS.keys() and min(sizes.values()) > 1000  # each way the entry is whole again
    told = [line for line in done.stderr.splitlines() if line not in WAYS]
    assert len(told) == len(WAYS) - 1 and all("it is compiled again" in line for line in told), done.stderr
