"""Reranking by the likelihood of the question given the passage (Sachan et al. 2022, arXiv:2204.07496)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Literal

from rag.generate import LogLikelihood
from rag.retrieve.collection import Collection
from rag.retrieve.rerank.cross_encoder import _cut, _pairs, _ranked
from rag.runtime.options import Count, check_fields
from rag.types import Hit, Message, UserError


@dataclass(frozen=True)
class Likelihood:
    """How likely the generator finds the question after the passage: log p(question | passage).

    Sachan et al. 2022 (UPR, arXiv:2204.07496), whose prompt is the default. `prompt` holds {passage}, then
    {question} at its very end; other braces are plain text. Spaces before {question} are scored with it, because
    byte-level tokens carry the space before a word. With `chat` what stands before {question} is a user's
    message in the model's chat format. `average` is over the question's tokens: mean is theirs, and sum gives
    the same order, but scores that do not compare across questions.

    Passage and question are cut at the end of a word to `passage_tokens` and `question_tokens`. An empty question
    leaves the order as it is. Raises UserError for a prompt of another form, lengths below 1, a pair that does
    not fit the model's context, and a generator that cannot tell likelihoods.
    """

    prompt: str = "Passage: {passage}\nPlease write a question based on this passage.\nQuestion: {question}"
    chat: bool = False
    average: Literal["mean", "sum"] = "mean"
    passage_tokens: Count = 256
    question_tokens: Count = 64

    uses: ClassVar[tuple[str, ...]] = ("generator",)

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
        generator = collection.generator
        passage = lru_cache(None)(partial(_cut, tokens=self.passage_tokens, count=generator.count))
        question = lru_cache(None)(partial(_cut, tokens=self.question_tokens, count=generator.count))
        pairs = [(passage(text), question(asked)) for asked, text in _pairs(questions, hits)]
        before, between = self.prompt.removesuffix("{question}").split("{passage}")
        context = between.rstrip(" ")
        if self.chat:
            found = generator.log_likelihood(
                [([Message("user", before + text + context)], asked) for text, asked in pairs]
            )
        else:
            spaces = between[len(context) :]
            found = generator.text_log_likelihood(
                [(before + text + context, spaces + asked if asked else "") for text, asked in pairs]
            )
        return _ranked(hits, [self._score(value) for value in found])

    def _score(self, value: LogLikelihood) -> float:
        return value.total / max(value.tokens, 1) if self.average == "mean" else value.total
