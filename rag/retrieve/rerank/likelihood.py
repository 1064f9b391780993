"""Rerank by the likelihood of the question given the passage (UPR, Sachan et al. 2022, arXiv:2204.07496)."""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Literal

from rag.generate import LogLikelihood, scorer_of
from rag.retrieve.collection import Collection
from rag.retrieve.rerank.pairs import question_passage_pairs, ranked
from rag.runtime.options import Count, check_fields
from rag.types import Hit, Message, UserError

_LONGEST_TOKEN = 40  # characters: a text is truncated to n tokens after a cut to n times this


@dataclass(frozen=True)
class Likelihood:
    """Score each passage by log p(question | passage) of the generator.

    The default prompt is the paper's. `prompt` contains {passage}, then {question} at its very end; other braces are
    plain text. Spaces before {question} are scored with it, because byte-level tokens include the space before a word.
    With `chat` the text before {question} is a user's message in the model's chat format. `average` is over the
    question's tokens: mean is the paper's; sum gives the same order, but its scores cannot be compared across
    questions. Passage and question are truncated at the end of a word to `passage_tokens` and `question_tokens`. An
    empty question leaves the order unchanged.

    Raises:
        UserError: for a prompt of another form, lengths below 1, a pair that exceeds the model's context, and a
            generator without likelihoods.
    """

    prompt: str = "Passage: {passage}\nPlease write a question based on this passage.\nQuestion: {question}"
    chat: bool = False
    average: Literal["mean", "sum"] = "mean"
    passage_tokens: Count = 256
    question_tokens: Count = 64

    depends_on: ClassVar[tuple[str, ...]] = ("generator",)

    def __post_init__(self) -> None:
        check_fields(self)
        once = all(self.prompt.count(name) == 1 for name in ("{passage}", "{question}"))
        if not once or not self.prompt.endswith("{question}"):
            raise UserError(
                "reranker.prompt must hold {passage} once and then {question} once, at its very end: correct it"
            )

    def rerank(
        self, collection: Collection, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        generator, scorer = collection.generator, scorer_of(collection.generator)
        passage = lru_cache(None)(partial(_truncated, tokens=self.passage_tokens, count=generator.count))
        question = lru_cache(None)(partial(_truncated, tokens=self.question_tokens, count=generator.count))
        pairs = [(passage(text), question(asked)) for asked, text in question_passage_pairs(questions, hits)]
        before, between = self.prompt.removesuffix("{question}").split("{passage}")
        context = between.rstrip(" ")
        if self.chat:
            found = scorer.log_likelihood(
                [([Message("user", before + text + context)], asked) for text, asked in pairs]
            )
        else:
            spaces = between[len(context) :]
            found = scorer.text_log_likelihood(
                [(before + text + context, spaces + asked if asked else "") for text, asked in pairs]
            )
        return ranked(hits, [self._score(value) for value in found])

    def _score(self, value: LogLikelihood) -> float:
        return value.total / max(value.tokens, 1) if self.average == "mean" else value.total


def _truncated(text: str, tokens: int, count: Callable[[str], int]) -> str:
    """Return the longest first part of a text with at most `tokens` tokens: whole words, or characters of one word."""
    text = text[: tokens * _LONGEST_TOKEN]
    if count(text) <= tokens:
        return text
    words = [found.end() for found in re.finditer(r"\S+", text)]
    for ends in (words, range(1, len(text) + 1)):
        if fit := bisect_right(ends, tokens, key=lambda end: count(text[:end])):
            return text[: ends[fit - 1]]
    return ""
