"""The benchmarks that answer questions: their question set, what they compare, and their peer llama.cpp."""

import sys
from dataclasses import astuple, replace

import numpy as np
import pytest

from rag.bench import generate
from rag.bench.generate import work_of
from rag.bench.peers.llama_cpp import LLAMA_CPP, LlamaCppGenerator, open_llama_cpp, requantised
from rag.bench.pipeline import AnswerTimes
from rag.bench.pipeline import rows as pipeline_rows
from rag.bench.question_answering import MEASURES, EngineAnswers, rows
from rag.bench.questions import Task, another_prompt, joined, messages
from rag.evaluate.statistics import Statistics
from rag.generate import Request
from rag.generate.local import LocalGenerator
from rag.models import adapters
from rag.prompt import PromptTemplate
from rag.types import Document, Message, UserError
from tests import tiny_models

# --- from a question to its answer


def test_times_become_a_row_for_each_of_ours():
    times = {
        "int8, reuse none": [
            AnswerTimes(0.1, 1.0, 0.01, 1000, 64),
            AnswerTimes(0.3, 1.2, 0.02, 900, 64),
            AnswerTimes(0.2, 1.1, 0.03, 950, 64),
        ],
        "int8, reuse chunk": [AnswerTimes(0.05, 0.5, 0.01, 1000, 64)] * 3,
        LLAMA_CPP: [AnswerTimes(0.4, 2.2, 0.01, 1000, 64)] * 3,
    }
    plain, chunk = pipeline_rows(times, list(times)[:2])
    assert astuple(plain.ours["first token ms"]) == pytest.approx((200, 100, 300))
    assert plain.ours["prompt tokens"].median == 950
    assert plain.peers == chunk.peers
    assert plain.ratio == {
        f"{LLAMA_CPP}, first": pytest.approx(2.0),
        f"{LLAMA_CPP}, last": pytest.approx(2.0),
    }
    assert chunk.ratio == {
        f"{LLAMA_CPP}, first": pytest.approx(8.0),
        f"{LLAMA_CPP}, last": pytest.approx(4.4),
    }


def test_documents_of_one_title_are_joined():
    documents = [
        Document("a", "a", "one", "T"),
        Document("b", "b", "two", "T"),
        Document("c", "c", "x"),
        Document("d", "d", "y"),
    ]
    assert [(d.id, d.text) for d in joined(documents)] == [("a", "one\n\ntwo"), ("c", "x"), ("d", "y")]


def test_another_prompt_has_the_passages_in_another_order(questions, weights):
    questions = replace(questions, prompt=PromptTemplate("{context}\n{question}", passage="[{n}] {text}"))
    search, asked = questions.load()
    reader = questions.reader(LocalGenerator(weights, "float32"), 4)
    [message] = messages(asked[0], search, reader)
    [other] = another_prompt(asked[0], search, reader)
    *passages_of, question = message.content.splitlines()
    assert question == asked[0] not in other.content
    assert sorted(filter(None, passages_of)) == sorted(filter(None, other.content.splitlines()[:-1]))
    assert other.content.split("]")[0] != message.content.split("]")[0]  # another passage comes first


