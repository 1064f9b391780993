"""The likelihood of given texts against the plain definition: the softmax over all logits of one whole forward."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag.generate import Generator, LogLikelihood, scorer_of
from rag.generate.local import LocalGenerator
from rag.generate.prefill_batches import batch_by_length
from rag.generate.scoring import TOKENS_PER_CALL, hidden_states, log_probs, token_log_probs
from rag.models.llama.model import forward, logits
from rag.runtime.shapes import round_up_prompt
from rag.types import Message, UserError
from tests.tiny_models import DECODER, tiny_decoder, write_decoder

GOLDEN = Path(__file__).parents[1] / "goldens" / "likelihood.json"
TOLERANCE = (
    5e-4  # absolute: the tiny model's logits reach 70, where float32 sums are exact to about 1e-5 of it
)
CHAT = [Message("system", "Be brief."), Message("user", "What is a seal?")]


@jax.jit
def all_logits(model, tokens):
    return logits(model, forward(model, tokens, jnp.zeros(1, jnp.int32))[0][0])


@pytest.fixture(scope="module")
def model():
    return tiny_decoder()


@pytest.fixture(scope="module")
def pairs():
    """Prompts of 1 to 150 tokens and continuations of 0 to 200, which need more than one call."""
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (5, 3), (150, 1), (2, 200), (64, 1), (63, 2), (7, 0), (40, 25), (5, 3), (130, 60)]
    assert sum(n for _, n in sizes) > TOKENS_PER_CALL
    return [tuple(rng.integers(0, DECODER.vocab_size, n).tolist() for n in pair) for pair in sizes]


def by_definition(model, prompt, continuation):
    """The float64 softmax over the logits of every token; alone, padded on the right to share one shape."""
    ids = prompt + continuation
    padded = jnp.array([ids + [0] * (256 - len(ids))], jnp.int32)
    scores = np.asarray(all_logits(model, padded), np.float64)
    probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return [np.log(probabilities[len(prompt) - 1 + n, token]) for n, token in enumerate(continuation)]


def test_log_probs_are_those_of_the_definition(model, pairs):
    found = log_probs(model, pairs, tokens_per_batch=256)
    for ours, (prompt, continuation) in zip(found, pairs, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, by_definition(model, prompt, continuation), atol=TOLERANCE)
    assert min(values.min() for values in found if len(values)) < -1  # no constant


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 100_000])
def test_the_batch_does_not_matter(model, pairs, tokens_per_batch):
    expected = log_probs(model, pairs, tokens_per_batch=256)
    for ours, theirs in zip(log_probs(model, pairs, tokens_per_batch), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_the_order_changes_no_bit(model, pairs):
    expected = log_probs(model, pairs, 256)
    order = np.random.default_rng(1).permutation(len(pairs))
    for i, ours in zip(order, log_probs(model, [pairs[i] for i in order], 256), strict=True):
        np.testing.assert_array_equal(ours, expected[i])


def test_probabilities_of_all_continuations_sum_to_one(model):
    every = [([3, 1, 4], [token]) for token in range(DECODER.vocab_size)]
    found = log_probs(model, every, 4096)
    assert sum(np.exp(np.float64(values[0])) for values in found) == pytest.approx(1, abs=1e-5)


def test_a_chain_of_tokens_is_the_product_of_its_steps(model):
    [whole] = log_probs(model, [([9], [5, 6, 7])])
    steps = log_probs(model, [([9], [5]), ([9, 5], [6]), ([9, 5, 6], [7])])
    np.testing.assert_allclose(whole, np.concatenate(steps), atol=TOLERANCE)


def test_programs_are_few_and_hold_no_weights(model):
    rng = np.random.default_rng(2)
    forwards, heads = hidden_states._cache_size(), token_log_probs._cache_size()
    for length, rest in itertools.product((30, 45, 60), (1, 4, 9)):
        ids = rng.integers(0, DECODER.vocab_size, length + rest).tolist()
        log_probs(model, [(ids[:length], ids[length:])], 64)
    assert hidden_states._cache_size() <= forwards + 2  # one row of 64 tokens, and of 128
    assert token_log_probs._cache_size() <= heads + 2
    text = hidden_states.lower(model, jnp.zeros((1, 64), jnp.int32)).as_text()
    assert len(text) < 200_000  # weights that became constants would stand in it


def test_what_cannot_be_scored_is_an_error(model):
    with pytest.raises(UserError, match="no tokens"):
        log_probs(model, [([1], [2]), ([], [2])])
    with pytest.raises(UserError, match="513 tokens long and the model's context 512"):
        log_probs(model, [([1] * 500, [2] * 13)])
    assert len(log_probs(model, [([1] * 500, [2] * 12)])[0]) == 12
    assert log_probs(model, []) == []
    assert [len(values) for values in log_probs(model, [([], []), ([1], [])])] == [0, 0]


def test_batches_hold_each_prompt_once_within_their_budget():
    lengths = sorted(np.random.default_rng(3).integers(1, 500, 70).tolist(), reverse=True)
    for tokens in (1, 1000, 4096):
        seen = []
        for some, size in batch_by_length(lengths, tokens):
            members = lengths[some]
            assert 1 <= len(members) <= size and size & (size - 1) == 0
            assert size == 1 or size * round_up_prompt(members[0]) <= tokens
            seen += members
        assert seen == lengths
    assert [size for _, size in batch_by_length([60] * 64, 4096)] == [64]


# --- text ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("checkpoint")
        write_decoder(folder)
        generator = LocalGenerator(str(folder), "float32")
        assert generator.context_length == 512  # loads it, while the cache is ours
        return generator


def test_an_answer_in_the_chat_format(generator):
    [found, empty] = generator.log_likelihood([(CHAT, "A seal \u00e9\U0001f9ad"), (CHAT, "")])
    prompt = generator.tokenizer.chat(CHAT)
    rest = generator.tokenizer.encode("A seal \u00e9\U0001f9ad", special=False)
    expected = by_definition(generator.engine.model, prompt, rest)
    assert found.tokens == len(rest) == 13  # a byte is a token here
    assert found.total == pytest.approx(sum(expected), abs=TOLERANCE * len(rest))
    assert empty == LogLikelihood(0.0, 0)
    assert generator.log_likelihood([]) == []


def test_plain_text_has_no_chat_around_it(generator):
    [found] = generator.text_log_likelihood([("one two", " three")])
    ids = generator.tokenizer.encode("one two three", special=False)
    expected = by_definition(generator.engine.model, ids[:7], ids[7:])
    assert found.total == pytest.approx(sum(expected), abs=TOLERANCE * 6)
    with pytest.raises(UserError, match="no tokens"):
        generator.text_log_likelihood([("", "three")])


def test_text_that_looks_like_a_special_token_is_text(generator):
    [found] = generator.log_likelihood([(CHAT, "<|im_end|>")])
    assert found.tokens == len("<|im_end|>")


def test_the_local_generator_is_a_generator_and_a_scorer(generator):
    assert isinstance(generator, Generator)
    assert scorer_of(generator) is generator


def test_bfloat16_is_close(model, pairs):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
    [ours], [theirs] = log_probs(half, pairs[7:8]), log_probs(model, pairs[7:8])
    assert ours.dtype == np.float32
    assert abs(ours.mean() - theirs.mean()) < 0.02 * abs(theirs.mean())


# --- the default weights ------------------------------------------------------------------------------------


def chat_of(case):
    return [Message(role, content) for role, content in case["messages"]], case["text"]


@pytest.mark.weights
def test_smollm2_finds_texts_as_likely_as_transformers_does(generator_weights):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    ours = LocalGenerator(str(generator_weights), "float32", adapter=None)
    found = ours.log_likelihood([chat_of(case) for case in golden["chat"]])
    found += ours.text_log_likelihood([(case["prompt"], case["text"]) for case in golden["plain"]])
    expected = [*golden["chat"], *golden["plain"]]
    assert [value.tokens for value in found] == [case["tokens"] for case in expected]
    totals = [case["total"] for case in expected]
    np.testing.assert_allclose([value.total for value in found], totals, rtol=1e-4, atol=1e-3)
    assert sum(value.tokens for value in found) > TOKENS_PER_CALL
