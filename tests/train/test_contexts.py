"""Contexts ask every question once with its passage, and prompts are those of inference, token for token."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.context import ContextOptions, build_context
from rag.generate.local import LocalGenerator
from rag.prompt import render, render_passage
from rag.train.contexts import (
    AskedContext,
    ContextMix,
    ReaderExample,
    TargetStyle,
    answer_text,
    choose_styles,
    draw_contexts,
    sequence_groups,
)
from rag.types import Document, Hit, chunk_at
from tests.tiny_models import write_decoder
from tests.train.readers import PASSAGES, STYLES, TEMPLATE, examples


@st.composite
def asked_sets(draw) -> list[ReaderExample]:
    """Return questions with answers "a0", "a1" ...; passage p holds the answers of its questions."""
    count, passages = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    found = []
    for i in range(count):
        gold = draw(st.integers(0, passages - 1))
        others = draw(st.permutations([p for p in range(passages) if p != gold]))
        found.append(ReaderExample(f"q{i}", f"question {i}?", (f"a{i};",), gold, tuple(others)))
    return found


def texts_of(some: list[ReaderExample]) -> list[str]:
    holds = {}
    for example in some:
        holds.setdefault(example.gold, []).append(example.answers[0])
    return [" ".join(["passage", str(p), *holds.get(p, [])]) for p in range(7)]


@settings(deadline=None)
@given(asked_sets(), st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 5))
def test_every_question_is_asked_once_with_its_passage(some, seed, unanswerable, most):
    texts = texts_of(some)
    mix = ContextMix(tuple([1.0] * most), hard=3, unanswerable=unanswerable)
    contexts = list(draw_contexts(some, texts, mix, random.Random(seed)))
    answerable = Counter(e.id for c in contexts for e in c.asked if e.gold in c.passages)
    assert answerable == Counter(e.id for e in some)
    for context in contexts:
        assert 1 <= len(context.passages) <= most and len({*context.passages}) == len(context.passages)
        without = [e for e in context.asked if e.gold not in context.passages]
        assert unanswerable or not without
        for example in without:
            assert not any(example.answers[0] in texts[p] for p in context.passages)
    again = list(draw_contexts(some, texts, mix, random.Random(seed)))
    assert again == contexts


@settings(deadline=None, max_examples=30)
@given(asked_sets(), st.integers(0, 9), st.integers(60, 400))
def test_groups_hold_the_prompts_and_answers(tokenizer, some, seed, longest):
    """Whatever the limit, each sequence is a whole prompt with its answer, and no group is longer than the limit."""
    texts = texts_of(some)
    style = TargetStyle(TEMPLATE, 1.0, "span")
    found: Counter[str] = Counter()
    for context in draw_contexts(some, texts, ContextMix((1.0, 1.0, 1.0)), random.Random(seed)):
        for group in sequence_groups(context, texts, style, tokenizer, longest):
            assert group.tokens <= longest
            for continuation in group.continuations:
                tokens = (*group.prefix, *continuation.tokens)
                start = len(group.prefix) + continuation.answer_start
                answer = tokenizer.decode(tokens[start:-1])
                assert tokens[-1] in tokenizer.eos_ids
                [example] = [e for e in some if f"\n{e.question}\n" in tokenizer.decode(tokens[:start])]
                shown = any(texts[example.gold] == line for line in _lines(tokenizer.decode(tokens[:start])))
                assert answer == (example.answers[0] if shown else TEMPLATE.abstain_answer)
                found[example.id] += shown
    short = [e for e in some if _alone(e, texts, style, tokenizer) <= longest]
    assert all(found[e.id] == 1 for e in short)


def _lines(prompt: str) -> list[str]:
    return [line.partition("] ")[2] or line for line in prompt.splitlines()]


def _alone(example: ReaderExample, texts: list[str], style: TargetStyle, tokenizer) -> int:
    [group] = sequence_groups(AskedContext((example.gold,), (example,)), texts, style, tokenizer, 10_000)
    return group.tokens


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return LocalGenerator(str(write_decoder(tmp_path_factory.mktemp("decoder") / "model")), "float32", None)


@pytest.fixture(scope="module")
def tokenizer(generator):
    return generator.tokenizer


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_prompts_are_those_of_inference_token_for_token(generator, style):
    """The passages arrive as hits of a search, become a context, a message, and tokens, as in rag.pipeline."""
    documents = [Document(str(i), f"{i}.md", text) for i, text in enumerate(PASSAGES)]
    asked = examples()[:3]
    order = [asked[0].gold, 5, asked[2].gold, asked[1].gold]
    hits = [Hit(chunk_at(documents[p], 0, len(PASSAGES[p])), 1.0 - n / 10, p) for n, p in enumerate(order)]
    context = build_context(
        hits,
        lambda name: documents[int(name)].text,
        ContextOptions(order="score"),
        generator.count,
        lambda source: render_passage(style.template, source) + style.template.separator,
    )
    [group] = sequence_groups(
        AskedContext(tuple(order), tuple(asked)), PASSAGES, style, generator.tokenizer, 10_000
    )
    for example, continuation in zip(asked, group.continuations, strict=True):
        prompt = generator.prefiller.prompt(render(style.template, example.question, context))
        assert (*group.prefix, *continuation.tokens[: continuation.answer_start]) == tuple(prompt)
    assert all(text in generator.tokenizer.decode(group.prefix) for text in (PASSAGES[p] for p in order))


@pytest.mark.parametrize("form", ["span", "sentence", "cited"])
def test_answers_have_the_form_of_the_style(form):
    text = "It is old. The bridge of Lom was built in 1742 by Edda. It stands."
    example = ReaderExample("q", "When?", ("1742",), 0, ())
    expected = {
        "span": "1742",
        "sentence": "The bridge of Lom was built in 1742 by Edda.",
        "cited": "The bridge of Lom was built in 1742 by Edda [3].",
    }
    assert answer_text(example, text, form, 3) == expected[form]
    free = example._replace(answers=("before the war",))
    expected = {"span": "before the war", "sentence": "Before the war", "cited": "Before the war [3]"}
    assert answer_text(free, text, form, 3) == expected[form]


def test_spans_are_only_wanted_of_verbatim_answers():
    verbatim = ReaderExample("a", "?", ("Lom",), 0, ())
    free = ReaderExample("b", "?", ("a town",), 0, ())
    texts, context = ["King Lom"], AskedContext((0,), (verbatim, free))
    parts = list(choose_styles(context, texts, [STYLES["short"], STYLES["cited"]], random.Random(1)))
    asked = {(style.form, example.id) for style, part in parts for example in part.asked}
    assert ("span", "b") not in asked and {name for _, name in asked} == {"a", "b"}
    [(style, part)] = choose_styles(context, texts, [STYLES["short"]], random.Random(1))
    assert style.form == "span" and part == context
