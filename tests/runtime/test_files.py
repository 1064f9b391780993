"""Locks, atomic files and folders."""

import os
import subprocess
import sys
import threading

import pytest

from rag.runtime.files import atomic_file, atomic_folder, locked


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
