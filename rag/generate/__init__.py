"""Messages in, a streamed answer out: our own engine, or a local Ollama server."""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from rag.ops.sampling import Sampling
from rag.types import Message, Usage


@runtime_checkable
class Generator(Protocol):
    """What the pipeline asks of a language model."""

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""

    def count(self, text: str) -> int:
        """Tokens of a text."""

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation in the model's own chat format."""

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        stop: Sequence[str],
    ) -> Iterator[str | Usage]:
        """The answer's text piece by piece, then its Usage."""
