"""Query transforms with a scripted model: what small models write, parsed; fallbacks; prompts, seeds and limits."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from rag.embed.bag_of_words import BagOfWords
from rag.generate import Request
from rag.ops.sampling import Sampling
from rag.retrieve.collection import Collection
from rag.retrieve.transform import Transform
from rag.retrieve.transform.decompose import Decompose
from rag.retrieve.transform.hyde import HyDE
from rag.retrieve.transform.multi_query import MultiQuery
from rag.retrieve.transform.parse import distinct, lines, passage, without_echoes
from rag.retrieve.transform.rewrite import Rewrite
from rag.types import Message, UserError
from tests.tiny_collections import collection_of
from tests.tiny_models import GenerateOnly

Q = "Who built the tower of the old castle?"
REWRITE = Rewrite(user="Rewrite as a search query: {question}")
MULTI = MultiQuery(user="Ask it in other ways: {question}")
HYDE = HyDE(user="Question: {question}\nPassage:")
DECOMPOSE = Decompose(user="Split into simpler questions.\nQuestion: {question}")


@dataclass
class Scripted(GenerateOnly):
    """A generator that writes what `answers` holds for the question in the prompt; records what it was asked."""

    answers: dict[str, str | list[str]]
    context_length: int = 1000
    asked: list = field(default_factory=list)

    def generate(self, requests: Sequence[Request]) -> list[str]:
        self.asked.append(requests)
        texts = []
        for request in requests:
            [question] = [q for q in self.answers if q in request.messages[-1].content]
            answer = self.answers[question]
            texts.append(answer if isinstance(answer, str) else answer[request.seed])
        return texts


def collection_with(generator: Scripted) -> Collection:
    return collection_of([], BagOfWords(), generator)


def expand(transform: Transform, written: str | list[str], question: str = Q) -> list[str]:
    [texts] = transform.expand(collection_with(Scripted({question: written})), [question])
    return texts


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("one query", ["one query"]),
        ("1. first\n2. second\n3. third", ["first", "second", "third"]),
        ("1) first\n2) second", ["first", "second"]),
        ("(1) first\n(2) second", ["first", "second"]),
        ("a) first\nb) second", ["first", "second"]),
        ("- first\n* second\n• third\n– fourth", ["first", "second", "third", "fourth"]),
        ("· first\n· second", ["first", "second"]),
        ("... first\n. second", ["... first", ". second"]),
        ("1.\nfirst\n2.\nsecond", ["first", "second"]),
        ("1. first 2. second 3. third", ["first", "second", "third"]),
        ("Sure! Here they are: 1. first 2. second", ["first", "second"]),
        ("Here are three queries:\n\n1. first\n\n2. second", ["first", "second"]),
        ('"who built it"', ["who built it"]),
        ("“who built it”", ["who built it"]),
        ("'who built it'", ["who built it"]),
        ("`who built it`", ["who built it"]),
        ('1. "first"\n2. "second"', ["first", "second"]),
        ("**Query 1:** first\n**Query 2:** second", ["first", "second"]),
        ("Query: first\nSearch query: second\nRewritten question: third", ["first", "second", "third"]),
        ("Q1: first\nQ: second\nSub-question 2: third", ["first", "second", "third"]),
        ("Subquestion 1: first\nFollow-up question: second", ["first", "second"]),
        ('1. Query: "first"', ["first"]),
        ('"1. first"', ["first"]),
        ('You can use the following search query: "tower of the castle"', ["tower of the castle"]),
        ('You can use this query: "tower of the', ["tower of the"]),
        ('["first", "second"]', ["first", "second"]),
        ('["first", "sec', ['["first", "sec']),
        ("[1] is a citation", ["[1] is a citation"]),
        ("<think>1. hmm\n2. well</think>\nfirst", ["first"]),
        ("<think>never ends\n1. hmm", []),
        ("", []),
        (" \n\t\n", []),
        ("...\n---\n1.\n***", []),
        ("Query:", []),
        ("😀", []),
        # what only looks like a mark, a label or quotes
        ("1984 author", ["1984 author"]),
        ("3.5 mm jack", ["3.5 mm jack"]),
        ("-5 degrees outside", ["-5 degrees outside"]),
        ("a castle", ["a castle"]),
        ("Is it 10. or 11. of May?", ["Is it 10. or 11. of May?"]),
        ("Queries per second", ["Queries per second"]),
        ("C++: how fast?", ["C++: how fast?"]),
        ("what does 'tower' mean", ["what does 'tower' mean"]),
        ("塔は誰が建てたか", ["塔は誰が建てたか"]),
        ("قلعة\nКто построил", ["قلعة", "Кто построил"]),
    ],
)
def test_lists_of_small_models(raw, wanted):
    assert lines(raw) == wanted


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("The tower was built in 1200.\n\nIt is old.", ["The tower was built in 1200. It is old."]),
        ("Passage: The tower is old.", ["The tower is old."]),
        ("Here is a passage:\n\nThe tower is old.", ["The tower is old."]),
        ('"The tower is old."', ["The tower is old."]),
        ("<think>hm</think>The tower  is\told.", ["The tower is old."]),
        ('Its motto reads: "for ever"', ['Its motto reads: "for ever"']),
        ("The builders were:\n1. Ann\n2. Bob", ["Ann 2. Bob"]),
        ("", []),
        ("\n\n--\n", []),
    ],
)
def test_passages_of_small_models(raw, wanted):
    assert passage(raw) == wanted


def test_lines_of_the_prompt_are_no_text():
    messages = [Message("system", "Be brief."), Message("user", f"Ask it otherwise.\nQuestion: {Q}")]
    raw = f'1. "Ask it otherwise"\nbe brief\nQuestion: {Q}\n- who raised the tower'
    assert without_echoes(raw, messages) == "- who raised the tower"


def test_what_differs_in_case_and_punctuation_is_the_same():
    assert distinct(["A b?", "a  B", "ab", "a b c"]) == ["A b?", "ab", "a b c"]


def test_rewrite_takes_the_first_text():
    assert expand(REWRITE, "castle tower builder\nThis query finds it.") == ["castle tower builder"]
    both = Rewrite(user=REWRITE.user, include_original=True)
    assert expand(both, "castle tower builder") == [Q, "castle tower builder"]
    assert expand(both, Q.upper()) == [Q]


def test_multi_query_has_the_question_and_count_others():
    written = f"1. a x\n2. {Q.lower()}\n3. b y\n4. A x!\n5. c z\n6. d"
    assert expand(MULTI, written) == [Q, "a x", "b y", "c z"]
    assert expand(MultiQuery(user=MULTI.user, count=1), written) == [Q, "a x"]
    assert expand(MultiQuery(user=MULTI.user, include_original=False), written) == ["a x", Q.lower(), "b y"]


def test_decompose_has_the_question_and_its_parts():
    written = "1. Which castle is old?\n2. Who built its tower?\n3. When?\n4. Why?"
    assert expand(DECOMPOSE, written) == [Q, "Which castle is old?", "Who built its tower?", "When?"]
    parts = Decompose(user=DECOMPOSE.user, max_parts=2, include_original=False)
    assert expand(parts, written) == ["Which castle is old?", "Who built its tower?"]


def test_hyde_writes_passages_with_seeds_of_their_own():
    generator = Scripted({Q: ["Ann\nbuilt it.", "Bob built it.", "ann built it"]})
    hyde = HyDE(user=HYDE.user, count=3, temperature=1, seed=0)
    assert hyde.expand(collection_with(generator), [Q]) == [["Ann built it.", "Bob built it."]]
    assert [request.seed for request in generator.asked[0]] == [0, 1, 2]
    assert expand(HYDE, "Ann built it.") == ["Ann built it."]
    assert expand(HyDE(user=HYDE.user, include_original=True), "Ann built it.") == [Q, "Ann built it."]


@pytest.mark.parametrize("transform", [REWRITE, MULTI, HYDE, DECOMPOSE])
@pytest.mark.parametrize("written", ["", "\n \n", "...", f"Question: {Q}", "Passage:", "<think>"])
def test_where_no_text_is_left_the_question_itself_is_searched(transform, written):
    assert expand(transform, written) == [Q]


def test_an_echo_of_the_whole_prompt_leaves_what_follows():
    echoed = f"Question: {Q}\nPassage:\nAnn built the tower."
    assert expand(HYDE, echoed) == ["Ann built the tower."]


def test_the_prompt_is_filled_literally_and_the_options_reach_the_model():
    question = "what is {question} in {braces}?"
    generator = Scripted({question: "placeholder syntax"})
    transform = Rewrite(
        user="Query for {question}",
        system="You search.",
        stop=["\n"],
        max_new_tokens=9,
        temperature=1,
        top_p=0.5,
        repetition_penalty=1.5,
        seed=4,
    )
    assert transform.expand(collection_with(generator), [question]) == [["placeholder syntax"]]
    messages = [Message("system", "You search."), Message("user", f"Query for {question}")]
    sampling = Sampling(temperature=1.0, top_p=0.5, repetition_penalty=1.5)
    assert generator.asked == [[Request(messages, sampling, 9, 4, ("\n",))]]


def test_a_batch_is_asked_at_once_with_the_same_seeds_for_all():
    generator = Scripted({"red": ["r0", "r1"], "blue": ["b0", "b1"]})
    hyde = HyDE(user="{question}", count=2, temperature=0.5)
    assert hyde.expand(collection_with(generator), ["red", "blue"]) == [["r0", "r1"], ["b0", "b1"]]
    assert len(generator.asked) == 1
    assert [request.seed for request in generator.asked[0]] == [0, 1, 0, 1]


def test_a_question_beyond_the_models_context_is_searched_as_it_is():
    generator = Scripted({"short": "brief"}, context_length=100)
    long = "word " * 200_000
    assert REWRITE.expand(collection_with(generator), [long, "short", long]) == [[long], ["brief"], [long]]
    assert REWRITE.expand(collection_with(generator), [long]) == [[long]]
    assert [len(requests) for requests in generator.asked] == [1]


def test_no_questions_and_an_empty_question():
    assert MULTI.expand(collection_with(Scripted({})), []) == []
    assert expand(MULTI, "", question="") == [""]


def test_seeds_beyond_the_last_begin_again():
    generator = Scripted({Q: "a passage"})
    last = 2**32 - 1
    HyDE(user="{question}", count=3, temperature=1, seed=last).expand(collection_with(generator), [Q])
    assert [request.seed for request in generator.asked[0]] == [last, 0, 1]


@pytest.mark.parametrize("transform", [REWRITE, MULTI, HYDE, DECOMPOSE])
def test_transforms_are_hashable_and_depend_on_the_model(transform):
    assert isinstance(transform, Transform)
    assert transform.depends_on == ("generator",)
    assert hash(transform) == hash(type(transform)(user=transform.user, temperature=0, stop=[]))


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: Rewrite(user="no placeholder"), r"\{question\}"),
        (lambda: Rewrite(user="{question} {count}"), "count"),
        (lambda: Rewrite(user="{question}", max_new_tokens=0), "max_new_tokens=0"),
        (lambda: Rewrite(user="{question}", temperature=-1), "temperature"),
        (lambda: Rewrite(user="{question}", seed=-1), "seed=-1"),
        (lambda: Rewrite(user="{question}", seed=2**32), "seed=4294967296"),
        (lambda: MultiQuery(user="{question}", count=0), "count=0"),
        (lambda: Decompose(user="{question}", max_parts=-2), "max_parts=-2"),
        (lambda: HyDE(user="{question}", count=0), "count=0"),
        (lambda: HyDE(user="{question}", count=2), "temperature"),
    ],
)
def test_bad_options_are_named(make, wanted):
    with pytest.raises(UserError, match=wanted):
        make()
