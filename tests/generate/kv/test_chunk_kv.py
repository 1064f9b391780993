"""Precomputed chunk KV caches, assembled: against a plain prefill, and against rotations by complex numbers."""

import io
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag.generate import Request, join_text
from rag.generate.decode_state import pad_prompts
from rag.generate.engine import Engine
from rag.generate.kv import chunk_cache
from rag.generate.kv.blend import blend
from rag.generate.kv.chunk import ChunkKVOptions, ChunkPrefiller
from rag.generate.kv.prompt_parts import split_prompt
from rag.generate.local import LocalGenerator
from rag.generate.scoring import log_probs
from rag.models.llama import checkpoint as llama_checkpoint
from rag.models.llama import model as llama
from rag.models.llama.model import KVCache, Llama, forward
from rag.models.placement import pack
from rag.prompt import PromptTemplate, render
from rag.runtime.cache import entries
from rag.types import Context, Message, Source, UserError
from tests.damage import WAYS
from tests.generate.decode import request, written
from tests.tiny_models import DECODER, write_decoder
from tests.typecheck import unchecked

TEMPLATE = PromptTemplate(
    user="Read:\n{context}\n\nQ: {question}", passage="[{n}] {text}", system="Be brief."
)
PASSAGES = ("Seals sleep on ice and under water.", "Falk dug the harbour in 1742, by hand.", "It rained.")

