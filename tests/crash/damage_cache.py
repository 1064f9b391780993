"""Damage any file of the cache and ask for the same result again: it is the same, or an error names the file."""

import gc
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.embed import vector_cache
from rag.embed.bert import BertEmbedder
from rag.embed.vector_cache import CachedEmbedder
from rag.runtime.cache import file_hash
from rag.runtime.code import import_closure
from tests import tiny_models
from tests.crash import campaign, workloads
from tests.crash.campaign import Trial
from tests.crash.damage import damage, linked, or_error, verdict, warm_up
from tests.crash.workloads import Hashed, chunk_reader, enter, passages_of, prompts

_TEXTS = tuple(" ".join(workloads._WORDS[i : i + 1 + i % 5]) for i in range(10))


class Stopped(Hashed):
    """An embedder that raises in its third batch."""

    def __init__(self):
        self._calls = itertools.count(1)

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] = lambda done: None):
        if next(self._calls) == 3:
            raise KeyboardInterrupt
        return super().encode(texts, progress)


@dataclass(frozen=True)
class Subject:
    """A kind of cached files: a function that makes them, one that uses them, and the right answer."""

    name: str
    home: Path
    ask: Callable[[], Any]
    wanted: Any

    def files(self, home: Path) -> list[Path]:
        below = home / "cache" / self.name.partition(" ")[0]
        return sorted(p for p in below.rglob("*") if p.is_file() and p.suffix != ".lock")


def _embed() -> list[bytes]:
    embedder = CachedEmbedder(Hashed())
    return [embedder.encode(_TEXTS).tobytes(), embedder.encode_queries(_TEXTS[:2]).tobytes()]


def _stop_embedding() -> None:
    """Write two of three batches of vectors, and the plan."""
    embedder = CachedEmbedder(Hashed())
    embedder.uncached = Stopped()
    try:
        embedder.encode(_TEXTS)
    except KeyboardInterrupt:
        return
    raise RuntimeError("it was not interrupted")


def _read_passages(dtype: str) -> dict[str, bytes]:
    chunk_reader(dtype).fill(prompts(_TEXTS))
    return passages_of(chunk_reader(dtype), _TEXTS)


def _version() -> str:
    return import_closure.CodeReader().version("rag.types", "rag.runtime.options")


def subjects(folder: Path) -> list[Subject]:
    warm_up()
    vector_cache._BATCH = 4
    made = workloads.jobs(random.Random(2), 6, 20)
    weights = tiny_models.write_encoder(folder / "encoder")
    for file in [*weights.iterdir()]:
        os.utime(file, (1000, 1000))
    file_hash._RACY_NS = 0  # the digest of a file is cached at once

    def evaluate() -> Any:
        for job in made:
            job.run()
        return dict(workloads.look_at_results(made, Path(os.environ["RAG_CACHE"]).parent))

    def encode() -> bytes:
        return BertEmbedder(str(weights)).encode(_TEXTS).tobytes()

    kinds: list[tuple[str, Callable, Callable]] = [
        ("vectors", _embed, _embed),
        ("vectors of a run that was stopped", _stop_embedding, _embed),
        ("results", evaluate, evaluate),
        ("stages", evaluate, evaluate),
        ("chunk_kv in float16", lambda: _read_passages("float16"), lambda: _read_passages("float16")),
        ("chunk_kv in int8", lambda: _read_passages("int8"), lambda: _read_passages("int8")),
        ("converted", encode, encode),
        ("sha256", encode, lambda: [file_hash.file_sha256(file) for file in sorted(weights.iterdir())]),
        ("code", _version, _version),
    ]
    return [_subject(folder, *kind) for kind in kinds]


def _subject(folder: Path, name: str, make: Callable[[], Any], ask: Callable[[], Any]) -> Subject:
    home = folder / name
    enter(home)
    make()
    if name == "stages":
        shutil.rmtree(home / "cache" / "results")
    again = folder / f"{name}, asked"
    linked(home, again)
    enter(again)
    return Subject(name, home, ask, ask())


def trials(first: int, count: int, folder: Path) -> Iterator[Trial]:
    made = subjects(folder)
    gc.collect()
    gc.freeze()  # makes the collection after each trial quick
    for number in range(first, count):
        draw = random.Random(f"damage to the cache {number}")
        subject, home = made[number % len(made)], folder / f"trial {number}"
        linked(subject.home, home)
        done, damaged = damage(draw, subject.files(home))
        done = f"{subject.name}: {done}"
        enter(home)
        campaign.begin(number, done)
        yield Trial(number, *verdict([subject.wanted], [or_error(subject.ask)], damaged, done))
        gc.collect()  # frees memory maps
        shutil.rmtree(home)


if __name__ == "__main__":
    campaign.main(trials)
