"""Make questions with answers from the user's own files, to train and evaluate on them.

    model      a language model asks for an answer that rules find in a passage (a number, a date, a name ...)
    recurring  the sentence of a span that another passage has too, with a blank for the span, asked about the other
               passage (Ram et al. 2021, arXiv:2101.00438, and 2022, arXiv:2112.07708)
    cloze      the same with any span that rules find, asked about the passage of the sentence itself

Kept are the questions that lead back: the retriever finds the passage among the first k, and of those that a model
wrote, the model gives the answer back from the passage (Alberti et al. 2019, arXiv:1906.05416).
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import MinLen

from rag.embed import Embedder
from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.assemble import Judgement, assemble
from rag.evaluate.datasets.questions import Question
from rag.evaluate.metrics.answers import contains, f1, normalized
from rag.evaluate.result_files import json_lines
from rag.evaluate.retrieval import build_collection, chunk_all
from rag.generate import Generator, Request
from rag.ingest.chunk.sentence import SentenceChunker
from rag.ingest.load.folder import load_folder
from rag.retrieve.cached import cached_search
from rag.retrieve.collection import Collection
from rag.retrieve.search import Dense
from rag.retrieve.transform.parse import lines, normal
from rag.runtime.cache.folder import cache_root
from rag.runtime.cache.keys import content_key
from rag.runtime.cache.memo import Memo
from rag.runtime.files import atomic_file
from rag.runtime.options import Count, Filled, Seed, Share, check_fields, checked
from rag.train.examples import has_answer
from rag.train.spans import BLANK, answer_spans, cloze_questions, recurring_spans
from rag.types import Document, Hit, Message, UserError

Kind = Literal["model", "recurring", "cloze"]
Wanted = Literal["question", "answer"]

# What a model is shown before it asks or answers: small models follow examples better than instructions.
_EXAMPLES = (
    {
        "text": "The harbour of Lindmoor was dug in 1742 by order of the merchant Edda Falk. Within ten years forty "
        "ships a month unloaded timber and salt there.",
        "question": "Who had the harbour of Lindmoor dug?",
        "answer": "Edda Falk",
    },
    {
        "text": "Bumblebees warm their flight muscles by shivering. A queen can fly when the air is only 2 degrees "
        "Celsius, long before honeybees leave the hive.",
        "question": "At what air temperature can a queen bumblebee fly?",
        "answer": "2 degrees Celsius",
    },
    {
        "text": "A loom holds the warp threads tight while the weft is passed between them. The shuttle carries the "
        "weft from one side to the other.",
        "question": "What carries the weft across the loom?",
        "answer": "The shuttle",
    },
    {
        "text": "The bridge at Orrin was finished in 1911. It is 214 metres long and was paid for by the railway.",
        "question": "When was the bridge at Orrin finished?",
        "answer": "1911",
    },
)
_TASKS: dict[Wanted, str] = {
    "question": "Text: {text}\nAnswer: {answer}\nWrite the question that has this answer.",
    "answer": "Text: {text}\nQuestion: {question}\nAnswer in a few words, copied from the text.",
}
_NEW_TOKENS = 32  # of a question or an answer


@dataclass(frozen=True)
class SyntheticOptions:
    """How questions are made."""

    kinds: Annotated[Sequence[Kind], MinLen(1)] = ("model", "recurring", "cloze")
    passage_tokens: Count = 200  # of the embedder: files are cut into passages of whole sentences
    passages: Count | None = None  # a number: questions are made of so many passages, drawn by seed
    per_passage: Count = 2  # answers that are tried in a passage, for each kind
    k: Count = 5  # the retriever must find the passage among so many
    min_f1: Share = (
        0.6  # of the model's answer to its own question, against the answer that it was to ask for
    )
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)


class SyntheticQuestion(NamedTuple):
    """A question with its answer, and the row of the passage that has the answer in it, word for word."""

    kind: Kind
    question: str
    answer: str
    row: int


Outcomes = dict[Kind, Counter[str]]  # "kept", or why questions were dropped -> how many


@checked
def load_synthetic(
    path: Filled | Path,
    embedder: Embedder,
    generator: Generator,
    questions: SyntheticOptions = SyntheticOptions(),
    output: Filled | Path | None = None,
    limit: Count | None = None,
    seed: Seed = 0,
) -> Dataset:
    """Make questions from a folder of files; what a killed run has computed is not computed again.

    The documents of the set are the passages, each relevant to its own questions. `problems` counts what was dropped.

    Args:
        path: The folder, or one file.
        embedder: Finds the passages, and counts their tokens.
        generator: Writes questions and answers; not loaded unless `questions.kinds` has "model".
        questions: How they are made.
        output: A JSON lines file to write, which rag.evaluate.datasets.jsonl reads; None writes none.
        limit: How many of the questions to draw; None takes all.
        seed: Of the draw.

    Raises:
        UserError: where no file can be read, and where no question is kept.
    """
    loaded = {d.id: d for d in load_folder(Path(path).expanduser()) if isinstance(d, Document)}
    name = Path(path).expanduser().resolve().name
    files = Dataset(name, tuple(loaded.values()), {}, {}, {}, {}, frozenset(), False, ())
    memo = Memo(cache_root() / "stages")
    chunks = chunk_all(files, SentenceChunker(questions.passage_tokens), embedder, memo) or []
    collection = build_collection(files, chunks, embedder, lambda: generator, memo)
    kept, outcomes = make_questions(collection, questions)
    if not kept:
        raise UserError(f"No question could be made of {path}: {_described(outcomes)}.")
    passages = [Document(c.id, c.path, c.text, loaded[c.document_id].title) for c in chunks]
    rows = [_json_row(question, passages[question.row]) for question in kept]
    if output is not None:
        with atomic_file(Path(output).expanduser(), "w") as file:
            file.write(json_lines(rows))
    judged = zip(rows, kept, strict=True)
    dataset = assemble(
        name,
        passages,
        [Question(row["id"], row["question"], tuple(row["answers"])) for row in rows],
        [Judgement(row["id"], row["id"], passages[question.row].id, 1) for row, question in judged],
        str(path),
        problems=[f"Questions were made of {path}: {_described(outcomes)}."],
    )
    return dataset.sample(limit, seed)


def _json_row(question: SyntheticQuestion, passage: Document) -> dict[str, Any]:
    key = content_key(question.question, question.answer, passage.text)
    return {
        "id": f"{question.kind}-{key[:16]}",
        "question": question.question,
        "context": passage.text,
        "answers": [question.answer],
        "source": f"synthetic ({question.kind}), {passage.path}",
    }


def _described(outcomes: Outcomes) -> str:
    """Return the outcomes as a part of a sentence: "model 5 of 20 kept (15 the passage is not found)"."""
    parts = []
    for kind, counts in outcomes.items():
        dropped = ", ".join(f"{count} {why}" for why, count in sorted(counts.items()) if why != "kept")
        parts.append(f"{kind} {counts['kept']} of {counts.total()} kept{f' ({dropped})' if dropped else ''}")
    return "; ".join(parts)


def make_questions(
    collection: Collection, options: SyntheticOptions
) -> tuple[list[SyntheticQuestion], Outcomes]:
    """Return the questions that lead back to their passages, and for each kind how many were kept and dropped.

    Args:
        collection: The passages; its generator writes and answers questions.
        options: How questions are made.
    """
    texts = [chunk.text for chunk in collection.chunks()]
    kept: dict[str, SyntheticQuestion] = {}  # by their words
    outcomes: Outcomes = {}
    for kind in options.kinds:
        counts = outcomes[kind] = Counter()
        drafts = _drafts(kind, texts, options)
        if kind == "model":
            items = [{"text": d.question.replace(BLANK, d.answer), "answer": d.answer} for d in drafts]
            asked = [_question(line) for line in _complete(collection, "question", items)]
            drafts = [d._replace(question=question) for d, question in zip(drafts, asked, strict=True)]
            drafts = _select(drafts, map(_is_question, drafts), "no question was written", counts)
        hits = cached_search(collection, Dense(), [draft.question for draft in drafts], options.k)
        found = [_row_found(draft, some) for draft, some in zip(drafts, hits, strict=True)]
        drafts = [d._replace(row=row) for d, row in zip(drafts, found, strict=True)]
        drafts = _select(drafts, [row >= 0 for row in found], "the passage is not found", counts)
        if kind == "model":
            items = [{"text": texts[d.row], "question": d.question} for d in drafts]
            answers = _complete(collection, "answer", items)
            right = [_f1(answer, d) >= options.min_f1 for d, answer in zip(drafts, answers, strict=True)]
            drafts = _select(drafts, right, "the model gives another answer", counts)
        before = len(kept)
        for draft in drafts:
            kept.setdefault(normal(draft.question), draft)
        counts["kept"] = len(kept) - before
        counts["the same question is kept already"] = len(drafts) - counts["kept"]
        outcomes[kind] = +counts
    return list(kept.values()), outcomes


def _select(
    drafts: Sequence[SyntheticQuestion], good: Iterable[bool], why_not: str, counts: Counter[str]
) -> list[SyntheticQuestion]:
    """Return the drafts that are good, and count the others."""
    selected = list(compress(drafts, good))
    counts[why_not] = len(drafts) - len(selected)
    return selected


def _drafts(kind: Kind, texts: Sequence[str], options: SyntheticOptions) -> list[SyntheticQuestion]:
    """Return the answers that are tried, each with the cloze of its sentence and the row of its passage."""
    spans = recurring_spans(texts) if kind == "recurring" else [answer_spans(text) for text in texts]
    count = min(options.passages or len(texts), len(texts))
    drafts = []
    for row in sorted(random.Random(options.seed).sample(range(len(texts)), count)):
        clozes = list(cloze_questions(texts[row], spans[row]))
        rng = random.Random(f"{options.seed} {kind} {texts[row]}")
        drawn = sorted(rng.sample(range(len(clozes)), min(options.per_passage, len(clozes))))
        drafts += [SyntheticQuestion(kind, *clozes[i], row) for i in drawn]
    return drafts


def _question(text: str) -> str:
    """Return the first line that a model wrote, without a label; empty where it wrote nothing."""
    return next(iter(lines(text)), "")


def _is_question(draft: SyntheticQuestion) -> bool:
    return draft.question.endswith("?") and not has_answer(draft.question, [draft.answer])


def _f1(answer: str, draft: SyntheticQuestion) -> float:
    """Return the token F1 of an answer, without the words of the question: small models answer in whole sentences."""
    asked = normalized(draft.question).split()
    own, gold = (
        " ".join(word for word in normalized(text).split() if word not in asked)
        for text in (answer, draft.answer)
    )
    return f1(own, gold) if gold else 0.0


def _row_found(draft: SyntheticQuestion, hits: Sequence[Hit]) -> int:
    """Return the row of the first passage that may be asked about, -1 where none was found."""
    if draft.kind == "recurring":
        return next(
            (hit.row for hit in hits if hit.row != draft.row and _has_span(hit.chunk.text, draft.answer)), -1
        )
    return next((hit.row for hit in hits if hit.row == draft.row), -1)


def _has_span(text: str, span: str) -> bool:
    """Return whether a text has these words in it, not only as parts of others."""
    return has_answer(text, [span]) and contains(text, span) == 1


@dataclass(frozen=True)
class _Completion:
    """What the lines that a model writes depend on, for their cache key."""

    wanted: Wanted

    depends_on: ClassVar[tuple[str, ...]] = ("generator",)


def _complete(collection: Collection, wanted: Wanted, items: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the question or the answer that the model writes to each text with an answer or a question."""

    def compute(items: Sequence[Mapping[str, str]]) -> list[str]:
        return collection.generator.generate(
            [Request(_messages(wanted, item), max_new_tokens=_NEW_TOKENS, stop=("\n",)) for item in items]
        )

    return collection.cached_map("synthetic", _Completion(wanted), items, compute, passages=False)


def _messages(wanted: Wanted, item: Mapping[str, str]) -> list[Message]:
    task = _TASKS[wanted]
    shown = [
        message
        for example in _EXAMPLES
        for message in (Message("user", task.format(**example)), Message("assistant", example[wanted]))
    ]
    return [*shown, Message("user", task.format(**item))]
