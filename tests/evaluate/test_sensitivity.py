"""Numerical sensitivity: changes are counted as a plain computation counts them; where nothing changes, all are 0."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import sensitivity as script
from hydra import compose, initialize_config_dir
from launch import CONF
from quoting import quote_overrides
from settings import build

from rag.context import ContextOptions
from rag.embed import Embedder
from rag.embed.bag_of_words import BagOfWords
from rag.embed.bert import BertEmbedder
from rag.evaluate.datasets import Dataset
from rag.evaluate.sensitivity.measure import measure_sensitivity
from rag.evaluate.sensitivity.options import SensitivityOptions, SystemUnderTest
from rag.evaluate.sensitivity.reduced_precision import ReducedPrecisionEmbedder, reduce_precision
from rag.evaluate.sensitivity.report import MetricChange, SensitivityReport
from rag.generate import batched, prefill_batches, scheduler
from rag.generate.local import LocalGenerator
from rag.ingest.chunk.whole import WholeChunker
from rag.pipeline import AnswerOptions, Reader
from rag.prompt import PromptTemplate
from rag.retrieve.search import Dense, Hybrid, Lexical
from rag.runtime import shapes
from rag.types import Document, UserError
from tests import tiny_models
from tests.typecheck import unchecked

WORDS = "seal whale gull krill fish ice cliff storm tide moss reef wind".split()
TEMPLATE = PromptTemplate(
    system="", user="{context} {question}", passage="{text}", separator=" ", abstain_answer=""
)
FEW = {"tokens_per_batch": (16, 512), "search_batches": (1, 3, "all"), "answers": 0}


def dataset(count: int = 12, questions: int = 7) -> Dataset:
    """Texts of random words; each question is about the document of its number, graded 2, and the next one, 1."""
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(3, 9))) for _ in range(count)]
    names = [f"q{i}" for i in range(questions)]
    return Dataset(
        name="tiny",
        corpus=tuple(Document(f"d{i}", f"d{i}", text) for i, text in enumerate(texts)),
        queries={name: " ".join(draw.choice(WORDS, 3)) for name in names},
        qrels={name: {f"d{i}": 2, f"d{i + 1}": 1} for i, name in enumerate(names)},
        answers=dict.fromkeys(names, ("stand still",)),
        unjudged={},
        unanswerable=frozenset(),
        drop_self_hits=False,
        problems=(),
    )


class Points:
    """Random unit vectors by text; they depend on its first `reads` characters, as with a faulty batching."""

    dim, score_threshold, spec = 4, None, {"kind": "points"}

    def __init__(self, reads: int | None = None, careless: bool = False):
        self.reads, self.careless, self.fingerprint = reads, careless, f"points {reads} {careless}"

    def encode(self, texts, progress=lambda done: None):
        rows = [self.point(text[: self.reads]) for text in texts]
        return np.array(rows, np.float32).reshape(-1, self.dim)

    def encode_queries(self, texts):
        """A careless one looks the other way when it is asked one question alone."""
        return self.encode(texts) * np.float32(-1 if self.careless and len(texts) == 1 else 1)

    def point(self, text):
        vector = np.random.default_rng(list(text.encode())).normal(size=self.dim)
        return vector / np.linalg.norm(vector)

    def token_spans(self, text):
        return np.zeros((0, 2), np.int64)

    def fit(self, texts):
        return self

    def save(self, folder):
        pass

    def restore(self, folder):
        return self


class Moody:
    """A generator that answers well when it is asked one thing at a time, and shortly in bfloat16."""

    fingerprint, description, context_length = "moody", "a moody one", 10_000

    def __init__(self, dtype: str = "float32"):
        self.dtype, self.calls = dtype, []

    def count(self, text):
        return len(text.split())

    def prompt_tokens(self, messages):
        return sum(self.count(message.content) for message in messages)

    def generate(self, requests):
        self.calls.append(len(requests))
        text = "stand" if self.dtype == "bfloat16" else "stand still" if len(requests) == 1 else "run"
        return [text] * len(requests)

    def stream(self, request):
        raise NotImplementedError


def reader(generator) -> Reader:
    return Reader(generator, TEMPLATE, ContextOptions(min_score=None), options=AnswerOptions(8))


def subject(embedder, method=None, generator=Moody, **makers) -> SystemUnderTest:
    return SystemUnderTest(
        dataset(), WholeChunker(), embedder, method or Dense(), generator, reader, **makers
    )


def by_setting(rows) -> dict:
    return {(row.axis, row.setting): row for row in rows}


# --- oracles: rankings and measures by numpy alone


def ranked(passages: np.ndarray, questions: np.ndarray, k: int) -> list[list[int]]:
    scores = questions.astype(np.float64) @ passages.astype(np.float64).T
    return [np.argsort(-row, kind="stable")[:k].tolist() for row in scores]


def ndcg(ranking: list[int], number: int) -> float:
    """Question `number` with its document graded 2 and the next graded 1."""
    gains = {number: 2, number + 1: 1}
    found = sum(gains.get(document, 0) / math.log2(place + 2) for place, document in enumerate(ranking))
    return found / (2 + 1 / math.log2(3))


def texts() -> tuple[list[str], list[str]]:
    return [document.text for document in dataset().corpus], list(dataset().queries.values())


def bfloat16(vectors: np.ndarray) -> np.ndarray:
    """The upper half of a float32's bits, rounded to nearest, ties to even."""
    bits = vectors.astype(np.float32).view(np.uint32)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return upper.astype(np.uint32).view(np.float32)


