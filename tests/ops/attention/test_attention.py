"""Every implementation of attention against a float64 oracle, forward and backward, and what programs hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from rag import native
from rag.bench.timing import compiled_temp_bytes
from rag.models.layers import quantize_weights
from rag.models.llama import model as llama
from rag.ops.attention import IMPLEMENTATIONS, attention
from rag.ops.attention.options import BlockSizes
from rag.ops.attention.tiles import exp2
from tests.ops.attention.cases import (
    CAUSAL,
    SMALL,
    Case,
    both_ways,
    check,
    close,
    forward,
    inputs,
    ints,
    needs_native,
    packed,
    refusal,
)
from tests.reference import attention_oracle
from tests.tiny_models import tiny_decoder

_float32 = jnp.zeros((1, 1, 1, 32))
LINEAR = [
    pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=str(reason)))
    for name, implementation in IMPLEMENTATIONS.items()
    if implementation.linear_memory
    for reason in [refusal(name, _float32, _float32, _float32, return_lse=True)]
]


@pytest.fixture(params=[True, False], ids=["native", "xla"])
def with_native(request, monkeypatch):
    """Run with and without native code to choose from."""
    if not request.param:
        monkeypatch.setattr(native, "available", lambda: False)
    jax.clear_caches()
    yield
    jax.clear_caches()


# Mask arguments are traced: cases of one shape and the same static options share one compiled program.
WINDOW = {"window": 6}
BOTH = CAUSAL | {"window": 19}
SORTED = {
    "q_segments": packed("00000111111111222---", "01234567890123456789"),
    "kv_segments": packed("0" * 17 + "1" * 3 + "2" * 15 + "-" * 10, "0123456789" * 2 + "9" * 25),
}
UNSORTED = {
    "q_segments": packed("92929292921111-----0", "-" * 20),
    "kv_segments": packed("2" * 17 + "9-01" + "-" * 24, "3" * 45),
}
PREFIXED = SORTED | {"q_prefixes": packed("-----000--0011111---", "99999-----0123401234")}
SCATTERED = {"q_positions": np.array([[*range(40, 20, -1)], [3, 44, 0, 7, 7, -2, 90, *range(13, 39, 2)]])}
CASES = {
    "full": Case(),
    "padding": Case(options={"kv_length": ints(45, 1)}),
    "a row without keys": Case(options={"kv_length": ints(0, 33)}),
    "causal": Case(options=CAUSAL),
    "offset": Case(options=CAUSAL | {"q_offset": ints(25, 25)}),
    "offset by row": Case(options=CAUSAL | {"q_offset": ints(0, 13)}),
    "queries before and past the keys": Case(options=CAUSAL | {"q_offset": ints(-10, 60)}),
    "causal padding": Case(options=CAUSAL | {"q_offset": ints(25, 2), "kv_length": ints(45, 18)}),
    "no keys at all": Case(options=CAUSAL | {"kv_length": ints(0, 0)}),
    "scattered": Case(options=CAUSAL | SCATTERED),
    "scattered window": Case(options=WINDOW | SCATTERED | {"kv_length": ints(45, 30)}),
    "scattered, everything": Case(options=BOTH | SORTED | SCATTERED | {"kv_length": ints(42, 33)}),
    "window": Case(options=WINDOW),
    "window leaves the keys behind": Case(options=WINDOW | {"q_offset": ints(40, -20)}),
    "causal window": Case(options=BOTH),
    "causal window behind a cache": Case(options=BOTH | {"q_offset": ints(3, 41)}),
    "window of one": Case(options=CAUSAL | {"window": 1}),
    "packed": Case(options=SORTED),
    "packed, in no order": Case(options=UNSORTED),
    "packed behind prefixes": Case(options=PREFIXED),
    "packed behind prefixes, causal": Case(options=CAUSAL | PREFIXED | {"q_offset": ints(20, 0)}),
    "packed causal": Case(options=CAUSAL | SORTED | {"q_offset": ints(20, 0)}),
    "everything": Case(options=BOTH | SORTED | {"q_offset": ints(20, 5), "kv_length": ints(42, 33)}),
    "many blocks": Case(b=1, h=2, t=77, s=77, options=CAUSAL),
    "one query": Case(t=1, options=CAUSAL | {"q_offset": ints(44, 7)}),
    "shorter than a block": Case(t=5, s=3),
    "one kv head, scale": Case(h=5, k=1, options=CAUSAL | {"scale": 0.5}),
    "every head its own": Case(b=1, h=3, k=3, options=CAUSAL),
    "narrow heads": Case(b=1, d=4, options=CAUSAL),
    "64 wide": Case(b=1, h=3, k=1, t=32, s=32, d=64, options=CAUSAL),
    "128 wide": Case(b=1, h=2, k=1, t=32, s=32, d=128, options=CAUSAL),
}

# Programs of their own whose masks and shapes other cases take both ways: "everything", "window", "128 wide".
FORWARD_ONLY = ("scattered", "scattered window", "window of one", "packed causal", "narrow heads", "64 wide")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32(implementation, name):
    if IMPLEMENTATIONS[implementation].linear_memory:
        gradients = name not in FORWARD_ONLY
    else:
        gradients = name in ("causal", "no keys at all", "everything")  # JAX derives these gradients
    check(CASES[name], implementation, gradients=gradients)


@pytest.mark.parametrize("name", ["offset by row", "128 wide", "everything"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation, name):
    check(
        CASES[name], implementation, "bfloat16", gradients=implementation == "flash" and name != "everything"
    )


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_some_pairs_at_a_time(pairs):
    """Any number of kv heads at a time gives the same; 3 does not divide the 4 and falls back to all."""
    case = CASES["causal padding"]
    check(case, "flash", gradients=pairs < 3, blocks=BlockSizes(8, 16, pairs))


@pytest.mark.usefixtures("with_native")
@pytest.mark.parametrize("length", [30, 280])
def test_best_for_a_cache(length):
    """The choice between the whole cache and its used blocks is made at run time; both are right."""
    case = Case(t=2, s=300, options=CAUSAL | {"q_offset": ints(length - 2, 7)})
    check(case, None, gradients=False, blocks=None)


@pytest.mark.usefixtures("with_native")
@pytest.mark.parametrize(("tokens", "keys"), [(4, 200), (17, 600), (90, 700)])
def test_best_for_scattered_tokens(tokens, keys):
    """A few tokens of a prompt are recomputed and attend to the whole cache."""
    at = np.random.default_rng(1).permuted(np.tile(np.arange(keys), (2, 1)), axis=1)[:, :tokens]
    options = CAUSAL | {"q_positions": at, "kv_length": ints(keys, keys - 50)}
    check(Case(h=3, k=1, t=tokens, s=keys, d=16, options=options), None, gradients=False, blocks=None)


@pytest.mark.usefixtures("with_native")
@pytest.mark.parametrize("tokens", [70, 300, 600])
def test_best_without_a_cache(tokens):
    """Every option left to its default: one block, unrolled blocks, loops."""
    case = Case(b=1, h=3, k=1, t=tokens, s=tokens, d=16)
    q, k, v, dout, _ = inputs(case)
    want = attention_oracle(q, k, v, dout=dout, causal=True)
    out, gradients = both_ways(q, k, v, dout, causal=True)
    close(out, want.out)
    for gradient, exact in zip(gradients, (want.dq, want.dk, want.dv), strict=True):
        close(gradient, exact, relative=True)


def test_unrolled_blocks_take_every_option():
    case = Case(t=200, s=210, d=16, options={"kv_length": ints(210, 40), "window": 90})
    segments = packed("0" * 90 + "1" * 100 + "-" * 10, "3" * 200)
    options = case.options | {"q_segments": segments, "kv_segments": np.pad(segments, ((0, 0), (0, 10)))}
    q, k, v, dout, _ = inputs(case)
    want = attention_oracle(q, k, v, dout=dout, causal=True, **options)
    out, lse = forward(q, k, v, causal=True, return_lse=True, implementation="flash", **options)
    close(out, want.out)
    close(lse, want.lse)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 45), min_size=2, max_size=2),
    offsets=st.lists(st.integers(-8, 60), min_size=2, max_size=2),
    ids=st.lists(st.integers(-1, 2), min_size=45, max_size=45),
    prefixes=st.none() | st.lists(st.integers(-1, 2), min_size=40, max_size=40),
    sort=st.booleans(),
)
@pytest.mark.parametrize("implementation", LINEAR)
def test_any_mask_arguments(implementation, lengths, offsets, ids, prefixes, sort):
    """Whatever the lengths, offsets and segments, no visible block is skipped, by native code in neither direction."""
    options = BOTH | {"kv_length": ints(*lengths), "q_offset": ints(*offsets)}
    segments = {"q_segments": packed("0" * 20, "0" * 20), "kv_segments": packed("0" * 45, "0" * 45)}
    segments["q_segments"][0], segments["kv_segments"][0] = ids[:20], sorted(ids) if sort else ids
    if prefixes:
        segments["q_prefixes"] = np.array(prefixes, np.int32).reshape(2, 20)
    check(Case(options=options | segments), implementation, gradients=implementation == "native")


@pytest.mark.parametrize("implementation", LINEAR)
def test_decode_equals_prefill(implementation):
    """Queries one by one, with a cache whose unused slots hold garbage, give the same as all together."""
    q, k, v, *_ = inputs(Case(t=10, s=10))
    together = attention(q, k, v, causal=True, implementation="reference")
    garbage = jnp.full((2, 2, 22, 32), 1e9)
    k, v = (jnp.concatenate([x, garbage], axis=2) for x in (k, v))
    for i in range(10):
        options = {"causal": True, "q_offset": i, "implementation": implementation, "blocks": SMALL}
        one = forward(q[:, :, i : i + 1], k, v, **options)
        close(one, np.asarray(together[:, :, i : i + 1]))


@pytest.mark.parametrize("implementation", LINEAR)
def test_large_scores(implementation):
    """Scores far beyond exp's range: the running maximum keeps them finite, forward and backward."""
    case = CASES["offset"]
    q, k, v, dout, dlse = inputs(case)
    want = attention_oracle(q * 300, k, v, dout=dout, **case.options)
    options = case.options | {"kv_length": jnp.full(2, 45), "return_lse": True, "blocks": SMALL}
    (out, _), found = both_ways(
        q * 300, k, v, (dout, dlse), **options, implementation=implementation, window=None
    )
    np.testing.assert_allclose(out, want.out, atol=1e-4)
    assert all(np.isfinite(x).all() for x in found)


