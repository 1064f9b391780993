"""Which entries are removed when the cache is too large, in which order, and which never."""

import os
import time

import pytest

from rag.runtime.cache import entries, eviction
from rag.runtime.cache.folder import cache_root
from rag.runtime.files import locked
from rag.types import UserError

KEYS = [f"{i:064x}" for i in range(20)]
DAY = 86_400


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(eviction, "_written_bytes", 0.0)
    monkeypatch.setattr(eviction, "_used", set())


def put(name, days, size=1000):
    """Write a file that was last used so many days ago."""
    path = cache_root() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return aged(path, days)


def aged(path, days):
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


def put_folder(name, days, size=1000):
    put(f"{name}/a", 0, size // 2)
    put(f"{name}/inner/b", 0, size - size // 2)
    return aged(cache_root() / name, days)


def fetched(name, days):
    with locked(cache_root() / name):
        return put_folder(name, days)


def left():
    return {entry.path.relative_to(cache_root()).as_posix() for entry in eviction.entries()}


def test_every_kind_is_found_with_its_size_and_last_use():
    files = [
        f"chunk_kv/{KEYS[0]}.npy",
        f"code/{KEYS[0]}.json",
        f"native/{KEYS[0]}.so",
        f"sha256/{KEYS[0]}.sha256",
    ]
    files += [f"stages/search/{KEYS[0]}/{KEYS[1]}.json", f"vectors/{KEYS[0]}/{KEYS[1]}.npy"]
    files += [f"xla/{'0' * 16}/jit_f-{KEYS[0]}-cache"]
    folders = [f"converted/{KEYS[0]}/{KEYS[1]}", f"requantised/{'0' * 16}-Q8_0", f"results/{KEYS[0]}"]
    for name in files:
        put(name, 3)
    for name in folders:
        put_folder(name, 3)
    fetched("weights/tiny-weights-1.0", 3)
    assert left() == {*files, *folders, "weights/tiny-weights-1.0"}
    found = eviction.entries()
    assert {entry.kind for entry in found} == set(eviction.KINDS)
    assert {entry.nbytes for entry in found} == {1000}
    assert all(abs(entry.used - (time.time() - 3 * DAY)) < 60 for entry in found)


def test_what_the_cache_did_not_name_is_no_entry(tmp_path):
    """RAG_CACHE may be a folder with other files."""
    own = [
        "results/bench/a.json",
        "results/a.json",
        "weights/my-model/model.gguf",
        "vectors/a.npy",
        "notes.txt",
    ]
    own += [
        f"converted/{KEYS[0]}.lock",
        f"stages/search/{KEYS[0]}/batch.lock",
        "converted/mine/a",
        "code/main.py",
    ]
    for name in own:
        put(name, 1000)
    (cache_root() / "results" / KEYS[0]).symlink_to(tmp_path)
    assert left() == set()
    eviction.evict(0, cache_root())
    assert all((cache_root() / name).is_file() for name in own)


def test_what_was_used_longest_ago_goes_first_and_weights_last():
    names = {
        f"stages/search/{KEYS[0]}/{KEYS[1]}.json": 5,
        f"converted/{KEYS[0]}/{KEYS[1]}": 9,
        f"converted/{KEYS[0]}/{KEYS[2]}": 2,
        f"vectors/{KEYS[0]}/{KEYS[1]}.npy": 7,
    }
    for name, days in names.items():
        (put if "." in name else put_folder)(name, days)
    fetched("weights/tiny-weights-1.0", 100)
    order = [*sorted(names, key=lambda name: -names[name]), "weights/tiny-weights-1.0"]
    for most, gone in ((5000, 0), (4999, 1), (3000, 2), (500, 5)):
        eviction.evict(most, cache_root() / "nothing")
        assert left() == set(order[gone:])


def test_what_was_just_used_or_written_stays():
    new = put(f"vectors/{KEYS[0]}/{KEYS[1]}.npy", 0)
    old = put(f"vectors/{KEYS[0]}/{KEYS[2]}.npy", 2)
    protected = put_folder(f"converted/{KEYS[0]}/{KEYS[1]}", 4)
    weights = fetched("weights/tiny-weights-1.0", 3)
    gone = eviction.evict(0, protected)
    assert [entry.path for entry in gone] == [old, weights]
    assert new.exists() and protected.exists() and not old.exists()
    eviction.evict(0, protected / "inner")
    assert protected.exists()


def test_an_entry_that_is_mapped_can_still_be_read():
    import io

    import numpy as np

    content = io.BytesIO()
    np.save(content, np.arange(1000))
    path = cache_root() / "chunk_kv" / f"{KEYS[0]}.npy"
    entries.write(path, content.getvalue())
    array = entries.read_array(path)
    aged(path, 1)
    assert len(eviction.evict(0, cache_root())) == 1 and not path.exists()
    assert array.sum() == 499_500


def test_writing_keeps_the_cache_within_its_limit(monkeypatch, capsys):
    monkeypatch.setenv("RAG_CACHE_GB", "0.00001")  # 10 kB
    for i, key in enumerate(KEYS):
        path = cache_root() / "vectors" / KEYS[0] / f"{key}.npy"
        entries.write(path, bytes(968))  # and 32 of the checksum
        aged(path, 100 - i)
    entries.write(cache_root() / "vectors" / KEYS[1] / f"{KEYS[0]}.npy", bytes(968))
    assert left() == {f"vectors/{KEYS[0]}/{key}.npy" for key in KEYS[11:]} | {
        f"vectors/{KEYS[1]}/{KEYS[0]}.npy"
    }
    printed = capsys.readouterr().err
    assert "larger than 1e-05 GB (RAG_CACHE_GB): 1 entries" in printed


def test_a_process_keeps_the_folders_that_it_has_used():
    """It opens their files again: the weights, for instance, when they are converted."""
    weights = fetched("weights/tiny-weights-1.0", 5)
    other = put_folder(f"converted/{KEYS[0]}/{KEYS[1]}", 1)
    eviction.record_use(weights)
    aged(weights, 5)
    assert [entry.path for entry in eviction.evict(0, cache_root())] == [other]
    assert weights.is_dir()


def test_what_another_process_used_within_ten_minutes_stays():
    minutes = 1 / (24 * 60)
    recent, older = (
        put(f"vectors/{KEYS[0]}/{key}.npy", age * minutes)
        for key, age in zip(KEYS[1:3], (9, 11), strict=True)
    )
    assert [entry.path for entry in eviction.evict(0, cache_root())] == [older]
    eviction.record_use(recent)
    assert time.time() - recent.stat().st_mtime < 60  # recorded to the minute, so ten minutes are known


def test_a_use_is_recorded_to_the_minute_and_decides():
    first, second = (put(f"vectors/{KEYS[0]}/{key}.npy", 5) for key in KEYS[1:3])
    aged(second, 4)
    eviction.record_use(first)
    assert time.time() - first.stat().st_mtime < 60
    stamp = first.stat().st_mtime_ns
    eviction.record_use(first)
    assert first.stat().st_mtime_ns == stamp
    assert [entry.path for entry in eviction.evict(1000, cache_root())] == [second]
    eviction.record_use(cache_root() / "nothing")


def test_what_a_killed_process_left_goes_after_a_day():
    unfinished = put_folder(f"converted/{KEYS[0]}/.{KEYS[1]}.{'a' * 32}.tmp", 2)
    fresh = put(f"vectors/{KEYS[0]}/.{KEYS[1]}.npy.{'b' * 32}.tmp", 0)
    assert [entry.path for entry in eviction.evict(0, cache_root())] == [unfinished]
    assert fresh.exists()


def test_hard_links_count_once():
    put_folder(f"converted/{KEYS[0]}/{KEYS[1]}", 1)
    other = put_folder(f"converted/{KEYS[0]}/{KEYS[2]}", 1, 0)
    (other / "a").unlink()
    os.link(cache_root() / f"converted/{KEYS[0]}/{KEYS[1]}/a", other / "a")
    assert sum(entry.nbytes for entry in eviction.entries()) == 1000


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf"])
def test_a_limit_that_is_no_number_above_zero_is_an_error(monkeypatch, text):
    monkeypatch.setenv("RAG_CACHE_GB", text)
    with pytest.raises(UserError, match=rf"^RAG_CACHE_GB={text} is not valid: it must be a number above 0"):
        entries.write(cache_root() / "code" / f"{KEYS[0]}.json", b"{}")
    monkeypatch.setenv("RAG_CACHE_GB", "")
    assert eviction.size_limit() == 20 * 10**9


def test_an_entry_of_the_future_goes_first():
    """It comes from a wrong clock, or from a copy that preserves times."""
    for name, days in ((f"code/{KEYS[0]}.json", 3), (f"code/{KEYS[1]}.json", -3650)):
        put(name, days)
    assert left() == {f"code/{KEYS[0]}.json", f"code/{KEYS[1]}.json"}
    eviction.evict(1000, cache_root() / "nothing")
    assert left() == {f"code/{KEYS[0]}.json"}
