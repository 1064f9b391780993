"""Messages in, a streamed answer or the likelihood of a given one out: our own engine, or an Ollama server."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rag.ops.sampling import Sampling
from rag.types import Message, Usage


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """How likely a model finds a text that it was given to continue with."""

    total: float  # natural logarithm of the text's probability; 0 for an empty text
    tokens: int  # of the text; total / tokens is the mean of its tokens' log-probabilities


def describe(generator: "Generator") -> str:
    """What a person calls a generator: its `description` (the model and the type of its weights) if it has one, or the
    name of its class."""
    return getattr(generator, "description", type(generator).__name__)


@runtime_checkable
class Generator(Protocol):
    """What the stages ask of a language model."""

    @property
    def fingerprint(self) -> str:
        """64 hex digits; two generators that share it write the same answers. Reads no weights."""

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

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling,
        max_new_tokens: int,
        seeds: Sequence[int] | None,
        stop: Sequence[str],
    ) -> list[str]:
        """The answers to any number of conversations, in their order; seeds None is 0 for each."""

    def log_likelihood(self, pairs: Sequence[tuple[Sequence[Message], str]]) -> list[LogLikelihood]:
        """log p(text | the conversation in the chat format, where the answer begins) of each pair, in order."""

    def text_log_likelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """log p(second text | first text) of each pair, in order, without a chat format."""