@pytest.mark.parametrize("implementation", LINEAR)
def test_nan_stays_nan(implementation):
    q, k, v, *_ = inputs(Case(t=20, s=20, d=64))
    out, lse = forward(q.at[0, 0, 3].set(jnp.nan), k, v, return_lse=True, implementation=implementation)
    nan = np.zeros(out.shape[:3], bool)
    nan[0, 0, 3] = True
    np.testing.assert_array_equal(np.isnan(out).any(axis=3), nan)
    np.testing.assert_array_equal(np.isnan(lse), nan)


def test_lengths_past_the_keys_and_of_other_integers():
    case = Case(s=45, options={"kv_length": np.array([60, 33], np.int16)})
    check(case, None, gradients=False, blocks=None)


def test_exponential():
    """2^x to 4e-7 relative, and exactly 0 and 1 where the softmax relies on it."""
    x = np.concatenate([-np.linspace(0, 125, 40_001), [0.0]]).astype(np.float32)
    got = np.asarray(jax.jit(exp2)(x), np.float64)
    np.testing.assert_allclose(got, np.exp2(x.astype(np.float64)), rtol=4e-7)
    assert got[-1] == 1.0
    assert not np.any(jax.jit(exp2)(jnp.array([-127.0, -1e3, -1e30])))