def check_against(row, before: list[list[int]], after: list[list[int]]) -> None:
    """The row's counts are those of two lists of rankings."""
    pairs = list(enumerate(zip(before, after, strict=True)))
    assert row.changed == tuple(f"q{i}" for i, (old, new) in pairs if old != new)
    assert row.replaced == tuple(f"q{i}" for i, (old, new) in pairs if set(old) != set(new))
    moves = [ndcg(new, i) - ndcg(old, i) for i, (old, new) in pairs]
    [movement] = row.movements.values()
    assert movement.change == pytest.approx(np.mean(moves), abs=1e-6)
    assert movement.largest == pytest.approx(np.abs(moves).max(), abs=1e-6)
    assert movement.mean == pytest.approx(np.mean([ndcg(new, i) for i, new in enumerate(after)]), abs=1e-6)


# --- lists


def test_what_depends_on_its_batch_is_caught():
    """An embedder that uses less of a text in small batches: the counts agree with plain numpy."""
    vary = SensitivityOptions(k=4, measure="nDCG@4", vector_dtypes=(), **FEW)
    made = measure_sensitivity(
        subject(Points(), embedder_of_batch=lambda n: Points(n if n < 100 else None)), vary
    )
    rows = by_setting(made.lists)
    passages, questions = texts()
    whole = ranked(Points().encode(passages), Points().encode(questions), 4)
    cut = ranked(Points(16).encode(passages), Points(16).encode(questions), 4)
    assert whole != cut
    check_against(rows["tokens_per_batch", "16"], whole, cut)
    check_against(rows["tokens_per_batch", "512"], whole, whole)
    assert rows["tokens_per_batch", "512"].score_difference == 0
    assert made.means == {"nDCG@4": pytest.approx(np.mean([ndcg(r, i) for i, r in enumerate(whole)]), abs=1e-6)} | {
        "F1": None, "contains": None}  # fmt: skip
    changed = len(rows["tokens_per_batch", "16"].changed)
    move = abs(rows["tokens_per_batch", "16"].movements["nDCG@4"].change)
    assert made.verdict == (
        f"Of 7 top-4 lists {changed} change with the batch size and move nDCG@4 by up to {move:.4f}."
    )


def test_questions_that_depend_on_their_company_are_caught():
    made = measure_sensitivity(
        subject(Points(careless=True)), SensitivityOptions(k=4, measure="nDCG@4", vector_dtypes=(), **FEW)
    )
    rows = by_setting(made.lists)
    passages, questions = (Points().encode(some) for some in texts())
    alone, together = ranked(passages, -questions, 4), ranked(passages, questions, 4)
    check_against(rows["search_batches", "1"], together, alone)
    assert rows["search_batches", "3"].changed == ("q6",)  # the seventh is alone in the third batch
    check_against(rows["search_batches", "all"], together, together)
    assert made.skipped == ("tokens_per_batch is left out: the embedder has no such setting.",)


