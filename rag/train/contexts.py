"""Contexts that train a reader: passages in a random order, questions on them, and the answers that should follow.

They are made as RAFT makes them (Zhang et al. 2024, arXiv:2403.10131): the gold passage among distractors that the
retriever ranks highest, at a random place; and for a share of the questions without it, where the answer is the
template's abstaining sentence. Questions on the same passages share a prompt, whose beginning is then run once: the
distractors of one question are the gold passages of others.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import MinLen

from rag.ingest.sentences import sentences
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.prompt import PromptTemplate, render
from rag.runtime.options import Count, Share, Weight, check_fields
from rag.train.packing import Continuation, SequenceGroup
from rag.types import Context, Source


class ReaderExample(NamedTuple):
    """A question with its answers, its gold passage, and retrieved passages that hold none of the answers."""

    id: str
    question: str
    answers: tuple[str, ...]
    gold: int  # index of the passage
    distractors: tuple[int, ...]  # indices of passages, best first


@dataclass(frozen=True)
class ContextMix:
    """How contexts are drawn."""

    passages: Annotated[Sequence[Weight], MinLen(1)] = (2.0, 1.0, 4.0, 1.0, 1.0)  # of 1, 2, 3 ... passages
    hard: Count = 4  # distractors of a question are drawn from so many, the best-ranked
    unanswerable: Share = 0.12  # questions whose gold passage is not shown, in relation to the others

    def __post_init__(self) -> None:
        check_fields(self)


AnswerForm = Literal["span", "sentence", "cited"]


@dataclass(frozen=True)
class TargetStyle:
    """A template, its weight among the styles, and the form of the answers to it.

    span: the answer itself; sentence: the sentence of the gold passage that holds it; cited: this sentence with the
    number of its passage.
    """

    template: PromptTemplate
    weight: Weight
    form: AnswerForm


class AskedContext(NamedTuple):
    """Passages in the order of the prompt, and examples to ask on them."""

    passages: tuple[int, ...]
    asked: tuple[ReaderExample, ...]


def draw_contexts(
    examples: Sequence[ReaderExample], texts: Sequence[str], mix: ContextMix, rng: random.Random
) -> Iterator[AskedContext]:
    """Yield contexts in which every example is asked once with its gold passage, and some also without it.

    Distractors whose own questions are still to be asked go first, so that few passages are shown twice.
    """
    by_gold = _grouped((example.gold, example) for example in examples)
    misled = _grouped((p, example) for example in examples for p in example.distractors[: mix.hard])
    waiting = list(by_gold)
    rng.shuffle(waiting)
    done: set[int] = set()
    for first in waiting:
        if first in done:
            continue
        count = rng.choices(range(1, len(mix.passages) + 1), mix.passages)[0]
        hard = {p: None for example in by_gold[first] for p in example.distractors[: mix.hard] if p != first}
        others = sorted(hard, key=lambda p: (p in done or p not in by_gold, rng.random()))
        passages = [first, *others[: count - 1]]
        asked = [example for p in passages if p not in done for example in by_gold.get(p, ())]
        done.update(passages)
        outside = {e.id: e for p in passages for e in misled.get(p, ()) if not _answered(e, passages, texts)}
        wanted = sum(rng.random() < mix.unanswerable for _ in asked)
        asked += rng.sample(list(outside.values()), min(wanted, len(outside)))
        rng.shuffle(passages)
        rng.shuffle(asked)
        yield AskedContext(tuple(passages), tuple(asked))


def _grouped(pairs: Iterable[tuple[int, ReaderExample]]) -> dict[int, list[ReaderExample]]:
    groups: dict[int, list[ReaderExample]] = {}
    for passage, example in pairs:
        groups.setdefault(passage, []).append(example)
    return groups


def _answered(example: ReaderExample, passages: Sequence[int], texts: Sequence[str]) -> bool:
    """Return whether a passage is the gold passage or holds an answer."""
    shown = [texts[p].casefold() for p in passages]
    return example.gold in passages or any(a.casefold() in text for a in example.answers for text in shown)


def choose_styles(
    context: AskedContext, texts: Sequence[str], styles: Sequence[TargetStyle], rng: random.Random
) -> Iterator[tuple[TargetStyle, AskedContext]]:
    """Yield the context with a style drawn by weight.

    Where this wants spans, questions whose answer is not verbatim in the gold passage are asked in another style.
    """
    [style] = rng.choices(styles, [style.weight for style in styles])
    others = [other for other in styles if other.form != "span"]
    free = [e for e in context.asked if e.gold in context.passages and e.answers[0] not in texts[e.gold]]
    if style.form != "span" or not free or not others:
        yield style, context
        return
    verbatim = tuple(example for example in context.asked if example not in free)
    if verbatim:
        yield style, context._replace(asked=verbatim)
    [other] = rng.choices(others, [other.weight for other in others])
    yield other, context._replace(asked=tuple(free))


def sequence_groups(
    context: AskedContext,
    texts: Sequence[str],
    style: TargetStyle,
    tokenizer: Tokenizer,
    longest: int,
) -> list[SequenceGroup]:
    """Return the prompts of a context with their answers, in groups of at most `longest` tokens.

    Where the passages are too long for `longest` they are split into two contexts, each with its own questions; a
    question that is too long with a single passage is left out.
    """
    shown = context_of(context.passages, texts)
    sequences = [_sequence(shown, e, context.passages, texts, style, tokenizer) for e in context.asked]
    fitting = [(prompt, answer) for prompt, answer in sequences if len(prompt) + len(answer) <= longest]
    if len(fitting) == len(sequences) or len(context.passages) == 1:
        return list(_group(fitting, longest))
    half = len(context.passages) // 2
    groups = []
    for passages in (context.passages[:half], context.passages[half:]):
        others = {*context.passages} - {*passages}
        asked = tuple(example for example in context.asked if example.gold not in others)
        groups += sequence_groups(AskedContext(passages, asked), texts, style, tokenizer, longest)
    return groups


def context_of(passages: Sequence[int], texts: Sequence[str]) -> Context:
    """Return the passages as a template renders them."""
    shown = (texts[p] for p in passages)
    return Context(tuple(Source(n, "", 0, len(text), 0.0, text) for n, text in enumerate(shown, 1)), 0)


_Sequence = tuple[list[int], list[int]]  # prompt and answer


def _sequence(
    context: Context,
    example: ReaderExample,
    passages: Sequence[int],
    texts: Sequence[str],
    style: TargetStyle,
    tokenizer: Tokenizer,
) -> _Sequence:
    prompt = tokenizer.chat(render(style.template, example.question, context))
    if example.gold in passages:
        answer = answer_text(example, texts[example.gold], style.form, passages.index(example.gold) + 1)
    else:
        answer = style.template.abstain_answer
    return list(prompt), [*tokenizer.encode(answer, special=False), min(tokenizer.eos_ids)]


def _group(sequences: Sequence[_Sequence], longest: int) -> Iterator[SequenceGroup]:
    """Yield groups of the sequences; the beginning that they share is found token by token."""
    start = 0
    while start < len(sequences):
        count, shared = 1, len(sequences[start][0]) - 1
        total = len(sequences[start][0]) + len(sequences[start][1])
        while start + count < len(sequences):
            prompt, answer = sequences[start + count]
            common = _common(sequences[start][0], prompt, shared)
            size = total + count * (shared - common) + len(prompt) - common + len(answer)
            if size > longest:
                break
            count, shared, total = count + 1, common, size
        some = sequences[start : start + count]
        continuations = tuple(Continuation((*p[shared:], *a), len(p) - shared) for p, a in some)
        yield SequenceGroup(tuple(some[0][0][:shared]), continuations)
        start += count


def _common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    limit = min(most, len(b) - 1)
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def answer_text(example: ReaderExample, gold: str, form: AnswerForm, n: int) -> str:
    """Return the answer in this form; `n` is the number of the gold passage in the prompt."""
    answer = example.answers[0]
    if form == "span":
        return answer
    at = gold.find(answer)
    spans = [(a, b) for a, b in sentences(gold) if a <= at and at + len(answer) <= b] if at >= 0 else []
    sentence = " ".join(gold[slice(*spans[0])].split()) if spans else answer[:1].upper() + answer[1:]
    if form == "sentence":
        return sentence
    return f"{sentence[:-1]} [{n}]{sentence[-1]}" if sentence[-1] in ".!?" else f"{sentence} [{n}]"