def test_flash_memory():
    """At 2,048 tokens flash needs at most a fifteenth of the temporaries of jax.nn.dot_product_attention."""
    q, k = (
        jax.ShapeDtypeStruct((1, 9, 2048, 64), "float32"),
        jax.ShapeDtypeStruct((1, 3, 2048, 64), "float32"),
    )

    def peer(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).swapaxes(1, 2)

    ours = compiled_temp_bytes(lambda *qkv: attention(*qkv, causal=True, implementation="flash"), q, k, k)
    assert 0 < ours <= compiled_temp_bytes(peer, q, k, k) / 15


def test_names_that_cannot_serve():
    q, k, v, *_ = inputs(Case())
    with pytest.raises(NotImplementedError, match="log-sum-exp"):
        attention(q, k, v, return_lse=True, implementation="xla")
    with pytest.raises(NotImplementedError, match="takes float32"):
        attention(q.astype(jnp.bfloat16), k, v, implementation="native")
    with pytest.raises(ValueError, match="choose from reference, flash, native, xla"):
        attention(q, k, v, implementation="cudnn")


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [(3, {}, "share"), (4, {"window": 0}, "window"), (4, {"q_segments": SORTED["q_segments"]}, "both")],
)
def test_contradictions(heads, options, message):
    q, k, v, *_ = inputs(Case(h=heads))
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **{name: jnp.asarray(x) if name != "window" else x for name, x in options.items()})