HALF = (
    5e-3  # what the rounding of float16 files comes to, relative, behind two layers of large random weights
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_decoder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        model, tokenizer = llama_checkpoint.load(folder)
    model = jax.tree.map(jnp.asarray, model)
    return Engine(model, tokenizer.eos_ids), tokenizer


@pytest.fixture
def reader(loaded, tmp_path):
    return lambda **options: ChunkPrefiller(
        *loaded, "f" * 64, ChunkKVOptions(str(tmp_path / "kv"), **options)
    )


def asked(*passages, question="Who dug it?", template=TEMPLATE):
    sources = tuple(Source(n, "a.md", 0, len(t), 1.0, t) for n, t in enumerate(passages, 1))
    return render(template, question, Context(sources, tokens=0))


def difference(one: KVCache, other: KVCache, slots: slice) -> float:
    """The largest of all layers', relative."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    parts = [(np.asarray(a[:, :, slots]), np.asarray(b[:, :, slots])) for a, b in pairs]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in parts)


def started(prefill, messages, new_tokens):
    return prefill.start(Request(messages, max_new_tokens=new_tokens))


def full(engine, ids):
    return forward(engine.model, jnp.asarray([ids]), jnp.zeros(1, jnp.int32))[1]


def test_a_prompt_in_parts(loaded):
    _, tokenizer = loaded
    parts = split_prompt(tokenizer, asked(*PASSAGES))
    chat = asked(*PASSAGES)
    assert parts.ids == tokenizer.chat(chat)  # each byte is a token here, so that cuts change none
    shown = [tokenizer.decode(ids) for _, ids in parts.passages]
    assert shown == [" " + text for text in PASSAGES]
    assert all(tuple(parts.ids[at : at + len(ids)]) == ids for at, ids in parts.passages)
    prefix = tokenizer.decode(parts.prefix, skip_special=False)
    assert prefix == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRead:\n"
    assert parts.shared == len(parts.prefix)


def test_neither_question_nor_earlier_turns_nor_path_changes_what_is_cached(loaded):
    _, tokenizer = loaded
    first = split_prompt(tokenizer, asked(*PASSAGES))
    system, user = asked(*PASSAGES[::-1], question="Why?")
    later = split_prompt(tokenizer, [system, Message("user", "Hi"), Message("assistant", "Hello."), user])
    assert later.prefix == first.prefix
    assert 0 < later.shared < len(later.prefix)
    assert {ids for _, ids in later.passages} == {ids for _, ids in first.passages}
    question_first = replace(TEMPLATE, user="{question} by {context}")
    some, other = (
        split_prompt(tokenizer, asked(PASSAGES[0], question=q, template=question_first)) for q in ("A", "B")
    )
    assert some.prefix == other.prefix


def test_the_first_passage_is_exact(loaded, reader):
    engine, _ = loaded
    template = replace(TEMPLATE, passage="{text}")  # nothing is between the prefix and it
    ids, state = started(reader(), asked(PASSAGES[0], template=template), 16)
    plain = engine.prefill(request(ids, 16))
    assert difference(state.cache, plain.cache, slice(0, len(ids))) < HALF
    assert np.array_equal(state.token, plain.token)
    texts = [written(engine, some) for some in (state, plain)]
    assert texts[0] == texts[1] and len(texts[0]) > 1


def rotated(k, positions):
    """Keys [1, K, T, D] rotated to positions, the pairs (i, i + D/2) as complex numbers."""
    half = k.shape[-1] // 2
    numbers = np.asarray(k[..., :half], np.float64) + 1j * np.asarray(k[..., half:], np.float64)
    turned = numbers * np.exp(1j * positions[:, None] * DECODER.rope_theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("dtype, tolerance", [("float16", 5e-3), ("int8", 0.1)])
def test_keys_are_rotated_to_the_passages_position(loaded, reader, dtype, tolerance):
    engine, tokenizer = loaded
    parts = split_prompt(tokenizer, asked(*PASSAGES))
    prefill = reader(dtype=dtype)
    cache = prefill.cache.assemble(parts, engine.capacity(len(parts.ids), 8))
    fresh = prefill._fresh(parts)
    at, ids = parts.passages[2]
    start = len(parts.prefix)
    alone = full(engine, [*parts.prefix, *ids])
    for layer in range(DECODER.num_hidden_layers):
        keys = rotated(alone.keys[layer][:, :, start:], np.full(len(ids), at - start))
        values = alone.values[layer][:, :, start:]
        scale = float(np.abs(keys).max())
        np.testing.assert_allclose(
            cache.keys[layer][:, :, at : at + len(ids)], keys, atol=tolerance * scale / 3
        )
        scale = float(np.abs(values).max())
        np.testing.assert_allclose(
            cache.values[layer][:, :, at : at + len(ids)], values, atol=tolerance * scale / 3
        )
    inside = {i for at, ids in parts.passages for i in range(at, at + len(ids))} | set(range(start))
    assert fresh == [i for i in range(len(parts.ids)) if i not in inside]
    assert fresh[-1] == len(parts.ids) - 1


@pytest.mark.parametrize("options", [{"recompute": 1000}, {"blend_share": 1.0}])
def test_recomputing_everything_is_a_plain_prefill(loaded, reader, options):
    engine, _ = loaded
    ids, state = started(reader(**options), asked(*PASSAGES), 8)
    plain = engine.prefill(request(ids, 8))
    assert difference(state.cache, plain.cache, slice(0, len(ids))) < HALF
    assert np.array_equal(state.token, plain.token)
    _, mixed = started(reader(), asked(*PASSAGES), 8)
    assert difference(mixed.cache, plain.cache, slice(0, len(ids))) > 10 * HALF


def test_recomputing_takes_the_first_tokens_of_each_later_passage(loaded, reader):
    _, tokenizer = loaded
    template = replace(TEMPLATE, passage="{text}")
    parts = split_prompt(tokenizer, asked(*PASSAGES, template=template))
    without, some = (reader(recompute=n)._fresh(parts) for n in (0, 3))
    begins = [at for at, _ in parts.passages][1:]
    assert sorted({*some} - {*without}) == [at + i for at in begins for i in range(3)]


def test_blending_recomputes_what_differs_most():
    """Three layers: the second shows the differences, the third tells which tokens were recomputed."""
    model = Llama(replace(DECODER, num_hidden_layers=3), nnx.Rngs(3))
    model = jax.tree.map(lambda a: a * 3 if a.ndim == 2 else a, model)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, 40)
    plain = forward(model, jnp.asarray(ids[None]), jnp.zeros(1, jnp.int32))[1]
    noise = rng.uniform(0.1, 2.0, 40)[:, None]  # how far off each cached token is
    off = [
        [
            jnp.asarray(np.asarray(a) + noise * np.sign(rng.standard_normal(a.shape)), jnp.float32)
            for a in part
        ]
        for part in (plain.keys, plain.values)
    ]
    old = KVCache(tuple(off[0]), tuple(off[1])).resized(64)
    reused, candidates = np.arange(64) < 35, (np.arange(64) < 35) & (np.arange(64) >= 5)
    tokens = jnp.asarray(pad_prompts([ids.tolist()], 64))
    before = [np.asarray(a) for a in (old.keys[2], old.values[2])]
    new, last = blend(pack(model), old, tokens, np.int32(40), reused, candidates, count=16, layers=2)
    assert last.shape == (1, DECODER.hidden_size)
    first = [KVCache(some.keys[:2], some.values[:2]) for some in (new, plain)]
    assert difference(*first, slice(0, 40)) < 1e-4
    changed = [
        i
        for i in range(40)
        if not np.array_equal(before[0][:, :, i], new.keys[2][:, :, i])
        and not np.array_equal(before[1][:, :, i], new.values[2][:, :, i])
    ]
    most = sorted(range(5, 35), key=lambda i: -noise[i, 0])[:11]
    assert changed == sorted([*most, *range(35, 40)])


def test_what_is_cached_is_not_computed_again(loaded, reader, monkeypatch):
    ours = reader()
    chats = [asked(*PASSAGES[:2]), asked(PASSAGES[2], PASSAGES[0], question="Why?")]
    seen = []
    done = ours.cache.fill(chats, seen.append)
    assert (len(done.sizes), done.computed, seen[-1]) == (4, 4, 4)  # the prefix is one of them
    files = sorted(ours.cache.store.folder.glob("*.npy"))
    assert {file: nbytes for file, (_, nbytes) in done.sizes.items()} == {f: f.stat().st_size for f in files}
    assert {tokens for tokens, _ in done.sizes.values()} >= {1 + len(text) for text in PASSAGES}
    files[1].unlink()  # as if killed before it
    assert ours.cache.fill(chats).computed == 1

    def computed(*_):
        raise AssertionError("a cached passage is computed again")

    monkeypatch.setattr(chunk_cache, "prefill_passages", computed)
    assert ours.cache.fill(chats).computed == 0
    assert len(started(ours, chats[1], 4)[0]) > 40
    with pytest.raises(AssertionError):
        started(ours, asked("Another passage."), 4)


def test_another_model_prefix_or_dtype_has_files_of_its_own(loaded, reader, tmp_path):
    paths = {
        reader().cache.store.path((1,), (2,)),
        reader().cache.store.path((), (1, 2)),
        reader(dtype="int8").cache.store.path((1,), (2,)),
        ChunkPrefiller(*loaded, "e" * 64, ChunkKVOptions(str(tmp_path / "kv"))).cache.store.path((1,), (2,)),
    }
    assert len(paths) == 4


def as_another(path):
    """Put a file there that is whole, and holds something else."""
    content = io.BytesIO()
    np.save(content, np.zeros((2, 2), np.float16))
    entries.write(path, content.getvalue())


@pytest.mark.parametrize("way", [*WAYS, "another"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_damaged_file_is_computed_again(loaded, reader, dtype, way, capsys):
    chat = asked(PASSAGES[0])
    ours = reader(dtype=dtype)
    ids, intact = started(ours, chat, 4)
    capsys.readouterr()
    files = sorted(ours.cache.store.folder.glob("*.npy"))
    before = [file.read_bytes() for file in files]
    for file in files:
        (WAYS | {"another": as_another})[way](file)
        again, state = started(reader(dtype=dtype), chat, 4)
        assert again == ids and difference(state.cache, intact.cache, slice(0, len(ids))) == 0
        message = capsys.readouterr().err
        assert (file.name in message and "made again" in message) == (way != "gone") and message.count(
            "\n"
        ) < 2
    assert [file.read_bytes() for file in files] == before
    WAYS["middle"](files[0])
    assert reader(dtype=dtype).cache.fill([chat]).computed == 1


def test_missing_files_are_counted_before(loaded, reader):
    ours = reader().cache
    chats = [asked(PASSAGES[0]), asked(*PASSAGES[:2])]
    missing = ours.missing(chats)
    assert not any(file.exists() for file in missing)
    sizes = ours.fill(chats).sizes
    assert missing == {file: tokens for file, (tokens, _) in sizes.items()}
    for tokens, nbytes in sizes.values():  # and a header and a checksum
        assert 0 < nbytes - tokens * ours.store.token_bytes < 300
    assert ours.missing(chats) == {}
    layers, keys_and_values, kv_heads, head_dim, scale = 2, 2, 2, 8, 4
    expected = layers * keys_and_values * kv_heads * (head_dim + scale)
    assert reader(dtype="int8").cache.store.token_bytes == expected


def test_likelihoods_behind_cached_passages(loaded, reader):
    engine, tokenizer = loaded
    chat, gold = asked(*PASSAGES), tokenizer.encode("Falk, in 1742", special=False)
    exact = reader(recompute=1000)
    [expected] = log_probs(engine.model, [(exact.prompt(chat), gold)])
    np.testing.assert_allclose(exact.log_probs([(chat, gold)])[0], expected, rtol=HALF, atol=HALF)
    [mixed, empty] = reader().log_probs([(chat, gold), (chat, [])])
    assert mixed.shape == expected.shape and np.abs(mixed - expected).max() > 1
    assert empty.shape == (0,)


def test_a_conversation_without_passages(loaded, reader):
    engine, tokenizer = loaded
    chat = [Message("user", "Hello there")]
    ids, state = started(reader(), chat, 4)
    assert ids == tokenizer.chat(chat)
    assert np.array_equal(state.token, engine.prefill(request(ids, 4)).token)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "int4"}, "dtype=int4"),
        ({"recompute": -1}, "recompute=-1"),
        ({"blend_share": 1.5}, r"blend_share=1\.5"),
    ],
)
def test_invalid_options_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        unchecked(ChunkKVOptions, **options)


# --- behind the generator


@pytest.fixture
def generator(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_decoder(folder)
    return lambda **options: LocalGenerator(
        str(folder), kv_path=str(tmp_path), **{"dtype": "float32"} | options
    )


def test_every_kind_of_reuse_writes_an_answer(generator, tmp_path):
    chats = [asked(*PASSAGES), asked(*PASSAGES[::-1], question="Why?")]
    plain = generator()
    prefix = generator(kv_reuse="prefix")
    for chat in (*chats, *chats):
        streams = [list(some.stream(Request(chat, max_new_tokens=12))) for some in (plain, prefix)]
        assert streams[0][:-1] == streams[1][:-1] and len(streams[0]) > 1
    assert prefix.fingerprint == plain.fingerprint and not (tmp_path / "chunk_kv").exists()
    exact = generator(kv_reuse="chunk", kv_recompute=1000)
    assert exact.prompt_tokens(chats[0]) == plain.prompt_tokens(chats[0])
    golds = [(chat, "by hand") for chat in chats]
    for one, other in zip(exact.log_likelihood(golds), plain.log_likelihood(golds), strict=True):
        assert (one.total, one.tokens) == (pytest.approx(other.total, rel=1e-2), 7)
    made = {kind: generator(kv_reuse=kind) for kind in ("chunk", "blend")}
    assert len({some.fingerprint for some in (plain, exact, *made.values())}) == 4
    for some in made.values():
        requests = [Request(chat, max_new_tokens=8) for chat in chats]
        streamed = [join_text(some.stream(request)) for request in requests]
        assert some.generate(requests) == streamed and all(streamed)
    assert len(list((tmp_path / "chunk_kv").glob("*.npy"))) == 4  # one set of files for all of them


@pytest.mark.parametrize(
    "options, message",
    [({"kv_reuse": "some"}, "kv_reuse=some"), ({"prefix_mib": -1}, "prefix_mib=-1")],
)
def test_kinds_that_are_not_there(generator, options, message):
    with pytest.raises(UserError, match=message):
        generator(**options)


@pytest.mark.parametrize(
    "options", [{"kv_reuse": "chunk"}, {"kv_reuse": "chunk", "kv_dtype": "int8"}, {"kv_reuse": "blend"}]
)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_unused_slots_change_no_answer(generator, options, dtype, monkeypatch):
    chat = asked(*PASSAGES)

    def answer() -> str:
        jax.clear_caches()
        made = generator(dtype=dtype, **options)
        return join_text(made.stream(Request(chat, max_new_tokens=12)))

    clean = answer()
    monkeypatch.setattr(llama, "UNUSED_SLOT", 1e4)
    assert answer() == clean
    jax.clear_caches()
