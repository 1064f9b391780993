"""Iterative retrieval for multi-hop questions: the model reads the passages and asks a follow-up question.

The follow-up questions are those of Self-Ask (Press et al. 2022). As in IRCoT (Trivedi et al. 2022) the model is shown
the best passages of all searches so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from rag import context, prompt
from rag.context import ContextOptions
from rag.index.fusion import Fusion, ReciprocalRank
from rag.ops.sampling import Sampling
from rag.prompt import PromptTemplate
from rag.retrieve import Retriever
from rag.retrieve.cached import cached_search
from rag.retrieve.collection import Collection
from rag.retrieve.dependencies import dependencies_of
from rag.retrieve.search import fuse_searches
from rag.retrieve.transform.instruction import Instruction
from rag.retrieve.transform.parse import lines, normal, without_echoes
from rag.runtime.options import Count, Filled
from rag.types import Hit, Message, Source, UserError


@dataclass(frozen=True)
class _FollowUpSettings:
    """The options that the follow-up to a conversation depends on."""

    sampling: Sampling
    max_new_tokens: int
    stop: Sequence[str]
    seed: int

    depends_on: ClassVar[tuple[str, ...]] = ("generator",)


@dataclass(frozen=True, kw_only=True)
class Iterative(Instruction):
    """Search for the question, then for follow-up questions that the model writes, and fuse the results.

    After a search the model is shown the question and the `passages` best hits so far, at most `max_context_tokens` of
    them, in place of {context}. It writes a follow-up question, which is searched next, or `finished`. The search ends
    there, where the model writes nothing new, where the prompt exceeds the model's context, and after `max_steps`
    searches. A question that was searched once keeps the retriever's scores.

    Raises:
        UserError: for a prompt without {context}, for counts below 1, and as Instruction does.
    """

    retriever: Retriever
    max_steps: Count = 3  # searches for a question, the first included
    passages: Count = 3
    max_context_tokens: Count = 512
    passage: str = "{text}"
    separator: str = "\n\n"
    finished: Filled = "DONE"  # as it is written here, anywhere in what the model writes
    fusion: Fusion = field(default_factory=ReciprocalRank)
    depth: Count = 100  # of each search

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{context}" not in self.user + self.system:
            raise UserError("The prompt shows no passages: put {context} into retriever.user.")

    @property
    def depends_on(self) -> tuple[str, ...]:
        return (*dependencies_of(self.retriever), "generator")

    @property
    def template(self) -> PromptTemplate:
        return PromptTemplate(self.user, self.passage, self.system, self.separator)

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        """Return at most k hits for each question, best first."""
        asked = [[question] for question in questions]
        found: list[list[list[Hit]]] = [[] for _ in questions]
        going = list(range(len(questions)))
        for step in range(self.max_steps):
            texts = [asked[i][-1] for i in going]
            hits_of_texts = cached_search(collection, self.retriever, texts, max(k, self.depth))
            for i, hits in zip(going, hits_of_texts, strict=True):
                found[i].append(hits)
            if step + 1 < self.max_steps:
                going = self._ask_further(collection, going, asked, found)
            if not going:
                break
        return [hits[:k] for hits in fuse_searches(self.fusion, found, self.retriever)]

    def _ask_further(
        self,
        collection: Collection,
        going: Sequence[int],
        asked: list[list[str]],
        found: Sequence[Sequence[Sequence[Hit]]],
    ) -> list[int]:
        """Append a follow-up question to `asked` where the model writes one; return the questions that have one."""
        best = fuse_searches(self.fusion, [found[i] for i in going], self.retriever)
        conversations = [
            self._prompt(collection, asked[i][0], hits[: self.passages])
            for i, hits in zip(going, best, strict=True)
        ]
        replies = self._cached_write(collection, conversations)
        further = []
        for i, messages, written in zip(going, conversations, replies, strict=True):
            if follow_up := self._follow_up(written, messages, asked[i]):
                asked[i].append(follow_up)
                further.append(i)
        return further

    def _cached_write(
        self, collection: Collection, conversations: Sequence[Sequence[Message]]
    ) -> list[list[str]]:
        """Return `write`, cached a few at a time: the search around it is cached only when its last step is done."""

        def compute(items: Sequence) -> list[list[str]]:
            return self.write(collection, [[Message(*message) for message in item] for item in items])

        settings = _FollowUpSettings(self.sampling, self.max_new_tokens, self.stop, self.seed)
        items = [[[message.role, message.content] for message in messages] for messages in conversations]
        return collection.cached_map("follow-up", settings, items, compute, batch=16, passages=False)

    def _prompt(self, collection: Collection, question: str, hits: Sequence[Hit]) -> list[Message]:
        """Return the prompt with as many of the passages as its budget holds, the best first."""

        def render(source: Source) -> str:
            return prompt.render_passage(self.template, source)

        options = ContextOptions(self.max_context_tokens, merge=False)
        shown = context.build_context(hits, None, options, collection.generator.count, render)
        return prompt.render(self.template, question, shown)

    def _follow_up(
        self, written: Sequence[str], messages: Sequence[Message], asked: Sequence[str]
    ) -> str | None:
        """Return the follow-up question; None where the model is finished or asks nothing new."""
        if not written or self.finished in written[0]:
            return None
        texts = lines(without_echoes(written[0], messages))
        return texts[0] if texts and normal(texts[0]) not in map(normal, asked) else None