def test_rounded_vectors_change_what_numpy_says():
    passages, questions = (Points().encode(some) for some in texts())
    assert (reduce_precision(passages, "bfloat16") == bfloat16(passages)).all()
    assert (reduce_precision(passages, "float16") == passages.astype(np.float16)).all()
    vary = SensitivityOptions(k=12, measure="nDCG@12", **FEW)
    rows = by_setting(measure_sensitivity(subject(Points()), vary).lists)
    exact = ranked(passages, questions, 12)
    check_against(
        rows["vector_dtypes", "bfloat16"], exact, ranked(bfloat16(passages), bfloat16(questions), 12)
    )
    scores = [q.astype(np.float64) @ p.astype(np.float64).T for p, q in
              ((passages, questions), (bfloat16(passages), bfloat16(questions)))]  # fmt: skip
    difference = rows["vector_dtypes", "bfloat16"].score_difference
    assert difference == pytest.approx(np.abs(scores[0] - scores[1]).max(), abs=1e-6)
    assert rows["vector_dtypes", "float32"].score_difference == 0
    assert 0 < rows["vector_dtypes", "float16"].score_difference < difference


def test_a_rounded_embedder_is_one():
    inner = BagOfWords().fit(["a seal", "a whale"])
    embedder = ReducedPrecisionEmbedder(inner, "bfloat16")
    assert isinstance(embedder, Embedder)
    assert embedder.dim == 3
    assert embedder.fingerprint not in (
        inner.fingerprint,
        ReducedPrecisionEmbedder(inner, "float32").fingerprint,
    )
    assert embedder.fit(["a b c d"]).dim == 4
    [vector] = embedder.encode(["a seal"])
    assert np.unique(vector).tolist() == [0, bfloat16(np.array([1 / math.sqrt(2)], np.float32))[0]]
    assert embedder.encode_queries(["a seal"]).tolist() == [vector.tolist()]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return str(tiny_models.write_encoder(tmp_path_factory.mktemp("encoder")))


def test_our_encoder_does_not_depend_on_its_batch(encoder):
    """Batches of one text and of all, hence other paddings: the same lists, scores equal to rounding."""
    bert = subject(
        BertEmbedder(encoder), Hybrid(), embedder_of_batch=lambda n: BertEmbedder(encoder, tokens_per_batch=n)
    )
    vary = SensitivityOptions(
        k=5,
        measure="MAP",
        tokens_per_batch=(16,),
        search_batches=(1,),
        vector_dtypes=("float32",),
        answers=0,
    )
    made = measure_sensitivity(bert, vary)
    assert [row.axis for row in made.lists] == ["tokens_per_batch", "search_batches", "vector_dtypes"]
    for row in made.lists:
        assert (row.lists, row.changed, row.replaced) == (7, (), ())
        assert row.score_difference < 1e-5
        assert (row.movements["MAP"].change, row.movements["MAP"].largest) == (0, 0)
    assert made.skipped == ()
    assert made.verdict == "Of 7 top-5 lists 0 change with the batch size."


def test_axes_that_cannot_matter_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    made = measure_sensitivity(
        subject(Points(), Lexical(), embedder_of_batch=Points), SensitivityOptions(**FEW)
    )
    assert [row.axis for row in made.lists] == ["search_batches"] * 3
    assert all(row.changed == () and row.score_difference == 0 for row in made.lists)
    assert made.skipped == ("tokens_per_batch and vector_dtypes are left out: the method uses no vectors.",)
    assert list(tmp_path.iterdir()) == []  # nothing was cached, so nothing cached was used


def test_a_sample_of_the_questions_and_nothing_varied():
    vary = SensitivityOptions(
        questions=3, tokens_per_batch=(), search_batches=(1,), vector_dtypes=(), answers=0
    )
    made = measure_sensitivity(subject(BagOfWords()), vary)
    assert made.dataset["queries"] == made.lists[0].lists == 3
    nothing = measure_sensitivity(
        subject(BagOfWords()), SensitivityOptions(search_batches=(), vector_dtypes=(), answers=0)
    )
    assert (nothing.lists, nothing.answers, nothing.verdict) == ((), (), "Nothing was varied.")


# --- answers

ANSWERS = SensitivityOptions(
    tokens_per_batch=(),
    search_batches=(),
    vector_dtypes=(),
    answers=5,
    answer_batches=(1, 4),
    answer_budgets=0,
    answer_dtypes=("float32", "bfloat16"),
    passages=2,
)


