"""Generators write answers to conversations; scorers compute the likelihood of given texts.

rag.generate.local runs our own engine, rag.generate.ollama asks a local Ollama server.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rag.ops.sampling import Sampling
from rag.types import Message, Usage, UserError


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation to answer, and how to answer it."""

    messages: Sequence[Message]
    sampling: Sampling = Sampling()
    max_new_tokens: int = 256
    seed: int = 0  # decides the random draws of this answer; greedy sampling draws none
    stop: Sequence[str] = ()  # the answer ends before the first of these strings
    no_repeat: bool = False  # the answer ends before a sentence that it already has (rag.generate.repetition)


@runtime_checkable
class Generator(Protocol):
    """Writes answers with a language model."""

    @property
    def fingerprint(self) -> str:
        """Return 64 hex digits; two generators with the same ones write the same answers. Loads no weights."""

    @property
    def context_length(self) -> int:
        """Return how many tokens prompt and answer may have together."""

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Return the number of tokens of a conversation in the model's own chat format."""

    def stream(self, request: Request) -> Iterator[str | Usage]:
        """Yield the answer's text piece by piece, then its Usage."""

    def generate(self, requests: Sequence[Request]) -> list[str]:
        """Return the answers to any number of requests, in their order."""


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """How likely a model finds a given text."""

    total: float  # natural logarithm of the text's probability; 0 for an empty text
    tokens: int  # of the text; total / tokens is the mean of its tokens' log-probabilities


@runtime_checkable
class Scorer(Protocol):
    """Computes how likely a language model finds given texts."""

    def log_likelihood(self, pairs: Sequence[tuple[Sequence[Message], str]]) -> list[LogLikelihood]:
        """Return log p(text | conversation) of each pair, in order; the text begins where an answer begins."""

    def text_log_likelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """Return log p(second text | first text) of each pair, in order, without a chat format."""


def scorer_of(generator: Generator) -> Scorer:
    """Return the generator as a Scorer. Raises UserError for one that computes no likelihoods."""
    if isinstance(generator, Scorer):
        return generator
    raise UserError(
        f"{describe(generator)} computes no likelihood of a given text: set generator=local, which can read the file "
        "of an Ollama model as generator.weights=ollama:NAME"
    )


def describe(generator: Generator) -> str:
    """Return a generator's `description` (the model and the dtype of its weights), or else the name of its class."""
    return getattr(generator, "description", type(generator).__name__)


def join_text(stream: Iterable[str | Usage]) -> str:
    """Return the whole text of a streamed answer."""
    return "".join(piece for piece in stream if isinstance(piece, str))
