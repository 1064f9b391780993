"""Rows hold every sequence once, and a packed batch says of each token what its sequence says alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.train.packing import Continuation, PackedBatch, SequenceGroup, count_targets, make_batch, pack_rows


@given(st.lists(st.integers(1, 64), max_size=80), st.integers(64, 100), st.integers(1, 40))
def test_rows_hold_every_group_once(lengths, row_tokens, window):
    rows = pack_rows(lengths, row_tokens, window)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= row_tokens for row in rows)
    assert all(max(row) - min(row) < window for row in rows)


def test_a_group_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="65 tokens does not fit a row of 64"):
        pack_rows([3, 65], 64)


@st.composite
def groups(draw) -> SequenceGroup:
    token = st.integers(1, 99)
    prefix = tuple(draw(st.lists(token, max_size=6)))
    continuations = []
    for _ in range(draw(st.integers(1, 4))):
        tokens = tuple(draw(st.lists(token, min_size=2, max_size=6)))
        continuations.append(Continuation(tokens, draw(st.integers(1, len(tokens) - 1))))
    return SequenceGroup(prefix, tuple(continuations))


@given(st.lists(st.lists(groups(), max_size=3), min_size=1, max_size=3))
def test_every_sequence_can_be_read_back(rows):
    width, targets = 100, count_targets(rows) + 3
    batch = PackedBatch(*map(np.asarray, make_batch(rows, width, targets)))
    assert batch.tokens.shape == (len(rows), width) and batch.target.shape == (targets,)
    assert (batch.segments >= 0).sum() == sum(group.tokens for row in rows for group in row)
    learned = {}
    for at, target, weight in zip(batch.target_at, batch.target, batch.weight, strict=True):
        if weight:
            learned.setdefault(divmod(int(at), width)[0], []).append((int(at) % width, int(target), weight))
    for b, row in enumerate(rows):
        expected = [continuation for group in row for continuation in group.continuations]
        prefixes = [group.prefix for group in row for _ in group.continuations]
        answers = [(t, 1 / len(a)) for c in expected for a in [c.tokens[c.answer_start :]] for t in a]
        assert [(t, pytest.approx(w)) for _, t, w in learned.get(b, [])] == answers
        seen = []
        for segment in sorted({*batch.segments[b][batch.prefixes[b] >= 0]}):
            own = batch.segments[b] == segment
            shared = batch.segments[b] == batch.prefixes[b][own][0]
            tokens = [*batch.tokens[b][shared], *batch.tokens[b][own]]
            positions = [*batch.positions[b][shared], *batch.positions[b][own]]
            assert positions == list(range(len(tokens)))
            seen.append(tuple(int(token) for token in tokens))
        assert seen == [(*p, *c.tokens) for p, c in zip(prefixes, expected, strict=True)]
        for at, target, _ in learned.get(b, []):
            own = np.flatnonzero(batch.segments[b] == batch.segments[b, at])
            assert at + 1 in own and batch.tokens[b, at + 1] == target