def test_answers_that_depend_on_batch_and_dtype_are_counted():
    whole = Moody()
    steps = []
    made = measure_sensitivity(
        subject(Points(), generator_of_batch=lambda n: whole, generator_of_dtype=Moody),
        ANSWERS,
        lambda *step: steps.append(step),
    )
    rows = by_setting(made.answers)
    assert made.means["F1"] == made.means["contains"] == 0  # "run", five in one call
    assert whole.calls == [1] * 5 + [4, 1]
    assert len(rows["answer_batches", "1"].changed) == 5
    assert rows["answer_batches", "1"].movements["F1"] == MetricChange(1.0, 1.0, 1.0)
    assert len(rows["answer_batches", "4"].changed) == 1  # the fifth was alone
    assert rows["answer_batches", "4"].movements["F1"] == MetricChange(0.2, 0.2, 1.0)
    assert rows["answer_dtypes", "float32"].changed == ()
    assert rows["answer_dtypes", "bfloat16"].movements["F1"].mean == pytest.approx(2 / 3)  # "stand"
    assert rows["answer_dtypes", "bfloat16"].movements["contains"] == MetricChange(0.0, 0.0, 0.0)
    assert made.verdict == (
        "Of 5 answers 5 change with the batch size and move F1 by up to 1.0000, 0 change in float32, "
        "5 change in bfloat16 and move F1 by up to 0.6667."
    )
    assert steps[-1] == ("answers", 4, 4)


def test_a_generator_without_the_settings_is_varied_by_what_it_is_given():
    made = measure_sensitivity(subject(Points()), ANSWERS)
    assert [(row.setting, len(row.changed)) for row in made.answers] == [("1", 5), ("4", 1)]
    assert made.skipped[-1] == "answer_dtypes is left out: the generator has no such setting."


def test_movement_is_over_the_queries_that_have_values():
    assert MetricChange.between([None, 0.5, 1.0], [1.0, 0.25, 1.0]) == MetricChange(0.625, -0.125, 0.25)
    assert MetricChange.between([None], [1.0]) == MetricChange(None, None, None)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("decoder")
    tiny_models.write_decoder(folder)
    return str(folder)


def test_our_generator_does_not_depend_on_its_batch(decoder):
    vary = replace(ANSWERS, answers=2, answer_batches=(1,), answer_dtypes=("float32",))
    made = measure_sensitivity(
        subject(
            BagOfWords(),
            generator=lambda: LocalGenerator(decoder, "float32"),
            generator_of_batch=lambda n: LocalGenerator(decoder, "float32", tokens_per_batch=n),
            generator_of_dtype=lambda name: LocalGenerator(decoder, name),
        ),
        vary,
    )
    assert [(row.axis, row.answers, row.changed) for row in made.answers] == [
        ("answer_batches", 2, ()),
        ("answer_dtypes", 2, ()),
    ]


@pytest.mark.parametrize("small", [False, True], ids=["as it is", "caches too small"])
def test_answers_that_need_another_size_of_cache_are_tried(decoder, small, monkeypatch):
    """A scheduler that gives prompts prefilled together the cache of the shortest is detected."""
    if small:

        def planned(requests, new_tokens, *rest):
            lengths = [len(prompt) for prompt, _ in requests]
            for group in prefill_batches.plan_batches(requests, new_tokens, *rest):
                shortest = min(lengths[i] for i in group.members)
                yield replace(group, capacity=shapes.round_up_cache(shortest + new_tokens))

        monkeypatch.setattr(batched, "plan_batches", lambda *about: list(planned(*about)))
        monkeypatch.setattr(scheduler, "check_capacity", lambda *_: None)
    vary = replace(ANSWERS, answers=20, answer_batches=(), answer_budgets=2, answer_dtypes=())
    about = replace(subject(BagOfWords()), dataset=dataset(24, 20))
    made = measure_sensitivity(replace(about, generator=lambda: LocalGenerator(decoder, "float32")), vary)
    assert [row.axis for row in made.answers] == ["answer_budgets"] * 2
    assert all(row.answers == 20 and row.setting.endswith(" tokens") for row in made.answers)
    changed = {query for row in made.answers for query in row.changed}
    assert bool(changed) == small
    assert f"{len(changed)} change with the batch size" in made.verdict


