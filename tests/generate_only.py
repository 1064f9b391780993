"""What a stand-in generator has beside the one method that a test gives it."""

from collections.abc import Iterator, Sequence

from rag.generate import LogLikelihood
from rag.types import Message, Usage


class GenerateOnly:
    """All of the Generator protocol but `generate` and `context_length`, which the test gives; a token is a word."""

    @property
    def fingerprint(self) -> str:
        return "0" * 64

    @property
    def description(self) -> str:
        return "a stand-in"

    def count(self, text: str) -> int:
        return len(text.split())

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        return sum(self.count(message.content) for message in messages)

    def stream(self, messages, sampling, max_new_tokens, seed, stop) -> Iterator[str | Usage]:
        raise NotImplementedError

    def log_likelihood(self, pairs) -> list[LogLikelihood]:
        raise NotImplementedError

    def text_log_likelihood(self, pairs) -> list[LogLikelihood]:
        raise NotImplementedError
