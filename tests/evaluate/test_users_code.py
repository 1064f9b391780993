"""Stages of a user's own: cached results are used as long as the code of these stages is the same."""

import importlib
import json
import sys
import textwrap
from dataclasses import replace

import pytest

from rag.embed.bag_of_words import BagOfWords
from rag.evaluate.datasets import Dataset
from rag.evaluate.experiment import EvaluationOptions, Experiment
from rag.evaluate.statistics import Statistics
from rag.ingest.chunk.whole import WholeChunker
from rag.prompt import PromptTemplate
from rag.retrieve.search import Lexical, Reranked
from rag.runtime.cache.memo import model_version
from rag.types import Document, UserError

WORDS = ("seal", "whale", "gull", "crab", "tern", "skua")
DOCUMENTS = tuple(Document(f"{a}{i}", f"{a}{i}", f"{a} eats. " * (i + 1)) for a in WORDS for i in range(3))

MODULES = {
    "my_scores": """
        def score(question, text):
            return float(len(text))
        """,
    "my_reranker": """
        from dataclasses import dataclass, replace
        from typing import ClassVar

        @dataclass(frozen=True)
        class Longest:
            depends_on: ClassVar = ()

            def rerank(self, collection, questions, hits):
                from my_scores import score  # late, as by someone who saves time at the start

                pairs = zip(questions, hits)
                scored = [[replace(h, score=score(q, h.chunk.text)) for h in found] for q, found in pairs]
                return [sorted(found, key=lambda hit: -hit.score) for found in scored]
        """,
    "my_chunker": """
        from dataclasses import dataclass

        CUT = 1.0

        @dataclass(frozen=True)
        class Beginning:
            def split(self, text, token_spans, encode=None):
                return [(0, max(1, int(len(text.rstrip()) * CUT)))]
        """,
    "my_embedder": """
        from rag.embed.bag_of_words import BagOfWords

        class Shouting(BagOfWords):
            pass
        """,
}  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """mine(**{module: (old, new)}) -> the modules as a new process loads them, after these edits."""
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within a second, of the same size
    (tmp_path / "mine").mkdir()
    for name, text in MODULES.items():
        (tmp_path / "mine" / f"{name}.py").write_text(textwrap.dedent(text))

    def load(**edits):
        for name, (old, new) in edits.items():
            path = tmp_path / "mine" / f"{name}.py"
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new))
        importlib.invalidate_caches()
        for name in MODULES:
            sys.modules.pop(name, None)
        return {name: importlib.import_module(name) for name in MODULES}

    yield load
    for name in MODULES:
        sys.modules.pop(name, None)


def experiment(modules) -> Experiment:
    qrels = {f"q{i}": {f"{word}{grade}": grade for grade in (1, 2)} for i, word in enumerate(WORDS)}
    prompt = PromptTemplate(user="{question}")
    return Experiment(
        dataset=Dataset(
            name="animals",
            corpus=DOCUMENTS,
            queries={f"q{i}": f"{word} eats" for i, word in enumerate(WORDS)},
            qrels=qrels,
            answers={},
            unjudged={},
            unanswerable=frozenset(),
            drop_self_hits=False,
            problems=(),
        ),
        chunker=modules["my_chunker"].Beginning(),
        embedder=BagOfWords(),
        method=Reranked(Lexical(), modules["my_reranker"].Longest()),
        generator=lambda: None,
        prompt=prompt,
        closed_book=prompt,
        evaluation=EvaluationOptions(depth=10, probes=1),
        statistics=Statistics(resamples=100),
    )


def figure(some: Experiment) -> float:
    return json.loads((some.run() / "metrics.json").read_text())["means"]["nDCG@10"]


def stages(some: Experiment) -> dict[str, int]:
    """Return how many items of each stage were cached."""
    costs = json.loads((some.run() / "costs.json").read_text())
    return {name: stage["reused"] for name, stage in costs["stages"].items()}


NEGATED = ("float(len(text))", "-float(len(text))")


