"""scripts/bench.py: a table, then one JSON line that ends stdout. And what bench=reading compares."""

import json
import sys
from dataclasses import dataclass

import bench
import numpy as np
import pytest
from benchmarks.reading import MEASURES, Outcome, Reading, Task, _LlamaCpp, rows
from omegaconf import OmegaConf

from rag.evaluate.stats import Statistics
from rag.generate.local import LocalGenerator
from rag.measure import Row
from rag.prompt import PromptTemplate
from rag.types import Message, UserError
from tests import tiny, tiny_encoder


@dataclass(frozen=True)
class Fake:
    repeats: int = 3

    def run(self) -> list[Row]:
        return [Row(f"{self.repeats} repeats", {"ms": 1.0}, {"peer": {"ms": 2.0}}, {"peer": 2.0})]


def test_the_last_line_is_the_record(capsys):
    config = OmegaConf.create({"bench": {"_target_": f"{__name__}.Fake", "repeats": 5}})
    bench.main(config)
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record["bench"] == "test_bench"
    assert record["machine"]["versions"]["jax"]
    assert record["rows"] == [
        {"case": "5 repeats", "ours": {"ms": 1.0}, "peers": {"peer": {"ms": 2.0}}, "ratio": {"peer": 2.0}}
    ]
    assert any("5 repeats" in line for line in lines[:-1])


PEER = "llama-cpp-python"
TASKS = [
    Task((Message("user", "Who?"),), ("a red fox",)),
    Task((Message("user", "Where?"),), ("on ice", "ice")),
    Task((Message("user", "How many?"),), ("7",)),
    Task((Message("user", "When?"),), ("in May",)),
]
OURS = Outcome(["The red fox.", "on thin ice", " 7", "June"], [-1.0, -2.0, -3.0, -4.0], 2.0, 1.0, 0.5)
THEIRS = Outcome(["A red fox", "water", "7", "in May"], [-2.0, -2.5, -3.0, -4.5], 6.0, 3.0)


def test_reading_compares_question_by_question():
    *measured, effort = rows(TASKS, {"ours": OURS, PEER: THEIRS}, Statistics(resamples=1000))
    assert [row.case for row in measured] == [f"{name}, 4 questions" for name in MEASURES]
    means = {row.case.split(",")[0]: (row.ours["mean"], row.peers[PEER]["mean"]) for row in measured}
    assert means["EM"] == pytest.approx((2 / 4, 3 / 4))
    # "on thin ice" is 4/5 of "on ice"
    assert means["F1"] == pytest.approx(((1 + 4 / 5 + 1 + 0) / 4, 3 / 4))
    assert means["contains"] == pytest.approx((3 / 4, 3 / 4))
    assert means["log-likelihood"] == pytest.approx((-2.5, -3.0))
    for row in measured:
        mine, its = row.ours, row.peers[PEER]
        assert mine["low"] <= mine["mean"] <= mine["high"]
        assert its["ours minus it, mean"] == pytest.approx(mine["mean"] - its["mean"])
        assert its["ours minus it, low"] <= its["ours minus it, mean"] <= its["ours minus it, high"]
    # three differences of one sign: of the eight patterns of signs, two are as far from 0
    assert measured[-1].peers[PEER]["p"] == pytest.approx(2 / 8)
    assert effort.ours == {"answering s": 2.0, "scoring s": 1.0, "of these compiling s": 0.5}
    assert effort.peers[PEER] == {"answering s": 6.0, "scoring s": 3.0, "answers that differ": 3}
    assert effort.ratio == {PEER: 3.0}


@pytest.fixture
def small(tmp_path) -> dict:
    """A dataset, a reader and an encoder of the smallest size, as options of Reading."""
    data, reader = tmp_path / "data", tmp_path / "reader"
    (data / "qrels").mkdir(parents=True)
    reader.mkdir()
    tiny.write_checkpoint(reader)
    encoder = tiny_encoder.write_checkpoint(tmp_path / "encoder")
    tiny_encoder.write_sentence_files(encoder, {"pooling_mode_mean_tokens": True})
    texts = {"seal": "a seal eats fish", "gull": "a gull nests on a cliff", "whale": "a whale eats krill"}
    corpus = [{"_id": name, "text": text} for name, text in texts.items()]
    queries = [
        {"_id": f"q {name}", "text": f"{name} does?", "answers": [text]} for name, text in texts.items()
    ]
    for file, lines in (("corpus", corpus), ("queries", queries)):
        (data / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = "".join(f"q {name}\t{name}\t1\n" for name in texts)
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return {"path": str(data), "weights": str(reader), "embedder": str(encoder), "max_new_tokens": 4}


def test_reading_without_the_peer_leaves_its_columns_empty(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # importing it raises ImportError
    reading = Reading(**small, prompt=PromptTemplate("{context}\n{question}", "{text}"), questions=3, k=1)
    *measured, effort = reading.run()
    assert [row.case for row in measured] == [f"{name}, 3 questions" for name in MEASURES]
    assert not any(row.peers or row.ratio for row in [*measured, effort])
    assert measured[-1].ours["mean"] < 0  # a logarithm of a probability
    assert f"{PEER} is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"questions": 1}, {"k": 0}])
def test_reading_says_what_cannot_be(wrong):
    [name] = wrong
    with pytest.raises(UserError, match=rf"bench\.{name} is "):
        Reading("x", PromptTemplate("{question}"), **wrong)


@pytest.mark.weights
def test_llama_cpp_answers_and_scores_from_the_same_prompt(generator_weights):
    """Scoring first, or twice, changes neither; the likelihood is ours up to llama.cpp's 8-bit activations."""
    pytest.importorskip("llama_cpp")
    ours = LocalGenerator(str(generator_weights))
    question = [Message("user", "Tides follow the moon. What do tides follow?")]
    peer = _LlamaCpp.open(str(generator_weights), 128)
    peer.read(ours.tokenizer.chat(question))
    first = peer.answer(ours.tokenizer, 8, ())
    gold = ours.tokenizer.encode("the moon", special=False)
    scored = peer.log_likelihood(gold)
    assert peer.answer(ours.tokenizer, 8, ()) == first != ""
    assert peer.log_likelihood(gold) == pytest.approx(scored, abs=1e-4)
    [expected] = ours.log_likelihood([(question, "the moon")])
    assert scored == pytest.approx(expected.total, abs=0.2 * len(gold))
    assert np.isfinite(scored)
