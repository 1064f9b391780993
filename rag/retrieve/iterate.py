"""Search in steps: the model reads what was found and asks for what is missing (multi-hop questions).

After Self-Ask (Press et al. 2022), whose follow-up questions these are, and IRCoT (Trivedi et al. 2022), which
shows the model all that was found so far.
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
from rag.retrieve.collection import Collection
from rag.retrieve.transform.instruction import Instruction
from rag.retrieve.transform.written import lines, normal, without_echoes
from rag.runtime.options import Count, Filled
from rag.types import Hit, Message, Source, UserError


@dataclass(frozen=True)
class _Writing:
    """What the follow-up to a conversation depends on, beside the conversation."""

    sampling: Sampling
    max_new_tokens: int
    stop: Sequence[str]
    seed: int

    uses: ClassVar[tuple[str, ...]] = ("generator",)


@dataclass(frozen=True, kw_only=True)
class Iterative(Instruction):
    """A retriever that searches for the question, then for follow-up questions; what each finds is fused.

    After a search the model sees the question and the `passages` best so far, of `max_context_tokens` at most,
    where the prompt says {context}. It writes a follow-up question, which is searched next, or `finished` when
    it has what it needs. The search also ends where the model writes nothing new, where the prompt does not fit
    its context, and after `max_steps` searches. A question that was searched once keeps the retriever's scores.

    Raises UserError for a prompt without {context}, for counts below 1, and as Instruction does.
    """

    retriever: Retriever
    max_steps: Count = 3  # searches for a question, its own included
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
    def uses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.retriever.uses, "generator")))

    @property
    def template(self) -> PromptTemplate:
        return PromptTemplate(self.user, self.passage, self.system, self.separator)

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        """At most k hits for each question, best first, ties to the passage that was ingested first."""
        asked = [[question] for question in questions]
        found: list[list[list[Hit]]] = [[] for _ in questions]
        going = list(range(len(questions)))
        for step in range(self.max_steps):
            texts = [asked[i][-1] for i in going]
            for i, hits in zip(
                going, collection.search(self.retriever, texts, max(k, self.depth)), strict=True
            ):
                found[i].append(hits)
            if step + 1 < self.max_steps:
                going = self._asked_further(collection, going, asked, found)
            if not going:
                break
        return [hits[:k] for hits in self._fused(collection, found)]

    def _asked_further(
        self,
        collection: Collection,
        going: Sequence[int],
        asked: list[list[str]],
        found: Sequence[Sequence[Sequence[Hit]]],
    ) -> list[int]:
        """The questions that have a follow-up, which is now the last of `asked`."""
        best = self._fused(collection, [found[i] for i in going])
        conversations = [
            self._shown(collection, asked[i][0], hits[: self.passages])
            for i, hits in zip(going, best, strict=True)
        ]
        further = []
        for i, messages, written in zip(
            going, conversations, self._written(collection, conversations), strict=True
        ):
            if follow_up := self._follow_up(written, messages, asked[i]):
                asked[i].append(follow_up)
                further.append(i)
        return further

    def _written(self, collection: Collection, conversations: Sequence[Sequence[Message]]) -> list[list[str]]:
        """`write`, kept a few at a time: the search around it is kept only when its last step is done."""

        def compute(items: Sequence) -> list[list[str]]:
            return self.write(collection, [[Message(*message) for message in item] for item in items])

        writing = _Writing(self.sampling, self.max_new_tokens, self.stop, self.seed)
        items = [[[message.role, message.content] for message in messages] for messages in conversations]
        return collection.keep("follow-up", writing, items, compute, batch=16, passages=False)

    def _shown(self, collection: Collection, question: str, hits: Sequence[Hit]) -> list[Message]:
        """The prompt with as many of the passages as its budget holds, the best first."""

        def render(source: Source) -> str:
            return prompt.render_passage(self.template, source)

        options = ContextOptions(self.max_context_tokens, merge=False)
        shown = context.build_context(hits, None, options, collection.generator.count, render)
        return prompt.render(self.template, question, shown)

    def _follow_up(
        self, written: Sequence[str], messages: Sequence[Message], asked: Sequence[str]
    ) -> str | None:
        """What the model asks, unless it is finished or asks nothing new."""
        if not written or self.finished in written[0]:
            return None
        texts = lines(without_echoes(written[0], messages))
        return texts[0] if texts and normal(texts[0]) not in map(normal, asked) else None

    def _fused(self, collection: Collection, found: Sequence[Sequence[Sequence[Hit]]]) -> list[list[Hit]]:
        """For each question its searches' hits as one ranking."""
        rankings = [
            [[(collection.row(hit.chunk), hit.score) for hit in hits] for hits in steps] for steps in found
        ]
        low = getattr(self.retriever, "lowest", None)
        fused = map(dict, self.fusion.fuse_batch(rankings, None if low is None else [low]))
        return [
            steps[0] if len(steps) == 1 else collection.hits(list(scores), list(scores.values()))
            for steps, scores in zip(found, fused, strict=True)
        ]
