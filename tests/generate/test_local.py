"""Chat messages to streamed text, with a tiny checkpoint loaded by the real loading code."""

import json
import shutil
import time

import jax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rag.generate import Request, join_text, scheduler
from rag.generate.engine import Engine
from rag.generate.kv.chunk_cache import ChunkKVCache
from rag.generate.local import LocalGenerator
from rag.generate.speculative import DraftLengthPolicy
from rag.ops.sampling import Sampling
from rag.runtime.machine.clock import Clock
from rag.types import Message, Usage, UserError
from tests.generate.decode import alone
from tests.tiny_models import write_decoder
from tests.trials import tries

CHATS = [[Message("user", "What is a seal?")], [Message("system", "Be brief."), Message("user", "Why?")]]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("checkpoint")
        write_decoder(folder)
        generator = LocalGenerator(str(folder), "float32")
        assert generator.context_length == 512  # loads it, while the cache is ours
        return generator


def written(generator, chat, **options):
    *pieces, usage = generator.stream(Request(chat, **options))
    assert isinstance(usage, Usage)
    return "".join(pieces), usage


def generated(generator, chats, **options):
    return generator.generate([Request(chat, **options) for chat in chats])


def test_the_stream_is_the_decoded_tokens(generator):
    text, usage = written(generator, CHATS[0], max_new_tokens=40)
    prompt = generator.tokenizer.chat(CHATS[0])
    tokens = alone(generator.engine, prompt, 40)
    assert text == generator.tokenizer.decode(tokens)
    assert (usage.prompt_tokens, usage.new_tokens) == (len(prompt), len(tokens))
    assert usage.prefill_s > 0
    assert generator.prompt_tokens(CHATS[0]) == len(prompt)


def test_no_requests_need_no_weights(tmp_path, monkeypatch):
    write_decoder(tmp_path)
    monkeypatch.setattr("rag.generate.local.load_engine", None)
    assert LocalGenerator(str(tmp_path), "float32").generate([]) == []


@pytest.mark.parametrize("speculative", [False, True])
def test_why_an_answer_ended(generator, monkeypatch, speculative):
    monkeypatch.setattr(generator, "_draft_policy", DraftLengthPolicy() if speculative else None)
    text, usage = written(generator, CHATS[0], max_new_tokens=24)
    assert (usage.new_tokens, usage.finish_reason) == (24, "length")
    stopped, usage = written(generator, CHATS[0], max_new_tokens=24, stop=(text[-3:],))
    assert usage.finish_reason == "stop"
    assert text.startswith(stopped)
    engine = generator.engine
    tokens = alone(engine, generator.tokenizer.chat(CHATS[0]), 24)
    last = next(i for i, token in enumerate(tokens) if i > 2 and token not in tokens[:i])
    monkeypatch.setattr(engine, "end_ids", (*engine.end_ids, tokens[last]))
    for budget in (last + 1, last + 2):  # the end token is the last that is allowed, or not
        _, usage = written(generator, CHATS[0], max_new_tokens=budget)
        assert (usage.new_tokens, usage.finish_reason) == (last, "stop")


def test_a_batch_gives_what_each_chat_gives_alone(generator):
    single = [written(generator, chat, max_new_tokens=24)[0] for chat in CHATS]
    assert generated(generator, CHATS, max_new_tokens=24) == single


MANY = [[Message("user", "why? " * n)] for n in (1, 9, 3, 40, 2, 1, 17)]


def test_any_number_of_chats_in_batches_within_a_budget(generator, monkeypatch):
    expected = [generated(generator, [chat], max_new_tokens=8)[0] for chat in MANY]
    assert len(set(expected)) > 3
    shapes, empty_state = [], scheduler.empty_state

    def spy(part, rows, capacity):
        shapes.append((rows, capacity))
        return empty_state(part, rows, capacity)

    monkeypatch.setattr(scheduler, "empty_state", spy)
    monkeypatch.setattr(generator, "_tokens_per_batch", 300)
    assert generated(generator, MANY, max_new_tokens=8) == expected
    assert len(shapes) > 1  # it grew
    assert all(rows == 1 or rows * capacity <= 300 for rows, capacity in shapes)
    assert generator.generate([]) == []


def test_each_chat_has_its_own_seed_and_their_order_changes_nothing(generator):
    options = {"sampling": Sampling(temperature=1.0), "max_new_tokens": 8}
    requests = [Request(chat, seed=seed, **options) for seed, chat in enumerate(MANY)]
    texts = generator.generate(requests)
    assert texts[0] != texts[5]  # the same chat
    assert texts[5] == written(generator, MANY[5], seed=5, **options)[0]
    assert generator.generate(requests[::-1]) == texts[::-1]


def test_requests_of_one_call_may_have_different_options(generator):
    draw = Sampling(temperature=1.0)
    text, _ = written(generator, CHATS[0], max_new_tokens=24)
    requests = [
        Request(CHATS[0], max_new_tokens=24),
        Request(CHATS[1], draw, 12, seed=3),
        Request(CHATS[0], max_new_tokens=24, stop=(text[9:12],)),
        Request(CHATS[0], max_new_tokens=5),
        Request(CHATS[0], draw, 12, seed=3),
        Request(CHATS[0], max_new_tokens=24),
    ]
    expected = [join_text(generator.stream(request)) for request in requests]
    assert generator.generate(requests) == expected
    assert len(set(expected)) == 5


