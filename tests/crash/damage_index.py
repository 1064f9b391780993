"""Damage any file of an index, and search it with several methods."""

import gc
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rag import pipeline
from rag.embed import Embedder
from rag.embed.bag_of_words import BagOfWords
from rag.embed.bert import BertEmbedder
from rag.index import store
from rag.ingest.chunk.fixed import FixedChunker
from rag.retrieve import Retriever
from rag.retrieve.cached import cached_search
from rag.retrieve.collection import Collection
from rag.retrieve.rerank.maxsim import MaxSim
from rag.retrieve.rerank.mmr import MMR
from rag.retrieve.search import Dense, Hybrid, Lexical, Reranked
from tests import tiny_models
from tests.crash import campaign
from tests.crash.campaign import Trial
from tests.crash.damage import damage, linked, or_error, verdict, warm_up
from tests.crash.workloads import ANALYZER, enter, write_corpus

_WORDS = Lexical(analyzer=ANALYZER)
_HYBRID = Hybrid({"dense": Dense(), "lexical": _WORDS}, depth=20)
_METHODS = (Dense(), _WORDS, _HYBRID, Reranked(Dense(), MMR(), depth=10))
_QUESTIONS = ("ab cd ef", "ha gb", "cc dd aa bb", "ef")
_BEST = 4


@dataclass(frozen=True)
class Subject:
    """An index, the methods that search it, and their results without damage."""

    name: str
    path: Path
    embedder: Embedder
    methods: Sequence[Retriever]
    wanted: Sequence[object]


def ask(path: Path, embedder: Embedder, methods: Sequence[Retriever]) -> list[object]:
    """Return each method's results, or the exception that it raised."""
    opened = or_error(lambda: store.Index.open(path))
    if isinstance(opened, Exception):
        return [opened] * len(methods)
    restored = or_error(lambda: opened.restore(embedder))
    if isinstance(restored, Exception):
        return [restored] * len(methods)
    collection = Collection(opened, restored)
    return [or_error(lambda method=method: _answers(collection, method)) for method in methods]


def _answers(collection: Collection, method: Retriever) -> list[object]:
    found = cached_search(collection, method, _QUESTIONS, _BEST)
    return [
        (hit.chunk, hit.score, collection.index.document_text(hit.chunk.document_id))
        for hits in found
        for hit in hits
    ]


def subjects(folder: Path) -> list[Subject]:
    """Return an index of a tiny encoder and one of word counts, both with postings and of several pieces."""
    warm_up()
    enter(folder)
    corpus = write_corpus(folder / "corpus", random.Random(1), 45, 900)
    encoder = BertEmbedder(str(tiny_models.write_encoder(folder / "weights")))
    late = Reranked(_WORDS, MaxSim(), depth=6)
    made = []
    for name, embedder, methods in (
        ("encoder", encoder, (*_METHODS, late)),
        ("bag of words", BagOfWords(), _METHODS),
    ):
        path = folder / name
        pipeline.ingest(corpus, path, FixedChunker(size=40, overlap=10), embedder, ANALYZER)
        wanted = ask(path, embedder, methods)
        if errors := [answer for answer in wanted if isinstance(answer, Exception)]:
            raise errors[0]
        made.append(Subject(name, path, embedder, methods, wanted))
    return made


def trials(first: int, count: int, folder: Path) -> Iterator[Trial]:
    made = subjects(folder)
    gc.collect()
    gc.freeze()  # makes the collection after each trial quick
    for number in range(first, count):
        draw = random.Random(f"damage to an index {number}")
        subject, trial_folder = made[number % len(made)], folder / f"trial {number}"
        linked(subject.path, trial_folder)
        files = sorted(path for path in trial_folder.rglob("*") if path.is_file() and path.suffix != ".lock")
        done, damaged = damage(draw, files)
        done = f"{subject.name}: {done}"
        if damaged[0].name == "manifest.json":
            damaged.append(trial_folder)  # without a manifest the error names the folder
        campaign.begin(number, done)
        yield Trial(
            number,
            *verdict(subject.wanted, ask(trial_folder, subject.embedder, subject.methods), damaged, done),
        )
        gc.collect()  # frees memory maps
        shutil.rmtree(trial_folder)


if __name__ == "__main__":
    campaign.main(trials)