@pytest.mark.parametrize(
    ("edits", "recomputed"),
    [
        ({"my_scores": NEGATED}, {"rerank Longest", "search Reranked"}),
        ({"my_reranker": ("score(q", "-score(q")}, {"rerank Longest", "search Reranked"}),
        ({"my_chunker": ("CUT = 1.0", "CUT = 0.2")}, {"chunk", "rerank Longest", "search Reranked", "search Lexical"}),
    ],
    ids=["scores", "reranker", "chunker"],
)  # fmt: skip
def test_results_of_changed_code_are_computed_again_and_no_others(mine, edits, recomputed):
    first = experiment(mine())
    before = figure(first)
    changed = experiment(mine(**edits))
    assert changed.plan()[0] == ("result", 1, 0)
    assert changed.key != first.key
    assert abs(figure(changed) - before) > 0.01
    found = stages(changed)
    assert {name for name, reused in found.items() if not reused} == recomputed
    undone = experiment(mine(**{name: (new, old) for name, (old, new) in edits.items()}))
    assert undone.key == first.key
    assert figure(undone) == before


def test_unchanged_code_is_not_run_again(mine, monkeypatch):
    first = experiment(mine())
    before = figure(first)
    modules = mine(my_reranker=("@dataclass", "# said more plainly\n@dataclass"))
    again = experiment(modules)
    assert again.key == first.key
    assert again.plan() == [("result", 1, 1)]
    monkeypatch.setattr(Experiment, "_result_files", lambda *_: pytest.fail("this was computed before"))
    assert figure(again) == before


def test_another_experiment_reuses_the_cached_stages(mine):
    first = experiment(mine())
    before = figure(first)
    changed = replace(experiment(mine()), statistics=Statistics(resamples=101))
    assert changed.key != first.key
    assert figure(changed) == before
    assert all(stages(changed).values())


def test_the_code_of_a_users_embedder_is_in_the_key(mine):
    def with_embedder(modules):
        return replace(
            experiment(modules), embedder=modules["my_embedder"].Shouting(), chunker=WholeChunker()
        )

    before = with_embedder(mine()).key
    assert with_embedder(mine(my_embedder=("pass", "loud = True"))).key != before
    assert with_embedder(mine(my_embedder=("loud = True", "pass"))).key == before


def test_a_stage_built_before_its_module_was_reloaded_is_an_error(mine):
    old = experiment(mine())
    mine(my_scores=NEGATED)
    with pytest.raises(
        UserError, match=r"my_.*\.\w+ was loaded again after this one was made: make it again"
    ):
        _ = old.key


def test_a_stage_whose_code_is_broken_or_in_no_file_is_an_error(mine, monkeypatch, tmp_path):
    modules = mine()
    (tmp_path / "mine" / "my_scores.py").write_text("def score(:\n")
    sys.modules.pop("my_scores")  # it is imported when it is first needed
    with pytest.raises(UserError, match=r"my_scores\.py cannot be read as Python"):
        _ = experiment(modules).key
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    monkeypatch.setattr(modules["my_reranker"].Longest, "__module__", "__main__")
    with pytest.raises(UserError, match="in no file, as in a notebook"):
        _ = experiment(modules).key


def test_attributes_of_a_users_object_are_in_the_key(tmp_path, monkeypatch):
    """An embedder around another one: a plain class, whose attributes are objects of another module."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_outer.py").write_text(
        "class Outer:\n    fingerprint = 'x'\n    def __init__(self, parts):\n        self.held = parts, self\n"
    )
    inner = tmp_path / "my_inner.py"

    def version(text: str) -> str:
        inner.write_text(text)
        importlib.invalidate_caches()
        for name in ("my_inner", "my_outer"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        outer, made = importlib.import_module("my_outer"), importlib.import_module("my_inner")
        return model_version(outer.Outer({"first": [made.Inner()]}))

    before = version("class Inner:\n    sign = 1\n")
    assert version("class Inner:\n    sign = -1  \n") != before
    assert version("class Inner:  # the same\n    sign = 1\n") == before
