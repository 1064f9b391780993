"""Gold passages have the answer and distractors do not, whatever the dataset; a hold-out takes whole passages."""

from hypothesis import given
from hypothesis import strategies as st

from rag.embed.bag_of_words import BagOfWords
from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.questions import Evidence
from rag.evaluate.retrieval import build_collection, chunk_all
from rag.ingest.chunk.sentence import SentenceChunker
from rag.ingest.chunk.whole import WholeChunker
from rag.retrieve.search import Lexical
from rag.train.examples import (
    ExampleSet,
    concatenated,
    has_answer,
    hold_out,
    is_verbatim,
    make_examples,
)
from rag.types import Document
from tests.evaluate.tiny_experiment import FACTS, dataset

WORDS = ("seal", "whale", "krill", "fish", "ice", "gull", "12", "The")
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(lambda words: " ".join(words) + ".")


def examples_of(data: Dataset, chunker=WholeChunker(), **options) -> ExampleSet:
    embedder = BagOfWords()
    collection = build_collection(data, chunk_all(data, chunker, embedder), embedder)
    return make_examples(data, collection, Lexical(), **options)


def small(texts: list[str], answers: list[list[str]], **changes) -> Dataset:
    """Return a dataset with the question qi about the i-th text."""
    documents = tuple(Document(f"d{i}", f"d{i}", text) for i, text in enumerate(texts))
    names = [f"q{i}" for i in range(len(answers))]
    values = {
        "corpus": documents,
        "queries": {name: f"what of {texts[i]}" for i, name in enumerate(names)},
        "qrels": {name: {f"d{i}": 1} for i, name in enumerate(names)},
        "answers": {name: tuple(some) for name, some in zip(names, answers, strict=True) if some},
        "unjudged": {},
        "unanswerable": frozenset(),
    }
    return dataset(**values | changes)


def test_each_fact_is_a_gold_passage_and_the_others_are_distractors():
    found = examples_of(dataset())
    assert [e.id for e in found.examples] == [f"q{i}" for i in range(len(FACTS))]
    for i, example in enumerate(found.examples):
        assert example.gold == i and example.answers[0] in found.passages[i]
        assert sorted(example.distractors) == [row for row in range(len(FACTS)) if row != i]
    assert found.left_out == {"it is flagged as unanswerable": 1}


@given(
    st.lists(st.tuples(TEXTS, st.lists(TEXTS | st.sampled_from(WORDS), max_size=3)), min_size=1, max_size=6)
)
def test_a_gold_passage_has_the_answer_where_any_has_it_and_no_distractor_has_one(rows):
    data = small([text for text, _ in rows], [answers for _, answers in rows])
    found = examples_of(data)
    for example in found.examples:
        gold = found.passages[example.gold]
        assert set(example.answers) == set(data.answers[example.id])
        assert is_verbatim(example, found.passages) == has_answer(gold, example.answers)
        assert not any(has_answer(found.passages[row], example.answers) for row in example.distractors)
        assert gold not in [found.passages[row] for row in example.distractors]
    assert len(found.examples) + sum(found.left_out.values()) == len(data.queries)


@given(st.lists(TEXTS, min_size=2, max_size=5), st.sampled_from(WORDS))
def test_of_several_chunks_the_first_with_the_answer_is_the_gold_passage(parts, answer):
    data = small([" ".join(parts)], [[answer]])
    chunks = chunk_all(data, SentenceChunker(4), BagOfWords())
    holding = [row for row, chunk in enumerate(chunks) if has_answer(chunk.text, [answer])]
    found = examples_of(data, SentenceChunker(4))
    if holding:
        assert found.examples[0].gold == holding[0]
    else:
        assert bool(found.examples) == (len(chunks) == 1)


def test_the_chunk_of_the_evidence_goes_before_another_chunk_with_the_answer():
    text = "There are 12 seals. It is cold. The whale is 12 metres long."
    spans = {"q0": (Evidence("d0", text.index("12 metres"), text.index("12 metres") + 2),)}
    chunker = SentenceChunker(8)
    assert examples_of(small([text], [["12"]]), chunker).examples[0].gold == 0
    assert examples_of(small([text], [["12"]], evidence=spans), chunker).examples[0].gold > 0
    [example] = examples_of(small([text], [["twelve"]], evidence=spans), chunker).examples
    assert example.gold > 0
    left_out = examples_of(small([text], [["twelve"]]), chunker).left_out
    assert left_out == {"no passage has an answer or the evidence in it": 1}


def test_what_cannot_be_trained_on_is_counted():
    found = examples_of(small(["A seal.", "A gull."], [["seal"], []]))
    assert [e.id for e in found.examples] == ["q0"] and found.left_out == {"it has no gold answer": 1}


def test_the_answer_that_is_in_the_passage_comes_first():
    [example] = examples_of(small(["A seal eats fish."], [["some food", "Fish"]])).examples
    assert example.answers == ("Fish", "some food")


def test_sets_are_concatenated_with_their_passages_once():
    first, second = (
        examples_of(dataset()),
        examples_of(small(["the seal eats fish every day", "A gull."], [["fish"]])),
    )
    both = concatenated([first, second])
    assert both.passages == (*first.passages, "A gull.")
    assert [e.id for e in both.examples] == [*(e.id for e in first.examples), "2:q0"]
    assert both.examples[-1].gold == 0 and both.left_out == first.left_out
    for old, new in zip((*first.examples, *second.examples), both.examples, strict=True):
        own = first.passages if old in first.examples else second.passages
        assert [both.passages[row] for row in (new.gold, *new.distractors)] == [
            own[row] for row in (old.gold, *old.distractors)
        ]


# --- the hold-out

QUESTIONS = st.dictionaries(st.text(max_size=3), st.sampled_from(["a", "b", "c", "d", "e"]), max_size=20)


@given(QUESTIONS, st.integers(0, 12), st.randoms())
def test_a_hold_out_takes_whole_passages_in_any_order_of_the_file(passage_of, count, rng):
    held = hold_out(passage_of, count)
    assert len(held) <= count
    assert all(
        (id in held) == (other in held)
        for id in passage_of
        for other in passage_of
        if passage_of[id] == passage_of[other]
    )
    left = {text: list(passage_of.values()).count(text) for id, text in passage_of.items() if id not in held}
    assert all(len(held) + size > count for size in left.values())
    items = list(passage_of.items())
    rng.shuffle(items)
    assert hold_out(dict(items), count) == held
