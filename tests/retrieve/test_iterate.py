"""Search in steps: a second hop that needs the first's answer, how it ends, and what the model is shown."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from rag.embed.bag_of_words import BagOfWords
from rag.index.fusion import Convex
from rag.retrieve import Retriever
from rag.retrieve.cached import cached_search
from rag.retrieve.collection import Collection
from rag.retrieve.iterate import Iterative
from rag.retrieve.search import Dense
from rag.runtime.cache.memo import Memo
from rag.types import Hit, UserError
from tests.tiny_collections import collection_of
from tests.tiny_models import GenerateOnly

DESIGNED = [
    f"the {colour} lantern was designed by {name}" for colour, name in [("blue", "mira"), ("red", "otto")]
]
BORN = ["mira was born in tarn", "otto was born in vik"]
# nearer to the questions than what answers them, but for the first hop
OTHERS = [f"where the designer of the {thing} was born is not known" for thing in ("bridge", "tower", "mill")]
TEXTS = [*OTHERS, *DESIGNED, *BORN]
BLUE, RED = (f"where was the designer of the {colour} lantern born" for colour in ("blue", "red"))


def designer_first(prompt: str) -> str:
    """A careful reader: asks where the designer was born once it knows who that is, until the prompt says where."""
    colour = re.search(r"designer of the (\w+) lantern", prompt)[1]
    if not (designer := re.search(rf"{colour} lantern was designed by (\w+)", prompt)):
        return f"who designed the {colour} lantern"
    return "DONE" if f"{designer[1]} was born" in prompt else f"Follow-up question: {designer[1]} was born in"


@dataclass
class Reader(GenerateOnly):
    """A generator that answers a prompt by a function, and records the prompts."""

    answer: Callable[[str], str] = designer_first
    context_length: int = 1000
    batches: list = field(default_factory=list)

    def generate(self, requests) -> list[str]:
        prompts = [request.messages[-1].content for request in requests]
        self.batches.append(prompts)
        return [self.answer(prompt) for prompt in prompts]


def collection(reader: Reader, memo: Memo | None = None) -> Collection:
    return collection_of(TEXTS, BagOfWords().fit(TEXTS), reader, memo)


def iterative(**options) -> Iterative:
    return Iterative(**{"retriever": Dense(), "user": "{context}\n\nQ: {question}", "passages": 7} | options)


def texts(hits: Sequence[Hit]) -> list[str]:
    return [hit.chunk.text for hit in hits]


def test_the_second_hop_needs_the_firsts_answer():
    [plain] = Dense().search(collection(Reader()), [BLUE], 3)
    assert BORN[0] not in texts(plain)
    reader = Reader()
    [hits] = iterative(passages=4).search(collection(reader), [BLUE], 3)
    assert BORN[0] in texts(hits)
    # the first prompt holds the first hop and not the second, the second both, and then it is done
    assert [(DESIGNED[0] in shown, BORN[0] in shown) for [shown] in reader.batches] == [
        (True, False),
        (True, True),
    ]


def test_questions_are_batched_at_each_step_and_do_not_mix():
    reader = Reader()
    together = iterative(passages=4).search(collection(reader), [BLUE, RED], 4)
    assert [len(batch) for batch in reader.batches] == [2, 2]
    for question, hits, answer in zip((BLUE, RED), together, BORN, strict=True):
        assert iterative(passages=4).search(collection(Reader()), [question], 4) == [hits]
        assert answer in texts(hits)


def test_a_finished_question_is_not_asked_again():
    reader = Reader(lambda prompt: "DONE" if "blue lantern born" in prompt else designer_first(prompt))
    iterative(passages=4).search(collection(reader), [BLUE, RED], 3)
    assert [len(batch) for batch in reader.batches] == [2, 1]


def test_a_question_that_is_answered_at_once_keeps_the_retrievers_scores():
    plain = Dense().search(collection(Reader()), [BLUE], 5)
    assert (
        iterative().search(collection(Reader(lambda _: "The passages answer it: DONE.")), [BLUE], 5) == plain
    )


@pytest.mark.parametrize(
    "written", ["", "\n", "...", "<think>", BLUE.upper() + "?", f"Q: {BLUE}", DESIGNED[0], "Question:"]
)
def test_it_ends_where_the_model_asks_nothing_new(written):
    reader = Reader(lambda _: written)
    assert iterative().search(collection(reader), [BLUE], 5) == Dense().search(collection(reader), [BLUE], 5)
    assert len(reader.batches) == 1


def test_a_repeated_follow_up_ends_it():
    reader = Reader(lambda _: "who is otto")
    iterative(max_steps=9).search(collection(reader), [BLUE], 3)
    assert len(reader.batches) == 2


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_step_budget_ends_it(steps):
    numbers = iter("abcdefgh")
    reader = Reader(lambda _: f"who is {next(numbers)} mira")
    searched = []

    @dataclass(frozen=True)
    class Noted:
        depends_on = ("embedder",)

        def search(self, collection, questions, k):
            searched.extend(questions)
            return Dense().search(collection, questions, k)

    [hits] = iterative(retriever=Noted(), max_steps=steps).search(collection(reader), [BLUE], 3)
    assert searched == [BLUE, "who is a mira", "who is b mira", "who is c mira"][:steps]
    assert len(reader.batches) == steps - 1
    assert len(hits) == 3


def test_done_inside_a_question_goes_on():
    first = iter(["when was it done", "DONE"])
    reader = Reader(lambda _: next(first))
    iterative().search(collection(reader), [BLUE], 3)
    assert len(reader.batches) == 2


def test_the_best_passages_are_shown_within_the_budget():
    reader = Reader(lambda _: "DONE")
    [best] = Dense().search(collection(reader), [BLUE], 3)
    iterative(passages=2, passage="[{n}] {text}", separator=" | ").search(collection(reader), [BLUE], 3)
    assert reader.batches == [[f"[1] {texts(best)[0]} | [2] {texts(best)[1]}\n\nQ: {BLUE}"]]
    iterative(max_context_tokens=4).search(collection(reader), [BLUE], 3)
    assert reader.batches[1] == [" ".join(texts(best)[0].split()[:4]) + f"\n\nQ: {BLUE}"]


def test_after_a_follow_up_the_best_of_both_searches_are_shown():
    reader = Reader()
    iterative(passages=4, max_steps=4).search(collection(reader), [BLUE], 3)
    assert BORN[0] in reader.batches[1][0]


def test_hits_are_ranked_once_each_and_cut_at_k():
    [hits] = iterative(passages=4).search(collection(Reader()), [BLUE], 100)
    assert sorted(texts(hits)) == sorted(TEXTS)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    [few] = iterative(passages=4).search(collection(Reader()), [BLUE], 2)
    assert few == hits[:2]


def test_the_searches_are_fused_as_the_fusion_says():
    searches = Dense().search(collection(Reader()), [BLUE, "mira was born in"], 7)
    fusion = Convex("theoretical_min_max")
    arms = [[(TEXTS.index(hit.chunk.text), hit.score) for hit in hits] for hits in searches]
    [wanted] = fusion.fuse_batch([arms], (-1.0, -1.0))  # which no cosine is below
    [hits] = iterative(fusion=fusion, passages=4, max_steps=2).search(collection(Reader()), [BLUE], 7)
    assert [(TEXTS.index(hit.chunk.text), hit.score) for hit in hits] == wanted


def test_a_prompt_beyond_the_models_context_ends_it():
    reader = Reader(context_length=80)
    plain = Dense().search(collection(reader), [BLUE], 3)
    assert iterative(max_new_tokens=70).search(collection(reader), [BLUE], 3) == plain
    assert reader.batches == []


def test_no_questions():
    assert iterative().search(collection(Reader()), [], 3) == []


def test_results_are_cached(tmp_path):
    first = Reader()
    found = cached_search(collection(first, Memo(tmp_path)), iterative(), [BLUE, RED], 4)
    again = Reader()
    assert cached_search(collection(again, Memo(tmp_path)), iterative(), [BLUE, RED], 4) == found
    assert first.batches
    assert not again.batches


def many(count: int) -> list[str]:
    """Questions that each get a follow-up of their own."""
    return [f"{BLUE} {i}" for i in range(count)]


@dataclass
class Mortal(Reader):
    """A reader that dies after so many batches."""

    batches_left: int = 99

    def generate(self, requests) -> list[str]:
        if not self.batches_left:
            raise KeyboardInterrupt
        self.batches_left -= 1
        return super().generate(requests)


def test_what_was_written_before_a_kill_is_not_written_again(tmp_path):
    questions, method = many(40), iterative(passages=4)
    wanted = cached_search(collection(Reader()), method, questions, 4)
    whole = Reader()
    cached_search(collection(whole, Memo(tmp_path / "whole")), method, questions, 4)
    assert [len(batch) for batch in whole.batches] == [16, 16, 8] * 2

    killed, resumed = Mortal(batches_left=4), Reader()
    with pytest.raises(KeyboardInterrupt):
        cached_search(collection(killed, Memo(tmp_path / "killed")), method, questions, 4)
    assert cached_search(collection(resumed, Memo(tmp_path / "killed")), method, questions, 4) == wanted
    assert [*killed.batches, *resumed.batches] == whole.batches


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"depth": 50}, False),  # another method, the same prompts
        ({"max_new_tokens": 9}, True),
        ({"stop": ["?"]}, True),
        ({"temperature": 0.5}, True),
        ({"top_p": 0.5}, True),
        ({"repetition_penalty": 1.5}, True),
        ({"seed": 1}, True),
        ({"system": "be brief"}, True),
        ({"user": "{context}\n\nQuestion: {question}"}, True),
    ],
)
def test_other_options_of_the_follow_up_write_it_again(tmp_path, options, again):
    cached_search(collection(Reader(), Memo(tmp_path)), iterative(max_steps=2), [BLUE], 4)
    reader = Reader()
    cached_search(collection(reader, Memo(tmp_path)), iterative(max_steps=2, **options), [BLUE], 4)
    assert bool(reader.batches) == again


def test_it_depends_on_its_retrievers_models_and_on_the_reader():
    assert isinstance(iterative(), Retriever)
    assert iterative().depends_on == ("embedder", "generator")
    assert iterative() == iterative(temperature=0)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"user": "{question}"}, r"\{context\}"),
        ({"user": "{context}"}, r"\{question\}"),
        ({"passage": "{n}"}, r"\{text\}"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"passages": 0}, "passages=0"),
        ({"depth": 0}, "depth=0"),
        ({"max_context_tokens": 0}, "max_context_tokens=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"finished": ""}, "finished="),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 99999999999999999999}, "seed=99999999999999999999"),
    ],
)
def test_bad_options_are_named(options, wanted):
    with pytest.raises(UserError, match=wanted):
        iterative(**options)
