"""What a language model is asked to write, and how it is sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rag.ops.sampling import Sampling
from rag.prompt import PromptTemplate
from rag.retrieve.collection import Collection
from rag.runtime.options import Count, Filled, Penalty, Seed, Temperature, TopP, check_fields
from rag.types import Message

_SEEDS = 1 << 32


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What the model is asked, in one chat turn, and how it writes.

    `user` and `system` are texts of rag.prompt.PromptTemplate: {question} stands for the question. Raises
    UserError for other placeholders, for a prompt without the question, for max_new_tokens below 1, for
    a seed of more than 32 bits, and for values that rag.ops.sampling.Sampling refuses.
    """

    user: str
    system: str = ""
    stop: Sequence[Filled] = ()  # ends a text, and is left out of it
    max_new_tokens: Count = 64
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    repetition_penalty: Penalty = 1.0
    seed: Seed = 0

    uses: ClassVar[tuple[str, ...]] = ("generator",)

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.template, self.sampling  # refused now rather than when a model has been loaded

    @property
    def template(self) -> PromptTemplate:
        return PromptTemplate(user=self.user, system=self.system)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, 0, self.top_p, 0.0, self.repetition_penalty)

    def write(
        self, collection: Collection, conversations: Sequence[Sequence[Message]], copies: int = 1
    ) -> list[list[str]]:
        """`copies` texts for each conversation; none for one that the model's context does not hold.

        The n-th copy is drawn with seed + n - 1, from 0 again beyond 32 bits, whatever other conversations there are.
        """
        generator = collection.generator
        room = generator.context_length - self.max_new_tokens
        fits = [generator.prompt_tokens(messages) <= room for messages in conversations]
        if not any(fits):
            return [[] for _ in fits]
        asked = [messages for messages, fit in zip(conversations, fits, strict=True) if fit]
        repeated = [messages for messages in asked for _ in range(copies)]
        seeds = [(self.seed + copy) % _SEEDS for _ in asked for copy in range(copies)]
        texts = iter(generator.generate(repeated, self.sampling, self.max_new_tokens, seeds, self.stop))
        return [[next(texts) for _ in range(copies)] if fit else [] for fit in fits]
