"""Speculative against plain decoding, the automaton against a search by hand, the policy against known costs."""

import random
from dataclasses import replace
from itertools import chain

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag.generate import Request, local, speculative
from rag.generate.engine import Engine
from rag.generate.local import LocalGenerator
from rag.generate.speculative import (
    DRAFT_SIZES,
    DraftLengthPolicy,
    stream_speculatively,
    supports_speculation,
    verify,
)
from rag.generate.suffix_automaton import SuffixAutomaton
from rag.models.llama.model import Llama, forward
from rag.ops.sampling import Sampling
from rag.types import Message, Usage
from tests.generate.decode import alone, request
from tests.tiny_models import DECODER, write_decoder

BUDGET = 60


class Always(DraftLengthPolicy):
    """Drafts whenever something matches and there is room: these sizes in turn."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.turns, self.sizes = sizes, []

    def size(self, match, most):
        size = self.turns[(len(self.sizes) + 1) % len(self.turns)]
        self.sizes.append(size if match and size <= most else 0)
        return self.sizes[-1]


class Untimed(DraftLengthPolicy):
    """Verifications keep the cost that is assumed of them, so that no clock decides what a test sees."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def size(self, match, most):
        self.sizes.append(super().size(match, most))
        return self.sizes[-1]

    def took(self, size, seconds):
        pass


POLICIES = {
    "its own": Untimed,
    "the longest": lambda: Always(DRAFT_SIZES[-1]),
    "in turn": lambda: Always(*DRAFT_SIZES, 0),
}


def repeating_model(seed: int) -> Llama:
    """Random weights; with a head of its own the newest token decides most, so that it repeats itself, not always."""
    return Llama(replace(DECODER, tie_word_embeddings=False), nnx.Rngs(seed))


def prompt_of(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(DECODER.vocab_size) for _ in range(20)] * 3


def steps_of(engine, prompt, policy, budget=BUDGET):
    """Return the tokens of each step."""
    return list(stream_speculatively(engine, engine.prefill(request(prompt, budget)), prompt, policy))


def drafted(engine, prompt, policy, budget=BUDGET):
    return list(chain(*steps_of(engine, prompt, policy, budget)))


@pytest.fixture(scope="module", params=range(2))
def engine(request):
    return Engine(repeating_model(request.param), ())


@pytest.fixture(scope="module")
def prompt(engine):
    """It ends with what the model wrote behind its beginning, as text to copy from."""
    start = prompt_of(len(engine.end_ids))
    return start + alone(engine, start, BUDGET)[:-2]


@pytest.fixture(scope="module")
def answer(engine, prompt):
    return alone(engine, prompt, BUDGET)


@pytest.mark.parametrize("name", list(POLICIES))
def test_the_answer_is_that_of_plain_decoding(engine, prompt, answer, name):
    policy = POLICIES[name]()
    steps = steps_of(engine, prompt, policy)
    assert list(chain(*steps)) == answer
    assert len(steps) == 1 + len(policy.sizes)
    accepted = BUDGET - len(steps)
    assert 3 <= accepted < sum(policy.sizes)  # some draft tokens were accepted and some were not


def test_every_budget_is_exact(engine, prompt, answer):
    steps = steps_of(engine, prompt, Always(DRAFT_SIZES[-1]))
    assert any(len(step) >= 3 for step in steps)  # some budgets end inside of it
    for budget in range(1, BUDGET, 3):
        assert drafted(engine, prompt, Always(DRAFT_SIZES[-1]), budget) == answer[:budget]


def test_an_end_token_inside_a_draft_ends_the_answer_before_it(engine, prompt, answer):
    steps = steps_of(engine, prompt, Always(DRAFT_SIZES[-1]))
    inside = [token for step in steps for token in step[1:-1]]
    end = next(token for token in inside if [token in step[:-1] for step in steps].index(True) > 0)
    ending = Engine(engine.model, (end,))
    cut = answer[: answer.index(end)]
    assert drafted(ending, prompt, Always(DRAFT_SIZES[-1])) == cut == alone(ending, prompt, BUDGET)


@pytest.mark.parametrize("made", [1, 3, 5])
def test_an_end_token_at_each_position_of_an_accepted_draft(engine, prompt, answer, made):
    """The draft is the answer itself, so that the end token alone decides where it ends."""
    state = engine.prefill(request(prompt, BUDGET))
    draft = np.array(answer[1:6], np.int32)
    end_ids = (answer[made],)
    first = answer.index(end_ids[0], 1)
    state, tokens = verify(engine.packed, state, draft, end_ids=end_ids)
    assert tokens.tolist() == [*answer[1 : first + 1], *[-1] * (6 - first)]
    assert (bool(state.finished[0]), int(state.length[0])) == (True, len(prompt) + first)


def test_an_answer_may_fill_the_cache_to_its_last_slot(engine):
    prompt = [*prompt_of(9), 1, 2, 3, 4]
    state = engine.prefill(request(prompt, 64))
    assert state.cache.capacity == len(prompt) + 64
    assert drafted(engine, prompt, Always(DRAFT_SIZES[-1]), 64) == alone(engine, prompt, 64)


def test_rejected_tokens_leave_no_trace_in_the_cache(engine, prompt, answer, monkeypatch):
    states = []

    def spy(*arguments, **options):
        state, made = verify(*arguments, **options)
        states.append(state)
        return state, made

    monkeypatch.setattr(speculative, "verify", spy)
    policy = Always(*DRAFT_SIZES)
    steps = steps_of(engine, prompt, policy)
    assert BUDGET - len(steps) < sum(policy.sizes)
    state, whole = states[-1], [*prompt, *answer[:-1]]
    assert state.length.tolist() == [len(whole)]
    assert state.token.tolist() == answer[-1:]
    assert set(np.flatnonzero(state.seen[0]).tolist()) == {*whole, answer[-1]}
    _, fresh = forward(engine.model, jnp.array([whole], jnp.int32), jnp.zeros(1, jnp.int32))
    for got, want in zip(state.cache.keys + state.cache.values, fresh.keys + fresh.values, strict=True):
        np.testing.assert_allclose(got[:, :, : len(whole)], want, atol=1e-5)


