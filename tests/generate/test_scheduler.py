"""Continuous batching against each request alone, for any mixture of lengths, ends and shared beginnings."""

import jax
import numpy as np
import pytest

from rag.generate import scheduler
from rag.generate.engine import Engine
from rag.generate.prefill_batches import PrefillBatch, max_rows, plan_batches, prefix_groups
from rag.generate.scheduler import BatchPrefill, Scheduler, run
from rag.generate.scoring import log_probs_after_cache
from rag.models.checkpoint import quantized
from rag.ops import linear
from rag.ops.sampling import Sampling
from rag.runtime.shapes import round_up_cache
from tests.tiny import tiny_model

RNG = np.random.default_rng(5)
SHARED = tuple(RNG.integers(1, 250, 66).tolist())
OTHER = tuple(RNG.integers(1, 250, 67).tolist())


def drawn(length):
    return tuple(RNG.integers(1, 250, length).tolist())


REQUESTS = [(drawn(n), 0) for n in (3, 70, 5, 140, 1, 9, 30, 30, 64, 65)] + [
    *[(SHARED + drawn(n), n) for n in (1, 12, 40, 7)],
    *[(OTHER + drawn(n), 1) for n in (2, 33, 8)],
    (SHARED, 0),
]


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_model(), ())


def alone(engine, requests, budget, sampling=Sampling()):
    return [engine.generate([prompt], budget, sampling, [seed])[0] for prompt, seed in requests]


def together(engine, requests, budget, sampling=Sampling(), room=4096, enough=None, spy=None):
    """Each request's tokens; `enough[i]` is how many its reader wants."""
    made = [[] for _ in requests]

    def take(i, tokens):
        made[i].extend(tokens)
        return enough is None or len(made[i]) < enough[i]

    rows, groups = Scheduler(engine, sampling, room, len(requests)), plan_batches(requests, budget, room)
    run(groups, BatchPrefill(engine, requests, budget, sampling), spy(rows) if spy else rows, take)
    assert rows.busy == 0
    return made


@pytest.fixture(scope="module")
def expected(engine):
    return alone(engine, REQUESTS, 12)


@pytest.mark.parametrize("room", [1, 1100, 16384])
def test_tokens_are_those_of_each_request_alone(engine, expected, room):
    assert together(engine, REQUESTS, 12, room=room) == expected


def test_the_order_of_requests_changes_nothing(engine, expected):
    order = RNG.permutation(len(REQUESTS))
    made = together(engine, [REQUESTS[i] for i in order], 12)
    assert made == [expected[i] for i in order]


def test_an_end_token_frees_the_row_for_the_next(expected):
    end = max((t for row in expected for t in row), key=lambda t: sum(t in row for row in expected))
    cut = [row[: row.index(end)] if end in row else row for row in expected]
    assert len({len(row) for row in cut}) > 3
    engine = Engine(tiny_model(), (end,), steps_per_dispatch=1)
    assert together(engine, REQUESTS, 12, room=1100) == cut


def test_draws_are_those_of_each_request_alone(engine):
    sampling = Sampling(temperature=0.9, top_k=30, repetition_penalty=1.3)
    requests = [(prompt, 7 * i) for i, (prompt, _) in enumerate(REQUESTS)] + [(REQUESTS[0][0], 99)]
    made = together(engine, requests, 10, sampling, room=2048)
    assert made == alone(engine, requests, 10, sampling)
    assert made[0] != made[-1]  # the same prompt


def test_int8_with_one_step_a_dispatch(monkeypatch):
    monkeypatch.setattr(linear, "_FEW", 1 << 20)  # beyond it prompts read together round by how many they are
    engine = Engine(quantized(tiny_model()), ())
    assert engine.steps_per_dispatch == 1
    few = [request for request in REQUESTS if len(request[0]) < 64]
    assert together(engine, few, 10, room=1100) == alone(engine, few, 10)


class Watched(Scheduler):
    """Rows that record how full they are at each step."""

    def step(self):
        self.steps.append(self.busy)
        return super().step()


