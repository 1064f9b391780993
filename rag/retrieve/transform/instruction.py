"""The instruction to a language model: its prompt, how the model samples, and how its texts are parsed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rag import prompt
from rag.generate import Request
from rag.ops.sampling import Sampling
from rag.prompt import PromptTemplate
from rag.retrieve.collection import Collection
from rag.retrieve.transform.parse import distinct, without_echoes
from rag.runtime.options import Count, Filled, Penalty, Seed, Temperature, TopP, check_fields
from rag.types import Context, Message

_SEEDS = 1 << 32


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A prompt of one chat turn, and how the model answers it.

    `user` and `system` are texts of rag.prompt.PromptTemplate: {question} is replaced by the question.

    Raises:
        UserError: for other placeholders, for a prompt without the question, for max_new_tokens below 1, for a seed of
            more than 32 bits, and for values that rag.ops.sampling.Sampling refuses.
    """

    user: str
    system: str = ""
    stop: Sequence[Filled] = ()  # ends a text, and is left out of it
    max_new_tokens: Count = 64
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    repetition_penalty: Penalty = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.template, self.sampling  # refused now rather than when a model has been loaded

    @property
    def depends_on(self) -> tuple[str, ...]:
        return ("generator",)

    @property
    def template(self) -> PromptTemplate:
        return PromptTemplate(user=self.user, system=self.system)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, 0, self.top_p, 0.0, self.repetition_penalty)

    def write(
        self, collection: Collection, conversations: Sequence[Sequence[Message]], copies: int = 1
    ) -> list[list[str]]:
        """Return `copies` texts for each conversation; none for one that exceeds the model's context.

        The n-th copy is sampled with seed + n - 1, from 0 again beyond 32 bits, whatever the other conversations are.
        """
        generator = collection.generator
        longest = generator.context_length - self.max_new_tokens
        fits = [generator.prompt_tokens(messages) <= longest for messages in conversations]
        if not any(fits):
            return [[] for _ in fits]
        requests = [
            Request(messages, self.sampling, self.max_new_tokens, (self.seed + copy) % _SEEDS, self.stop)
            for messages, fit in zip(conversations, fits, strict=True)
            if fit
            for copy in range(copies)
        ]
        texts = iter(generator.generate(requests))
        return [[next(texts) for _ in range(copies)] if fit else [] for fit in fits]

    def expand_with(
        self,
        collection: Collection,
        questions: Sequence[str],
        parse: Callable[[str], list[str]],
        *,
        most: int,
        include_original: bool,
        copies: int = 1,
    ) -> list[list[str]]:
        """Return for each question at most `most` different texts that the model writes; itself where there is none.

        Args:
            collection: has the model.
            questions: one prompt each.
            parse: returns the texts in what the model wrote.
            most: the number of texts for a question.
            include_original: whether the question itself is returned first.
            copies: how often the model answers each prompt.
        """
        no_passages = Context((), 0)
        conversations = [prompt.render(self.template, question, no_passages) for question in questions]
        replies = self.write(collection, conversations, copies)
        expanded = []
        for question, messages, written in zip(questions, conversations, replies, strict=True):
            texts = [text for raw in written for text in parse(without_echoes(raw, messages))]
            first = [question] if include_original else []
            expanded.append(distinct([*first, *texts])[: most + len(first)] or [question])
        return expanded