def test_texts_in_one_call_are_those_of_each_chat_streamed_alone(tmp_path_factory):
    """Of lengths that straddle buckets and caches, with stop texts, whatever is reused or looked up on the way."""
    folder = tmp_path_factory.mktemp("straddling")
    write_decoder(folder)
    lengths = st.builds(
        lambda size, by: size + by, st.sampled_from([30, 60, 124, 188, 316]), st.integers(-26, 4)
    )

    @tries(suite=2, long=400)
    @given(
        sizes=st.lists(lengths, min_size=1, max_size=6),
        budget=st.sampled_from([1, 7, 33, 100]),
        room=st.sampled_from([1, 300, 1100, 4096]),
        options=st.sampled_from([{}, {"kv_reuse": "prefix"}, {"speculative": True}]),
        cut=st.integers(0, 20),
    )
    @example(sizes=[120, 150, 60], budget=100, room=4096, options={"kv_reuse": "prefix"}, cut=9)
    def check(sizes, budget, room, options, cut):
        chats = [[Message("user", ("why is the sea " * 30)[i : i + size])] for i, size in enumerate(sizes)]
        plain = LocalGenerator(str(folder), "float32", tokens_per_batch=room)
        streaming = LocalGenerator(str(folder), "float32", **options)
        whole = [written(streaming, chat, max_new_tokens=budget)[0] for chat in chats]
        stops = tuple({text[cut : cut + 2] for text in whole[:2]} - {""})
        for stop in ((), stops):
            ended = [min([text.find(s) for s in stop if s in text], default=len(text)) for text in whole]
            expected = [text[:end] for text, end in zip(whole, ended, strict=True)]
            assert generated(plain, chats, max_new_tokens=budget, stop=stop) == expected
            assert [written(streaming, c, max_new_tokens=budget, stop=stop)[0] for c in chats] == expected

    check()


