"""The benchmark of training steps: its batches, its rows, and torch's losses beside ours."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.bench import training
from rag.bench.training import packed_batch, sequence_batch, visible_pairs

VOCAB = 300


@pytest.fixture
def benchmark(configured, weights, monkeypatch):
    monkeypatch.setattr(training, "product_type", lambda dtype: dtype.replace("auto", "bfloat16"))
    return configured("training", weights=weights, tokens=[128], row_tokens=64, rank=2, repeats=2)


@given(st.integers(64, 300))
def test_a_sequence_sees_all_earlier_tokens(tokens):
    batch = sequence_batch(tokens, VOCAB)
    assert visible_pairs(batch) == tokens * (tokens + 1) // 2
    assert batch.target_at.tolist() == list(range(tokens - tokens // 16 - 1, tokens - 1))
    assert batch.tokens[0, batch.target_at + 1].tolist() == batch.target.tolist()


@given(st.integers(1, 3), st.sampled_from([64, 128, 192, 512, 1024]))
def test_packed_rows_are_full_and_have_as_many_targets(rows, row_tokens):
    batch = packed_batch(rows * row_tokens, row_tokens, VOCAB)
    assert batch.tokens.shape == (rows, row_tokens) and (batch.segments >= 0).all()
    assert len(batch.target) == rows * row_tokens // 16
    size = min(512, row_tokens)
    beginning, each = size - size // 4, size // 16
    pairs = beginning * (beginning + 1) // 2 + 4 * (beginning * each + each * (each + 1) // 2)
    assert visible_pairs(batch) == rows * (row_tokens // size) * pairs


def test_padding_is_not_seen():
    batch = sequence_batch(64, VOCAB)
    padded = batch._replace(segments=np.where(np.arange(64) < 10, batch.segments, -1))
    assert visible_pairs(padded) == 10 * 11 // 2


def test_without_torch_ours_are_compared_with_float32(benchmark, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    rows = {row.case: row for row in replace(benchmark, naive_tokens=64).run()}
    assert list(rows) == [
        "128 tokens, bfloat16",
        "128 tokens, float32",
        "128 tokens, float32, recomputed",
        "128 tokens, float32, naive attention",
        "128 tokens packed, bfloat16",
        "128 tokens packed, float32",
    ]
    assert "torch is left out" in capsys.readouterr().err
    plain = rows["128 tokens, float32"]
    assert plain.ours["ms"].low > 0 and not plain.peers
    assert rows["128 tokens, float32, recomputed"].ours["loss"] == pytest.approx(plain.ours["loss"])
    assert rows["128 tokens packed, bfloat16"].ratio.keys() == {"ours, float32"}
    assert rows["128 tokens, bfloat16"].ours["loss"] == pytest.approx(plain.ours["loss"], rel=0.01)
    assert list(rows["128 tokens, float32, naive attention"].ours) == ["temp MiB"]


def test_torch_takes_the_same_steps(benchmark, capsys):
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason="a peer of the benchmarks: make bench-setup")
    rows = [row for row in benchmark.run() if "packed" not in row.case]
    assert "do not compute the same" not in capsys.readouterr().err
    for row in rows:
        tolerance = 0.01 if "bfloat16" in row.case else 1e-4
        assert row.ours["loss"] == pytest.approx(row.peers["torch"]["loss"], rel=tolerance)
        assert row.ratio["torch"] > 0


def test_other_losses_are_shown(capsys):
    training.print_difference("case", [2.0, 1.0], [2.0001, 1.0001, 0.5])
    assert not capsys.readouterr().err
    training.print_difference("case", [2.0, 1.0], [2.0, 1.1, 0.5])
    assert "case: ours and torch do not compute the same; their losses are 2 and 2, 1 and 1.1" in (
        capsys.readouterr().err
    )
