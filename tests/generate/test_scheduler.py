"""Continuous batching against each request alone, for any mixture of lengths, ends and shared beginnings."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from rag.generate import scheduler
from rag.generate.engine import Engine
from rag.generate.prefill_batches import PrefillBatch, max_rows, plan_prefill, prefix_groups
from rag.generate.scheduler import BatchPrefiller, Scheduler, run
from rag.generate.scoring import log_probs_after_cache
from rag.models.layers import quantize_weights
from rag.ops import linear
from rag.ops.sampling import Sampling
from rag.runtime.shapes import round_up_cache
from tests import trials
from tests.generate.decode import answer, request, together
from tests.tiny_models import tiny_decoder

RNG = np.random.default_rng(5)
SHARED = tuple(RNG.integers(1, 250, 66).tolist())
OTHER = tuple(RNG.integers(1, 250, 67).tolist())


def drawn(length):
    return tuple(RNG.integers(1, 250, length).tolist())


PROMPTS = [
    *[drawn(n) for n in (3, 70, 5, 140, 1, 9, 30, 30, 64, 65)],
    *[SHARED + drawn(n) for n in (1, 12, 40, 7)],
    *[OTHER + drawn(n) for n in (2, 33, 8)],
    SHARED,
]
REQUESTS = [request(prompt, 12) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_decoder(), ())


def each_alone(engine, requests):
    return [answer(engine, one) for one in requests]


@pytest.fixture(scope="module")
def expected(engine):
    return each_alone(engine, REQUESTS)


@pytest.mark.parametrize("room", [1, 1100, 16384])
def test_tokens_are_those_of_each_request_alone(engine, expected, room):
    assert together(engine, REQUESTS, room) == expected


def test_requests_with_different_budgets_are_answered_together(engine, expected):
    requests = [replace(one, max_new_tokens=1 + i % 12) for i, one in enumerate(REQUESTS)]
    made = together(engine, requests)
    assert made == [row[: one.max_new_tokens] for row, one in zip(expected, requests, strict=True)]


def test_the_order_of_requests_changes_nothing(engine, expected):
    order = RNG.permutation(len(REQUESTS))
    made = together(engine, [REQUESTS[i] for i in order])
    assert made == [expected[i] for i in order]


def test_an_end_token_frees_the_row_for_the_next(expected):
    end = max((t for row in expected for t in row), key=lambda t: sum(t in row for row in expected))
    cut = [row[: row.index(end)] if end in row else row for row in expected]
    assert len({len(row) for row in cut}) > 3
    engine = Engine(tiny_decoder(), (end,), steps_per_dispatch=1)
    assert together(engine, REQUESTS, 1100) == cut


def test_draws_are_those_of_each_request_alone(engine):
    sampling = Sampling(temperature=0.9, top_k=30, repetition_penalty=1.3)
    prompts = PROMPTS[:: 1 if trials.LONG else 2]
    requests = [request(prompt, 10, sampling, 7 * i) for i, prompt in enumerate(prompts)]
    requests.append(request(PROMPTS[0], 10, sampling, 99))
    made = together(engine, requests, 2048)
    assert made == each_alone(engine, requests)
    assert made[0] != made[-1]  # the same prompt


def test_int8_with_one_step_a_dispatch(monkeypatch):
    monkeypatch.setattr(
        linear, "_FEW", 1 << 20
    )  # beyond it the rounding of prompts that are prefilled together depends on their number
    engine = Engine(quantize_weights(tiny_decoder()), ())
    assert engine.steps_per_dispatch == 1
    few = [request(prompt, 10) for prompt in PROMPTS if len(prompt) < 64]
    assert together(engine, few, 1100) == each_alone(engine, few)


def test_a_free_row_answers_the_next_request_at_once(engine, expected):
    enough = [1 + 3 * (i % 4) for i in range(len(REQUESTS))]
    steps = []

    class Watched(Scheduler):
        """Records how many rows are busy at each step."""

        def step(self):
            steps.append(self.busy)
            return super().step()

    single = Engine(tiny_decoder(), (), steps_per_dispatch=1)
    made = together(single, REQUESTS, 512, enough, Watched)
    assert made == [row[:n] for row, n in zip(expected, enough, strict=True)]
    assert max(steps) == 4
    assert sum(steps) == sum(
        n - 1 for n in enough
    )  # prefill chose the first token; no row is decoded in vain
    assert np.mean(steps[: len(steps) // 2]) > 3  # a batch of two waits for two rows


def test_a_growing_batch_continues_its_answers(engine):
    requests = [request(drawn(n), 20) for n in (9, 20, 350)]
    rows, prefill = Scheduler(engine, Sampling(), 1100, 3), BatchPrefiller(engine, requests)
    made = {0: [], 1: [], 2: []}
    for group in (PrefillBatch((0, 1), round_up_cache(84)), PrefillBatch((2,), round_up_cache(404))):
        assert rows.has_room(group) == (group.members != (2,))  # two rows of 512 slots, and both in use
        if group.members == (2,):
            rows.leave({0})
            assert rows.has_room(group)
        for i, tokens in rows.join(group, prefill(group)):
            made[i] += tokens
        for i, tokens in rows.step():
            made[i] += tokens
    while rows.busy:
        for i, tokens in rows.step():
            made[i] += tokens
    whole = each_alone(engine, requests)
    assert made[0] == whole[0][: len(made[0])]
    assert [made[1], made[2]] == whole[1:]


def test_prefixes_are_prefilled_once(engine, monkeypatch):
    prefill_prefix, lengths = scheduler.prefill_prefix, []

    def spy(packed, tokens):
        lengths.append(tokens.shape)
        return prefill_prefix(packed, tokens)

    monkeypatch.setattr(scheduler, "prefill_prefix", spy)
    requests = [request(prompt, 6) for prompt in PROMPTS if prompt[:64] in (SHARED[:64], OTHER[:64])]
    assert together(engine, requests) == each_alone(engine, requests)
    assert lengths == [(1, 64), (1, 64)]


def by_trial(prompts):
    """Return the most tokens that need no prefill, over all ways to cut the sorted prompts into groups."""
    order, best = sorted(prompts), [0]
    for stop in range(1, len(order) + 1):
        found = []
        for start in range(stop):
            run = order[start:stop]
            least = min(len(p) for p in run) - 1
            same = next((i for i in range(least) if len({p[i] for p in run}) > 1), least)
            found.append(best[start] + (same // 64 * 64 * (len(run) - 1)))
        best.append(max(found))
    return best[-1]


@pytest.mark.parametrize("seed", range(6))
def test_prefix_groups_save_the_most(seed):
    rng = np.random.default_rng(seed)
    trunk = [(1,) * 64, (2,) * 64, (1,) * 128, (1,) * 64 + (2,) * 64, (1,) * 192]
    prompts = list(
        {trunk[rng.integers(5)] + tuple(rng.integers(1, 4, rng.integers(1, 80)).tolist()) for _ in range(14)}
    )
    found = prefix_groups(prompts)
    assert sorted(i for _, members in found for i in members) == list(range(len(prompts)))
    for prefix, members in found:
        assert prefix % 64 == 0
        assert len({prompts[i][:prefix] for i in members}) == 1
        assert all(len(prompts[i]) > prefix for i in members)
    assert sum(prefix * (len(members) - 1) for prefix, members in found) == by_trial(prompts)


@pytest.mark.parametrize("room", [1, 1000, 5000])
def test_a_plan_has_all_requests_and_fits_the_budget(room):
    groups = plan_prefill(REQUESTS, room)
    assert sorted(i for group in groups for i in group.members) == list(range(len(REQUESTS)))
    capacities = [group.capacity for group in groups]
    assert capacities == sorted(capacities)  # so that rows only grow
    for group in groups:
        assert len(group.members) <= max_rows(group.capacity, room)
        assert len(group.members) & (len(group.members) - 1) == 0
        assert all(len(PROMPTS[i]) + 12 <= group.capacity for i in group.members)
    assert all(len(group.members) == 1 for group in groups) == (room == 1)


def test_insert_changes_one_row_alone(engine):
    part = BatchPrefiller(engine, [request(drawn(n), 4) for n in (5, 60)])(PrefillBatch((0, 1), 64))
    state = scheduler.empty_state(part, 4, 256)
    before = jax.tree.map(np.array, state.cache.keys)
    after = scheduler.insert_row(state, part, np.int32(1), np.int32(2))
    assert after.token[2] == part.token[1]
    assert not after.finished[2]
    assert np.array_equal(jax.random.key_data(after.key[2]), jax.random.key_data(part.key[1]))
    for new, old, source in zip(after.cache.keys, before, part.cache.keys, strict=True):
        width = min(256, source.shape[2])
        assert np.array_equal(new[2, :, :width], source[1, :, :width])
        assert np.array_equal(np.delete(new, 2, axis=0), np.delete(old, 2, axis=0))


def test_a_cache_that_is_too_small_is_an_error(engine):
    requests = [request(drawn(n), 32) for n in (200, 250)]
    prefill = BatchPrefiller(engine, requests)
    with pytest.raises(RuntimeError, match="250 tokens and 32 new ones do not fit a cache of 256 slots"):
        run([PrefillBatch((0, 1), 256)], prefill, Scheduler(engine, Sampling(), 4096, 3), lambda *_: True)
    with pytest.raises(RuntimeError, match="2 prompts were to join 0 busy rows"):  # 512 slots leave one row
        run([PrefillBatch((0, 1), 512)], prefill, Scheduler(engine, Sampling(), 600, 3), lambda *_: True)
    short = request(drawn(3), 4)
    state = engine.prefill(short)
    with pytest.raises(RuntimeError, match="do not fit a cache of"):  # its last slot is for padding
        log_probs_after_cache(engine.packed, state.cache, short.prompt, [2], list(range(126)))
    with pytest.raises(RuntimeError, match="do not fit a cache of"):
        engine.start_decode(state.cache, jax.numpy.zeros((1, 32)), replace(short, max_new_tokens=500))