def test_pipeline_without_the_peer(configured, questions, weights, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # importing it raises ImportError
    monkeypatch.setattr(adapters, "default_reader", None)  # it runs with the weights alone, as the peer does
    options = {"weights": weights, "dtypes": ("float32",), "kv_reuse": ("none",), "new_tokens": 3}
    options["questions"] = replace(questions, passage_tokens=8)
    [row] = configured("pipeline", **options, repeats=2, warmup=1).run()
    assert row.case == "float32, reuse none"
    assert 0 < row.ours["first token ms"].median < row.ours["last token ms"].median
    assert not row.peers and not row.ratio
    assert f"{LLAMA_CPP} is left out, its columns stay empty: it is not installed" in capsys.readouterr().err
    with pytest.raises(UserError, match="only 3 questions"):
        configured("pipeline", **options, repeats=3, warmup=1).run()


def test_evaluation_without_the_peer(configured, questions, weights, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(adapters, "default_reader", None)
    options = {"questions": questions, "weights": weights, "dtypes": ("float32",), "max_new_tokens": 3}
    [row] = configured("evaluation", **options, count=1).run()
    assert row.ours["answers/s"] == pytest.approx(1 / row.ours["seconds"])
    assert not row.peers
    assert f"{LLAMA_CPP} is left out, its columns stay empty: it is not installed" in capsys.readouterr().err
    with pytest.raises(UserError, match="needs 4 questions"):
        configured("evaluation", **options, count=2).run()


# --- tokens a second


def test_generate_without_the_peer(configured, questions, weights, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(adapters, "default_reader", None)
    monkeypatch.setattr(generate, "_TOKEN_IDS", (0, 20))
    options = {"questions": questions, "weights": weights, "dtypes": ("float32",), "new_tokens": 4}
    options |= {"prompt_tokens": (5,), "contexts": (3, 5), "speculative": (), "repeats": 2}
    rows = configured("generate", **options).run()
    assert [row.case for row in rows] == [
        "prefill 5, float32",
        "decode at 3, float32",
        "decode at 5, float32",
    ]
    assert all(row.ours["tokens/s"].low > 0 and not row.peers for row in rows)
    assert f"{LLAMA_CPP} is left out, its columns stay empty: it is not installed" in capsys.readouterr().err


def test_the_work_of_a_model_leaves_out_what_a_token_does_not_read():
    model = tiny_models.tiny_decoder()
    config = model.config
    m, f = config.hidden_size, config.intermediate_size
    head = m // config.num_attention_heads
    layer = 2 * m * m + 2 * m * head * config.num_key_value_heads + 3 * m * f
    norms = (2 * config.num_hidden_layers + 1) * m
    work = work_of(model, "float32")
    assert work.flop == 2 * config.num_hidden_layers * layer
    assert work.nbytes == 4 * (config.num_hidden_layers * layer + norms + config.vocab_size * m)
    assert work.products(5) == ("float32 GFLOP/s", work.flop)


def test_missing_tokens_raise_an_error():
    with pytest.raises(RuntimeError, match="3 tokens were written instead of 4"):
        generate.timed(lambda prompt, budget: iter([1, 2]), [1], 4)


TASKS = [
    Task((Message("user", "Who?"),), ("a red fox",)),
    Task((Message("user", "Where?"),), ("on ice", "ice")),
    Task((Message("user", "How many?"),), ("7",)),
    Task((Message("user", "When?"),), ("in May",)),
]
OURS = EngineAnswers(["The red fox.", "on thin ice", " 7", "June"], [-1.0, -2.0, -3.0, -4.0], 2.0, 1.0, 0.5)
THEIRS = EngineAnswers(["A red fox", "water", "7", "in May"], [-2.0, -2.5, -3.0, -4.5], 6.0, 3.0)


def test_question_answering_compares_question_by_question():
    *measured, effort = rows(TASKS, {"ours": OURS, LLAMA_CPP: THEIRS}, Statistics(resamples=1000))
    assert [row.case for row in measured] == [f"{name}, 4 questions" for name in MEASURES]
    means = {row.case.split(",")[0]: (row.ours["mean"], row.peers[LLAMA_CPP]["mean"]) for row in measured}
    assert means["EM"] == pytest.approx((2 / 4, 3 / 4))
    # "on thin ice" is 4/5 of "on ice"
    assert means["F1"] == pytest.approx(((1 + 4 / 5 + 1 + 0) / 4, 3 / 4))
    assert means["contains"] == pytest.approx((3 / 4, 3 / 4))
    assert means["log-likelihood"] == pytest.approx((-2.5, -3.0))
    for row in measured:
        mine, its = row.ours, row.peers[LLAMA_CPP]
        assert mine["low"] <= mine["mean"] <= mine["high"]
        assert its["ours minus it, mean"] == pytest.approx(mine["mean"] - its["mean"])
        assert its["ours minus it, low"] <= its["ours minus it, mean"] <= its["ours minus it, high"]
    # three differences of one sign: of the eight patterns of signs, two are as far from 0
    assert measured[-1].peers[LLAMA_CPP]["p"] == pytest.approx(2 / 8)
    assert effort.ours == {"answering s": 2.0, "scoring s": 1.0, "of these compiling s": 0.5}
    assert effort.peers[LLAMA_CPP] == {"answering s": 6.0, "scoring s": 3.0, "answers that differ": 3}
    assert effort.ratio == {LLAMA_CPP: 3.0}


def test_question_answering_without_the_peer_leaves_its_columns_empty(
    configured, questions, weights, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(adapters, "default_reader", None)
    one = replace(questions, k=1, limit=3)
    *measured, effort = configured(
        "question_answering", questions=one, weights=weights, max_new_tokens=4
    ).run()
    assert [row.case for row in measured] == [f"{name}, 3 questions" for name in MEASURES]
    assert not any(row.peers or row.ratio for row in [*measured, effort])
    assert measured[-1].ours["mean"] < 0  # a logarithm of a probability
    assert f"{LLAMA_CPP} is left out, its columns stay empty: it is not installed" in capsys.readouterr().err


def test_quality_compares_each_setting_with_the_first(configured, questions, weights, tmp_path):
    options = {"questions": replace(questions, k=2), "weights": weights, "max_new_tokens": 4}
    reuse = {"kv_reuse": "chunk", "kv_path": str(tmp_path / "kv")}
    # To recompute every token of a passage is a full prefill.
    settings = {"plain": {}, "again": {}, "all recomputed": reuse | {"kv_recompute": 1000}, "chunk": reuse}
    first, again, recomputed, chunk = configured("quality", **options, settings=settings).run()
    assert [row.case for row in (first, chunk)] == ["plain, 3 questions", "chunk, 3 questions"]
    assert "mean KL" not in first.ours and first.ours["log-likelihood"] < 0
    for same, by in ((again, 1e-6), (recomputed, 1e-3)):  # what precedes the passages is cached in float16
        assert same.ours["mean KL"] == pytest.approx(0, abs=by) and same.ours["same best token"] == 1
        assert same.ours["change of log-likelihood"].median == pytest.approx(0, abs=100 * by)
    assert chunk.ours["mean KL"] > recomputed.ours["mean KL"]
    change = chunk.ours["change of log-likelihood"]
    assert change.low <= change.median <= change.high
    assert change.median == pytest.approx(chunk.ours["log-likelihood"] - first.ours["log-likelihood"])
    with pytest.raises(UserError, match=r"bench\.settings is empty"):
        configured("quality", **options, settings={})


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"k": 0}])
def test_a_question_set_names_a_wrong_value(questions, wrong):
    [name] = wrong
    with pytest.raises(UserError, match=rf"QuestionSet\.{name}="):
        replace(questions, **wrong)


def test_one_question_is_too_few_to_compare(configured, questions, weights):
    one = replace(questions, limit=1)
    with pytest.raises(UserError, match=r"1 questions to answer: raise bench\.questions\.limit"):
        configured("question_answering", questions=one, weights=weights).run()


@pytest.mark.weights
def test_llama_cpp_answers_and_scores_from_the_same_prompt(generator_weights):
    """To score first, or twice, changes neither; the likelihood is ours up to llama.cpp's 8-bit activations."""
    pytest.importorskip("llama_cpp")
    ours = LocalGenerator(str(generator_weights), "float32", adapter=None)
    question = [Message("user", "Tides follow the moon. What do tides follow?")]
    model = open_llama_cpp(generator_weights, 128, reuse=True)
    generator = LlamaCppGenerator(model, ours, ours.tokenizer.eos_ids)
    gold = ours.tokenizer.encode("the moon", special=False)
    model.prefill(ours.tokenizer.chat(question))
    scored = model.log_likelihood(gold)
    request = Request(question, max_new_tokens=8)
    [first] = generator.generate([request])
    model.prefill(ours.tokenizer.chat(question))
    assert model.log_likelihood(gold) == pytest.approx(scored, abs=1e-4)
    assert model.log_likelihood(gold) == pytest.approx(scored, abs=1e-4)
    assert generator.generate([request]) == [first] != [""]
    [expected] = ours.log_likelihood([(question, "the moon")])
    assert scored == pytest.approx(expected.total, abs=0.2 * len(gold))
    assert np.isfinite(scored)


@pytest.mark.weights
def test_llama_cpp_is_a_generator_of_the_pipeline(generator_weights, tmp_path, monkeypatch):
    """It writes the same text reset or not, up to the budget where no token ends it."""
    pytest.importorskip("llama_cpp")
    ours = LocalGenerator(str(generator_weights), "float32", adapter=None)
    question = [Message("user", "Tides follow the moon. What do tides follow?")]
    texts = []
    for reuse in (False, True):
        model = open_llama_cpp(generator_weights, 128, reuse=reuse)
        generator = LlamaCppGenerator(model, ours, ours.tokenizer.eos_ids)
        # With reuse a second prefill computes the last token alone, with another rounding.
        for _ in range(1 if reuse else 2):
            *pieces, usage = generator.stream(Request(question, max_new_tokens=24))
            texts.append("".join(pieces))
            assert usage.prompt_tokens == ours.prompt_tokens(question)
    assert texts[0] and texts == texts[:1] * 3
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    smaller = requantised(generator_weights, "Q4_0")
    assert smaller.is_relative_to(tmp_path) and smaller == requantised(generator_weights, "Q4_0")
    assert 0 < smaller.stat().st_size < generator_weights.stat().st_size
    endless = LlamaCppGenerator(open_llama_cpp(smaller, 128), ours)
    *_, usage = endless.stream(Request(question, max_new_tokens=50))
    assert usage.new_tokens == 50