def test_a_row_that_is_left_serves_the_next_request_at_once(engine, expected):
    enough = [1 + 3 * (i % 4) for i in range(len(REQUESTS))]
    watched = []

    def spy(rows):
        rows.__class__, rows.steps = Watched, []
        watched.append(rows)
        return rows

    single = Engine(tiny_model(), (), steps_per_dispatch=1)
    made = together(single, REQUESTS, 12, room=512, enough=enough, spy=spy)
    assert made == [row[:n] for row, n in zip(expected, enough, strict=True)]
    steps = watched[0].steps
    assert max(steps) == 4
    assert sum(steps) == sum(
        n - 1 for n in enough
    )  # the first token is the prefill's; no row is decoded in vain
    assert np.mean(steps[: len(steps) // 2]) > 3  # a group of two waits for two rows


def test_growing_rows_keep_what_they_serve(engine):
    short, long = [(drawn(9), 0), (drawn(20), 0)], (drawn(350), 0)
    requests = [*short, long]
    rows, read, made = (
        Scheduler(engine, Sampling(), 1100, 3),
        BatchPrefill(engine, requests, 20),
        {0: [], 1: [], 2: []},
    )
    for group in (PrefillBatch((0, 1), round_up_cache(84)), PrefillBatch((2,), round_up_cache(404))):
        assert rows.has_room(group) == (group.members != (2,))  # two rows of 512 slots, and both in use
        if group.members == (2,):
            rows.leave({0})
            assert rows.has_room(group)
        for request, tokens in rows.join(group, read(group)):
            made[request] += tokens
        for request, tokens in rows.step():
            made[request] += tokens
    while rows.busy:
        for request, tokens in rows.step():
            made[request] += tokens
    whole = alone(engine, requests, 20)
    assert made[0] == whole[0][: len(made[0])]
    assert [made[1], made[2]] == whole[1:]


def test_prefixes_are_read_once(engine, monkeypatch):
    read, lengths = scheduler.prefill_prefix, []

    def spy(packed, tokens):
        lengths.append(tokens.shape)
        return read(packed, tokens)

    monkeypatch.setattr(scheduler, "read_prefix", spy)
    requests = [request for request in REQUESTS if request[0][:64] in (SHARED[:64], OTHER[:64])]
    assert together(engine, requests, 6) == alone(engine, requests, 6)
    assert lengths == [(1, 64), (1, 64)]


def by_trial(prompts):
    """The most tokens that need not be read, over all ways to cut the sorted prompts into families."""
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
def test_families_save_the_most(seed):
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
@pytest.mark.parametrize("apart", [False, True])
def test_the_plan_asks_for_what_there_is(room, apart):
    groups = plan_batches(REQUESTS, 12, room, apart)
    assert sorted(i for group in groups for i in group.members) == list(range(len(REQUESTS)))
    capacities = [group.capacity for group in groups]
    assert capacities == sorted(capacities)  # so that rows only grow
    for group in groups:
        assert len(group.members) <= max_rows(group.capacity, room)
        assert len(group.members) & (len(group.members) - 1) == 0
        assert all(len(REQUESTS[i][0]) + 12 <= group.capacity for i in group.members)
    assert apart == all(len(group.members) == 1 for group in groups) or room == 1


def test_rows_read_elsewhere_are_inserted_alike(engine, expected):
    """As LocalGenerator's do that begin behind a cache: each with a cache of Engine.capacity."""
    made = [[] for _ in REQUESTS]

    def read(group):
        [i] = group.members
        prompt, seed = REQUESTS[i]
        return engine.prefill([prompt], 12, Sampling(), [seed])

    def take(i, tokens):
        made[i].extend(tokens)
        return True

    run(plan_batches(REQUESTS, 12, 2048, apart=True), read, Scheduler(engine, Sampling(), 2048), take)
    assert made == expected


def test_insert_changes_one_row_alone(engine):
    part = engine.prefill([drawn(5), drawn(60)], 4)
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


def test_a_cache_that_is_too_small_is_refused_and_never_waited_for(engine):
    requests = [(drawn(200), 0), (drawn(250), 0), (drawn(3), 0)]
    read = BatchPrefill(engine, requests, 32)
    with pytest.raises(RuntimeError, match="250 tokens and 32 new ones do not fit a cache of 256 slots"):
        run([PrefillBatch((0, 1), 256)], read, Scheduler(engine, Sampling(), 4096, 3), lambda *_: True)
    with pytest.raises(RuntimeError, match="2 prompts were to join 0 busy rows"):  # 512 slots leave one row
        run([PrefillBatch((0, 1), 512)], read, Scheduler(engine, Sampling(), 600, 3), lambda *_: True)
    state = engine.prefill([requests[2][0]], 4)
    with pytest.raises(RuntimeError, match="do not fit a cache of"):  # its last slot is for padding
        log_probs_after_cache(engine.packed, state.cache, requests[2][0], [2], list(range(126)))
    with pytest.raises(RuntimeError, match="do not fit a cache of"):
        engine.begin(state.cache, jax.numpy.zeros((1, 32)), requests[2][0], 500)