def by_hand(text: list[int]) -> tuple[int, int]:
    """(tokens of the longest ending that occurs earlier, where its first occurrence ends)."""
    for length in range(len(text) - 1, 0, -1):
        for end in range(length, len(text)):
            if text[end - length : end] == text[len(text) - length :]:
                return length, end
    return 0, 0


@pytest.mark.parametrize("letters", [1, 2, 3, 8])
def test_the_match_is_the_longest_ending_that_occurs_earlier(letters):
    draw = random.Random(letters)
    automaton, text = SuffixAutomaton(), []
    for _ in range(60):
        text.append(draw.randrange(letters))
        automaton.push(text[-1])
        length, end = by_hand(text)
        assert automaton.match == length
        if length:
            follow = list(text)
            for i in range(9):  # a draft may run into itself
                follow.append(follow[end + i])
            assert automaton.draft(9) == follow[len(text) :]
    assert SuffixAutomaton(text).match == automaton.match


def test_nothing_matches_in_no_text():
    assert SuffixAutomaton().match == 0


def taught(cost: float, agreed: bool | None = None) -> DraftLengthPolicy:
    """A policy that measured verifications at `cost` plain steps, and that saw drafts always or never agree."""
    policy = DraftLengthPolicy()
    for size in (0, *DRAFT_SIZES):
        for seconds in (0.9, 1.0, 50.0):  # one of them interrupted
            policy.took(size, seconds * (cost if size else 1.0))
    if agreed is not None:
        teach(policy, agreed)
    return policy


def teach(policy: DraftLengthPolicy, agreed: bool) -> None:
    for match in [*range(1, 20)] * 40:
        policy.learn(match, agreed)


def test_a_draft_is_made_where_it_is_expected_to_pay():
    long, most = 12, 100
    assert taught(1.5, True).size(long, most) == DRAFT_SIZES[-1]
    assert taught(1.5, False).size(long, most) == 0
    assert taught(DRAFT_SIZES[-1] + 2, True).size(long, most) == 0  # dearer than all that it could bring
    assert taught(2.5).size(long, most) > 0
    assert taught(2.5).size(1, most) == 0  # a short match promises less
    assert taught(1.5, True).size(0, most) == 0
    assert taught(1.5, True).size(long, DRAFT_SIZES[0]) == DRAFT_SIZES[0]
    assert taught(1.5, True).size(long, DRAFT_SIZES[0] - 1) == 0


def test_a_size_not_yet_measured_costs_no_more_than_a_longer_one():
    policy = DraftLengthPolicy()
    assert policy.cost(0) == 1
    assert policy.cost(DRAFT_SIZES[0]) == policy.cost(DRAFT_SIZES[1]) > 1
    policy.took(0, 1.0)
    policy.took(DRAFT_SIZES[1], 1.25)
    assert [policy.cost(size) for size in DRAFT_SIZES] == [1.25, 1.25]
    policy.took(DRAFT_SIZES[0], 1.125)
    assert [policy.cost(size) for size in DRAFT_SIZES] == [1.125, 1.25]


def test_the_expectation_is_the_sum_of_the_chances_of_reaching_each_token():
    policy = DraftLengthPolicy()
    for _ in range(2000):
        for match in range(1, 20):
            policy.learn(match, match % 2 == 0 or match > 4)
    assert policy.expected(2, 3) == pytest.approx(2, abs=0.05)  # 2 agrees, 3 does not
    assert policy.expected(4, 7) == pytest.approx(8, abs=0.05)


def test_steps_without_a_draft_teach_it_to_draft_again(engine, prompt):
    policy = Untimed()
    teach(policy, False)
    before = policy.expected(1, 1)
    steps_of(engine, prompt, policy)
    assert policy.sizes.count(0) > 10
    assert policy.expected(1, 1) > before


def test_a_cost_is_forgotten_after_a_while_without_drafts():
    policy = taught(100.0, True)
    sizes = [policy.size(12, 100) for _ in range(100)]
    assert not any(sizes[:60])
    assert any(sizes)


def test_only_greedy_choices_are_drafted():
    assert supports_speculation(Sampling())
    assert not supports_speculation(Sampling(temperature=0.5))
    assert not supports_speculation(Sampling(repetition_penalty=1.2))


def test_the_generator_drafts_where_it_may(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "checkpoint").mkdir()
    write_decoder(tmp_path / "checkpoint")
    plain, speculating = (
        LocalGenerator(str(tmp_path / "checkpoint"), "float32", speculative=on) for on in (False, True)
    )
    assert plain.fingerprint == speculating.fingerprint
    used = []

    def spy(*arguments):
        used.append(arguments)
        return stream_speculatively(*arguments)

    monkeypatch.setattr(local, "stream_speculatively", spy)
    chat = [Message("user", "a seal, a seal, a seal, a seal")]
    for sampling, drafts in (
        (Sampling(), 1),
        (Sampling(temperature=1.0), 0),
        (Sampling(repetition_penalty=1.5), 0),
    ):
        used.clear()
        request = Request(chat, sampling, max_new_tokens=30)
        *want, want_usage = plain.stream(request)
        *got, usage = speculating.stream(request)
        assert "".join(got) == "".join(want)
        assert isinstance(usage, Usage)
        assert usage.new_tokens == want_usage.new_tokens
        assert len(used) == drafts