def test_the_fingerprint_is_of_the_contents(tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder in folders:
        folder.mkdir()
        write_decoder(folder)
    config = json.loads((folders[2] / "config.json").read_text())
    (folders[2] / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    one, two, three = (LocalGenerator(str(folder)) for folder in folders)
    assert one.fingerprint == two.fingerprint
    assert (
        one.fingerprint
        == LocalGenerator(str(folders[0]), steps_per_dispatch=1, tokens_per_batch=9).fingerprint
    )
    half, short = (
        LocalGenerator(str(folders[0]), **o) for o in ({"dtype": "bfloat16"}, {"context_length": 64})
    )
    assert len({one.fingerprint, three.fingerprint, half.fingerprint, short.fingerprint}) == 4
    assert len(one.fingerprint) == 64
    assert "_loaded" not in vars(one)  # no weights were loaded for it


ASKED = [  # a conversation with two passages, as rag.prompt.render marks them
    Message(
        "user", "Read: a seal eats fish / a gull nests. What eats?", reusable=((5, 23), (25, 38)), fixed=5
    )
]
SETTINGS = [
    {},
    {"kv_reuse": "prefix"},
    {"kv_reuse": "chunk"},
    {"kv_reuse": "blend"},
    {"speculative": True},
    {"kv_reuse": "chunk", "speculative": True},
]


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """fresh(**options) -> a generator that has cached nothing yet."""
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    write_decoder(tmp_path)
    return lambda **options: LocalGenerator(str(tmp_path), kv_path=str(tmp_path / "kv"), **options)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_seconds_are_disjoint_and_programs_are_made_once(fresh, options):
    """What was asked before is asked again by a generator without memory of it: its programs are there."""
    generator = fresh(**options)
    _ = generator.engine
    jax.clear_caches()
    begin = Clock.now()
    _, first = written(generator, ASKED, max_new_tokens=6)
    taken = Clock.now() - begin
    assert first.prepare_s == pytest.approx(taken.compiling, abs=1e-6) and first.prepare_s > 0
    assert min(first.prefill_s, first.decode_s) >= 0
    assert first.prefill_s + first.decode_s + first.prepare_s <= taken.wall
    written(generator, ASKED, max_new_tokens=6)  # with a prefix cache a second reading is another program
    _, again = written(generator, ASKED, max_new_tokens=6)
    assert again.prepare_s == 0


@pytest.mark.parametrize("reuse", ["chunk", "blend"])
@pytest.mark.parametrize(
    "where", ["_compute", "_cache_of"]
)  # computing passages; assembling them from their files
def test_passages_belong_to_prefill(fresh, monkeypatch, reuse, where):
    generator = fresh(kv_reuse=reuse)
    written(generator, ASKED, max_new_tokens=3)  # makes the programs
    slow = getattr(ChunkKVCache, where)

    def slowly(*arguments):
        time.sleep(0.5)
        return slow(*arguments)

    monkeypatch.setattr(ChunkKVCache, where, slowly)
    shutil.rmtree(generator.prefiller.cache.store.folder)
    _, usage = written(generator, ASKED, max_new_tokens=3)
    assert usage.prefill_s >= 0.5
    assert usage.prepare_s == 0


def test_a_slow_decode_is_no_preparation(fresh, monkeypatch):
    generator = fresh()
    written(generator, ASKED, max_new_tokens=3)
    decode = Engine.decode

    def slowly(*arguments):
        time.sleep(0.25)
        return decode(*arguments)

    monkeypatch.setattr(Engine, "decode", slowly)
    _, usage = written(generator, ASKED, max_new_tokens=3)
    assert usage.decode_s >= 0.25 and usage.prepare_s == 0


def test_a_template_gets_the_date_of_the_settings_and_not_that_of_the_clock(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "dated").mkdir()
    write_decoder(tmp_path / "dated")
    template = "{{ strftime_now('%d %b %Y, %H:%M') }} {{ messages[0].content }}"
    (tmp_path / "dated" / "chat_template.jinja").write_text(template)
    plain, same, other = (
        LocalGenerator(str(tmp_path / "dated"), **options)
        for options in ({}, {"date": "2026-01-01"}, {"date": "2024-02-29"})
    )
    chat = [Message("user", "why")]
    prompts = [some.tokenizer.decode(some.tokenizer.chat(chat)) for some in (plain, same, other)]
    assert prompts == ["01 Jan 2026, 00:00 why", "01 Jan 2026, 00:00 why", "29 Feb 2024, 00:00 why"]
    assert plain.fingerprint == same.fingerprint != other.fingerprint
    chunked = [
        LocalGenerator(str(tmp_path / "dated"), kv_reuse="chunk", date=date).fingerprint
        for date in ("2026-01-01", "2024-02-29")
    ]
    assert len({plain.fingerprint, other.fingerprint, *chunked}) == 4


def test_a_stop_string_ends_the_text_before_itself(generator):
    text, _ = written(generator, CHATS[0], max_new_tokens=40)
    stop = text[10:13]
    expected = text[: text.index(stop)]
    assert written(generator, CHATS[0], max_new_tokens=40, stop=(stop,))[0] == expected
    assert generated(generator, CHATS[:1], max_new_tokens=40, stop=(stop,)) == [expected]


class SentenceStream:
    """Decodes each token as one of five sentences, so that an answer soon repeats one."""

    def push(self, token: int) -> str:
        return f"The {('seal', 'gull', 'tern', 'crab', 'whale')[token % 5]} lives at sea. "

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize("speculative", [False, True])
def test_a_repetition_ends_the_answer_early_and_alike_in_a_batch(generator, monkeypatch, speculative):
    monkeypatch.setattr(generator, "_draft_policy", DraftLengthPolicy() if speculative else None)
    monkeypatch.setattr(generator.tokenizer, "text_stream", SentenceStream)
    texts = []
    for chat in CHATS:
        whole, _ = written(generator, chat, max_new_tokens=24)
        text, usage = written(generator, chat, max_new_tokens=24, no_repeat=True)
        sentences = text.split(". ")
        assert whole.startswith(text)
        assert len(set(sentences)) == len(sentences) <= 6
        assert usage.finish_reason == "stop"
        assert usage.new_tokens < 24
        texts.append(text)
    assert generated(generator, [*CHATS, CHATS[0]], max_new_tokens=24, no_repeat=True) == [*texts, texts[0]]
    mixed = [Request(CHATS[0], max_new_tokens=24, no_repeat=repeat) for repeat in (True, False)]
    assert generator.generate(mixed) == [texts[0], written(generator, CHATS[0], max_new_tokens=24)[0]]


def test_the_seed_decides_the_draw(generator):
    options = {"sampling": Sampling(temperature=1.0), "max_new_tokens": 12}
    assert (
        written(generator, CHATS[0], seed=3, **options)[0]
        == written(generator, CHATS[0], seed=3, **options)[0]
    )
    assert (
        written(generator, CHATS[0], seed=3, **options)[0]
        != written(generator, CHATS[0], seed=4, **options)[0]
    )


def test_invalid_settings_are_errors(tmp_path):
    with pytest.raises(UserError, match="dtype=int3"):
        LocalGenerator(dtype="int3")
    for date in ("1 May", "2026-02-30", "2026-01-01T10:00", ""):
        with pytest.raises(UserError, match=r"date=.* is not valid: it must be a date, as 2026-01-31"):
            LocalGenerator(date=date)
    with pytest.raises(UserError, match="tokens_per_batch=0"):
        LocalGenerator(tokens_per_batch=0)
    with pytest.raises(UserError, match="steps_per_dispatch=0"):
        LocalGenerator(steps_per_dispatch=0)
    (tmp_path / "notes.txt").write_text("no weights")
    for use in (lambda other: other.count("x"), lambda other: other.fingerprint):
        with pytest.raises(UserError, match="neither a GGUF file nor a folder"):
            use(LocalGenerator(str(tmp_path / "notes.txt")))