# --- settings and the script


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"k": 0}, "k=0 "),
        ({"questions": 0}, "questions=0 "),
        ({"answers": -1}, "answers=-1 "),
        ({"passages": 0}, "passages=0 "),
        ({"tokens_per_batch": (64, 0)}, r"tokens_per_batch=\[64,0\]"),
        ({"search_batches": (-1, "all")}, r"search_batches=\[-1,all\]"),
        ({"vector_dtypes": ("int8",)}, r"int8.* float32, bfloat16 or float16"),
        ({"measure": "nDGC"}, "no measure"),
    ],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(UserError, match=says) as told:
        unchecked(SensitivityOptions, **settings)
    assert len(str(told.value).splitlines()) == 1


def test_enough_documents_for_list_passages_and_measure():
    assert SensitivityOptions(k=5, measure="Recall@20").depth == 20
    assert SensitivityOptions(k=5, measure="MAP", passages=8).depth == 8
    assert SensitivityOptions(k=30, measure="nDCG@10").depth == 30


def strict(text: str):
    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def folder(tmp_path):
    """The layout of BEIR, with three passages and two questions."""
    (tmp_path / "qrels").mkdir()
    passages = [{"_id": f"d{i}", "text": text} for i, text in enumerate(("eat fish", "eat krill", "nests"))]
    questions = [{"_id": "q1", "text": "fish", "answers": ["fish"]}, {"_id": "q2", "text": "krill nests"}]
    for name, rows in (("corpus", passages), ("queries", questions)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td0\t1\nq2\td2\t1\n")
    return tmp_path


def test_the_script_prints_tables_and_writes_the_report(decoder, folder, monkeypatch, capsys):
    monkeypatch.setenv("RAG_CACHE", str(folder / "cache"))
    monkeypatch.setattr(script, "run_dir", lambda: folder)
    few = ("sensitivity.answers=1", "sensitivity.answer_batches=[2]", "sensitivity.answer_dtypes=[bfloat16]",
           "sensitivity.answer_budgets=1")  # fmt: skip
    model = ("embedder=bag_of_words", f"generator.weights={decoder}", "answer.max_new_tokens=4")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("sensitivity", quote_overrides([f"dataset.path={folder}", *model, *few]))
    script.main(config)
    out = capsys.readouterr().out
    record = strict((folder / "sensitivity.json").read_text())
    assert record["verdict"] in out.replace("\n", " ")
    assert (folder / "verdict.txt").read_text() == record["verdict"] + "\n"
    assert [(row["axis"], row["setting"], row["lists"]) for row in record["lists"]] == [
        ("search_batches", "1", 2),
        ("search_batches", "7", 2),
        ("search_batches", "all", 2),
        ("vector_dtypes", "float32", 2),
        ("vector_dtypes", "bfloat16", 2),
        ("vector_dtypes", "float16", 2),
    ]
    assert record["means"]["nDCG@10"] == pytest.approx((1 + 1) / 2)
    assert [row["setting"] for row in record["answers"]] == ["2", "bfloat16"]
    assert set(record["answers"][0]["movements"]) == {"F1", "contains"}
    assert record["skipped"] == [
        "tokens_per_batch is left out: the embedder has no such setting.",
        "answer_budgets is left out: no two prompts are prefilled together and need caches of two sizes.",
    ]
    assert record["environment"]["device"]
    assert record["variations"]["search_batches"] == [1, 7, "all"]
    for heading in ("2 top-10 lists", "1 answers", "passages", "bfloat16"):
        assert heading in out


@pytest.mark.parametrize(
    "wrong", ["search_batches=all", "search_batches=[some]", "answer_batches=[all]", "tokens_per_batch=[x]"]
)
def test_settings_of_the_wrong_type_are_named(wrong):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("sensitivity", ["dataset=sample", f"sensitivity.{wrong}"])
    with pytest.raises(UserError, match=f"sensitivity.{wrong.partition('=')[0]}"):
        build(config.sensitivity)


def test_the_makers_follow_what_a_target_takes():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("sensitivity", ["dataset=sample", "generator=ollama"])
    assert script.takes(config.embedder, "tokens_per_batch")
    assert not script.takes(config.generator, "dtype")


def test_a_report_is_plain_values():
    made = measure_sensitivity(subject(Points()), SensitivityOptions(k=2, measure="MAP", **FEW))
    assert isinstance(made, SensitivityReport)
    record = strict(json.dumps(made.summary(), allow_nan=False))
    assert record["method"] == "Dense(index=Exact())"
    assert len(record["dataset"]["fingerprint"]) == 64