def test_offset_or_positions():
    q, k, v, *_ = inputs(Case())
    with pytest.raises(ValueError, match="not both"):
        attention(q, k, v, q_offset=jnp.zeros(2, int), q_positions=jnp.asarray(SCATTERED["q_positions"]))


# --- the platform that a program is lowered for


def lowered_for(platform: str, function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("tokens", [1, 20, 300])
@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_attention_for_an_accelerator_calls_no_native_code(platform, tokens):
    q, k, v, *_ = inputs(Case(t=tokens, s=300))

    def both_directions(q, k, v):
        out, backward = jax.vjp(partial(attention, causal=True), q, k, v)
        return out, backward(out)

    assert "rag_" not in lowered_for(platform, both_directions, q, k, v)
    native_on_cpu = tokens > 8 and native.available()
    assert ("rag_attention_backward" in lowered_for("cpu", both_directions, q, k, v)) == native_on_cpu


@pytest.mark.parametrize("int8", [False, True])
def test_a_decoder_for_an_accelerator_calls_no_native_code(int8):
    model = quantize_weights(tiny_decoder()) if int8 else tiny_decoder()
    for _, layer in nnx.iter_modules(model):
        if hasattr(layer, "scale") and hasattr(layer, "native"):
            layer.native = int8 and native.available()
    tokens = jnp.ones((2, 20), jnp.int32)
    text = lowered_for("cuda", llama.forward, model, tokens, jnp.zeros(2, jnp.int32))
    assert "rag_" not in text


@needs_native
def test_native_code_that_was_asked_for_cannot_be_lowered_for_an_accelerator():
    q, k, v, *_ = inputs(Case())
    with pytest.raises(NotImplementedError, match="cuda"):
        lowered_for("cuda", partial(attention, implementation="native"), q, k, v)
    model = quantize_weights(tiny_decoder())
    llama.use_native(model)
    with pytest.raises(NotImplementedError, match="cuda"):
        lowered_for("cuda", llama.forward, model, jnp.ones((2, 4), jnp.int32), jnp.zeros(2, jnp.int32))
