"""The cache uses intact entries, and makes damaged ones again, with a notice and only once."""

import errno
import os
import subprocess
import sys
import textwrap
import threading
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.runtime import files
from rag.runtime.cache import entries
from rag.runtime.cache.entries import (
    check_folder,
    get,
    get_or_make,
    read_array,
    read_record,
    write,
    write_folder,
)
from rag.runtime.checksums import Damaged
from rag.runtime.records import Record
from rag.types import UserError
from tests.damage import WAYS, drawn_damage
from tests.trials import tries


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


class Number(Record):
    number: int


class Making:
    """It writes an entry of one of three kinds, reads it, and counts how often it was made."""

    def __init__(self, kind, path):
        self.kind, self.path, self.made = kind, path, 0

    def make(self):
        self.made += 1
        match self.kind:
            case "record":
                write(self.path, b'{"number": 7}')
            case "array":
                entries.write(self.path, npy(np.arange(20_000)))
            case "folder":
                write_folder(self.path, fill)

    def read(self, path):
        match self.kind:
            case "record":
                return read_record(path, Number).number
            case "array":
                return read_array(path).sum()
            case "folder":
                return (check_folder(path) / "inner" / "weights").read_bytes()

    def once(self):
        return get_or_make(self.path, self.make, self.read)


def npy(array):
    import io

    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def fill(folder):
    (folder / "config.json").write_text("{}")
    (folder / "inner").mkdir()
    (folder / "inner" / "weights").write_bytes(b"12345" * 1000)
    (folder / "inner" / "empty").touch()


@pytest.fixture(params=["record", "array", "folder"])
def making(request, tmp_path):
    return Making(request.param, tmp_path / "cache" / "entry")


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_damaged_is_made_again(making, way, capsys):
    first = making.once()
    assert making.once() == first and making.made == 1 and capsys.readouterr().err == ""
    count = len(files_of(making.path))
    for i in range(count):
        file = files_of(making.path)[i]
        if file.name == "empty" and way != "gone":
            continue  # there is nothing to flip
        made, before = making.made, file.read_bytes()
        WAYS[way](file)
        assert making.once() == first and making.made == made + 1
        printed = capsys.readouterr().err
        if making.kind != "folder" and way == "gone":
            assert printed == ""
        else:
            assert (
                str(file) in printed
                and printed.endswith(": it is made again.\n")
                and printed.count("\n") == 1
            )
        assert file.read_bytes() == before
    assert making.once() == first and capsys.readouterr().err == ""
    assert not [path for path in making.path.parent.iterdir() if path.name.endswith(".tmp")]


@given(st.data())
@tries(60, 3000)
def test_no_damage_passes(tmp_path_factory, data):
    making = Making("record", tmp_path_factory.mktemp("some") / "entry")
    assert making.once() == 7
    before = making.path.read_bytes()
    drawn_damage(making.path, data)
    assert making.once() == 7 and making.made == 2
    assert making.path.read_bytes() == before


def test_a_damaged_file_of_a_folder_that_is_empty_is_found(tmp_path, capsys):
    write_folder(tmp_path / "entry", fill)
    (tmp_path / "entry" / "inner" / "empty").write_text("no more")
    assert get(tmp_path / "entry", check_folder) is None
    assert "inner/empty has changed" in capsys.readouterr().err


def test_what_another_schema_wrote_is_damaged(tmp_path):
    for content in (b'{"number": "7"}', b'{"other": 7}', b"[7]", b"", b"\xff"):
        write(tmp_path / "entry", content)
        with pytest.raises(Damaged, match="something else than what was written"):
            read_record(tmp_path / "entry", Number)
    write(tmp_path / "entry", b"\x93NUMPY")
    with pytest.raises(Damaged, match="holds no array"):
        read_array(tmp_path / "entry")
    with pytest.raises(FileNotFoundError):
        read_array(tmp_path / "nothing")


def test_a_file_in_place_of_a_folder_is_replaced_or_reported(tmp_path):
    making = Making("folder", tmp_path / "entry")
    making.path.write_text("a file where a folder should be")
    assert making.once() and making.path.is_dir()
    record = Making("record", tmp_path / "record")
    record.path.mkdir()
    with pytest.raises(UserError, match="cannot write to the folder"):
        record.once()


def test_a_read_only_cache_is_read_without_an_error(making, monkeypatch):
    first = making.once()
    os.utime(making.path, (1000, 1000))  # a use that would be recorded

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for module in (files, entries):
        monkeypatch.setattr(module, "atomic_file", refuse)
    monkeypatch.setattr(files, "locked", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    assert making.once() == first and making.made == 1
    files_of(making.path)[0].unlink()
    with pytest.raises(
        UserError, match=r"cannot write to the cache folder .*cache \(Read-only file system\)"
    ):
        making.once()


def test_errors_of_make_are_passed_on(tmp_path):
    def fail():
        raise FileNotFoundError(2, "No such file", "model.bin")

    with pytest.raises(FileNotFoundError, match=r"model\.bin"):
        get_or_make(tmp_path / "entry", fail, check_folder)


def test_damage_right_after_writing_is_an_error(tmp_path):
    path = tmp_path / "entry"

    def make():
        write(path, b'{"number": 7}')
        WAYS["middle"](path)

    with pytest.raises(UserError, match="as soon as it was written: check the disk"):
        get_or_make(path, make, partial(read_record, schema=Number))


def test_a_failed_making_leaves_the_damaged_entry_to_the_next(tmp_path):
    making = Making("folder", tmp_path / "entry")
    making.once()
    WAYS["middle"](tmp_path / "entry" / "config.json")

    def fail(folder):
        fill(folder)
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        get_or_make(making.path, lambda: write_folder(making.path, fail), making.read)
    assert making.once() and making.made == 2


def test_threads_make_an_entry_once(making):
    results = []
    threads = [threading.Thread(target=lambda: results.append(making.once())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert making.made == 1 and len(results) == 6 and len(set(map(str, results))) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_make_an_entry_once(tmp_path, damaged):
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from rag.runtime.cache.entries import check_folder, get_or_make, write_folder
        path = Path(sys.argv[1])
        def fill(folder):
            print("made", flush=True)
            time.sleep(0.3)
            (folder / "a").write_text("whole")
        print((get_or_make(path, lambda: write_folder(path, fill), check_folder) / "a").read_text())
    """)
    path = tmp_path / "entry"
    if damaged:
        write_folder(path, lambda folder: (folder / "a").write_text("whole"))
        WAYS["middle"](path / "a")
    command = [sys.executable, "-c", script, str(path)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert sorted(out for out, _ in outputs) == ["made\nwhole\n", "whole\n"]
    assert sum("made again" in err for _, err in outputs) == damaged


def test_each_file_is_compared_once_a_process(tmp_path, monkeypatch):
    write(tmp_path / "entry", npy(np.arange(3)))
    read_array(tmp_path / "entry")
    monkeypatch.setattr(entries, "verify_file", lambda path, name: pytest.fail("compared again"))
    assert read_array(tmp_path / "entry").tolist() == [0, 1, 2]


def test_what_is_cached_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        entries.write(tmp_path / "cache" / "stages" / "a" / "file", b"content")
        write_folder(tmp_path / "cache" / "results" / "b", lambda folder: (folder / "c").write_text("c"))
    finally:
        os.umask(before)
    folders = [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()]
    assert len(folders) == 4
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
    assert (tmp_path / "cache" / "stages" / "a" / "file").stat().st_mode & 0o777 == 0o600
