"""Chat messages to streamed text, with a tiny checkpoint read through the real loading code."""

import json

import pytest

from rag.generate import batching
from rag.generate.local import LocalGenerator, StoppedText
from rag.ops.sampling import Sampling
from rag.types import Message, Usage, UserError
from tests.tiny import write_checkpoint

CHATS = [[Message("user", "What is a seal?")], [Message("system", "Be brief."), Message("user", "Why?")]]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("checkpoint")
        write_checkpoint(folder)
        generator = LocalGenerator(str(folder))
        assert generator.context_length == 512  # loads it, while the cache is ours
        return generator


def written(generator, chat, **options):
    *pieces, usage = generator.stream(chat, **options)
    assert isinstance(usage, Usage)
    return "".join(pieces), usage


def test_the_stream_is_the_decoded_tokens(generator):
    text, usage = written(generator, CHATS[0], max_new_tokens=40)
    prompt = generator.tokenizer.chat(CHATS[0])
    [tokens] = generator.engine.generate([prompt], 40)
    assert text == generator.tokenizer.decode(tokens)
    assert (usage.prompt_tokens, usage.new_tokens) == (len(prompt), len(tokens))
    assert usage.prefill_s > 0
    assert generator.prompt_tokens(CHATS[0]) == len(prompt)


def test_a_batch_gives_what_each_chat_gives_alone(generator):
    alone = [written(generator, chat, max_new_tokens=24)[0] for chat in CHATS]
    assert generator.generate(CHATS, max_new_tokens=24) == alone


MANY = [[Message("user", "why? " * n)] for n in (1, 9, 3, 40, 2, 1, 17)]


def test_any_number_of_chats_in_batches_within_a_budget(generator, monkeypatch):
    expected = [generator.generate([chat], max_new_tokens=8)[0] for chat in MANY]
    assert len(set(expected)) > 3
    shapes, vacant = [], batching.vacant

    def spy(part, rows, capacity):
        shapes.append((rows, capacity))
        return vacant(part, rows, capacity)

    monkeypatch.setattr(batching, "vacant", spy)
    monkeypatch.setattr(generator, "_tokens_per_batch", 300)
    assert generator.generate(MANY, max_new_tokens=8) == expected
    assert len(shapes) > 1  # it grew
    assert all(rows == 1 or rows * capacity <= 300 for rows, capacity in shapes)
    assert generator.generate([], max_new_tokens=8) == []


def test_each_chat_has_its_own_seed_and_their_order_changes_nothing(generator):
    options = {"sampling": Sampling(temperature=1.0), "max_new_tokens": 8}
    seeds = list(range(len(MANY)))
    texts = generator.generate(MANY, seeds=seeds, **options)
    assert texts[0] != texts[5]  # the same chat
    assert texts[5] == written(generator, MANY[5], seed=5, **options)[0]
    backwards = generator.generate(MANY[::-1], seeds=seeds[::-1], **options)
    assert backwards == texts[::-1]
    assert generator.generate(MANY[:1], **options) == generator.generate(MANY[:1], seeds=[0], **options)


def test_the_fingerprint_is_of_the_contents(tmp_path):
    places = [tmp_path / name for name in ("one", "two", "three")]
    for place in places:
        place.mkdir()
        write_checkpoint(place)
    config = json.loads((places[2] / "config.json").read_text())
    (places[2] / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    one, two, three = (LocalGenerator(str(place)) for place in places)
    assert one.fingerprint == two.fingerprint
    assert (
        one.fingerprint
        == LocalGenerator(str(places[0]), steps_per_dispatch=1, tokens_per_batch=9).fingerprint
    )
    half, short = (
        LocalGenerator(str(places[0]), **o) for o in ({"dtype": "bfloat16"}, {"context_length": 64})
    )
    assert len({one.fingerprint, three.fingerprint, half.fingerprint, short.fingerprint}) == 4
    assert len(one.fingerprint) == 64
    assert "_loaded" not in vars(one)  # no weights were read for it


def test_a_stop_string_ends_the_text_before_itself(generator):
    text, _ = written(generator, CHATS[0], max_new_tokens=40)
    stop = text[10:13]
    expected = text[: text.index(stop)]
    assert written(generator, CHATS[0], max_new_tokens=40, stop=(stop,))[0] == expected
    assert generator.generate(CHATS[:1], max_new_tokens=40, stop=(stop,)) == [expected]


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


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), "abcabd"),
        (("zz",), "abcabd"),
        (("abd",), "abc"),
        (("bd", "ca"), "ab"),
        (("d",), "abcab"),
        (("",), "abcabd"),
    ],
)
def test_stop_strings_may_span_tokens(stop, expected):
    text = StoppedText(stop)
    pieces = list(map(text.push, "abcabd"))
    assert "".join([*pieces, text.finish()]) == expected
    assert text.stopped == (expected != "abcabd")


def test_no_text_is_held_back_longer_than_it_must():
    assert list(map(StoppedText(("XY",)).push, "aXbX")) == ["a", "", "Xb", ""]


def test_settings_that_cannot_be_are_told(tmp_path):
    with pytest.raises(UserError, match="dtype=int3"):
        LocalGenerator(dtype="int3")
    with pytest.raises(UserError, match="tokens_per_batch=0"):
        LocalGenerator(tokens_per_batch=0)
    with pytest.raises(UserError, match="steps_per_dispatch=0"):
        LocalGenerator(steps_per_dispatch=0)
    (tmp_path / "notes.txt").write_text("no weights")
    for use in (lambda other: other.count("x"), lambda other: other.fingerprint):
        with pytest.raises(UserError, match="neither a GGUF file nor a folder"):
            use(LocalGenerator(str(tmp_path / "notes.txt")))
