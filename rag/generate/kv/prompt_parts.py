"""Split a prompt into the prefix, the passages and the rest, for precomputed chunk KV caches."""

from collections.abc import Sequence
from dataclasses import dataclass

from rag.generate.prefill_batches import common_prefix
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.types import Message

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptParts:
    """A prompt's token ids, and which of them have keys and values that other prompts share."""

    ids: list[int]
    prefix: Ids  # passages are prefilled after it; the prompt begins with `shared` tokens of it
    shared: int
    passages: tuple[tuple[int, Ids], ...]  # the position where each begins, and its ids

    def entries(self) -> list[tuple[Ids, Ids]]:
        """Return (ids before it, ids) of each text with a cache of its own: the prefix, if any, and the passages."""
        passages = [(self.prefix, ids) for _, ids in self.passages]
        return [((), self.prefix), *passages] if self.prefix else passages

    def spans(self) -> list[tuple[int, int]]:
        """Return the positions [start, end) in the prompt that each of `entries` fills."""
        passages = [(at, at + len(ids)) for at, ids in self.passages]
        return [(0, self.shared), *passages] if self.prefix else passages

    def is_exact(self, at: int) -> bool:
        """Return whether the passage at a position follows the whole prefix, as when its cache was computed."""
        return at == self.shared == len(self.prefix)


def split_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> PromptParts:
    """Split the prompt of a conversation into the pieces of `Tokenizer.chat_pieces`.

    The prefix is that of the conversation without its earlier turns, so that they do not change the passages.
    """
    pieces = tokenizer.chat_pieces(messages)
    short = _without_turns(messages)
    first, is_passage = (pieces if len(short) == len(messages) else tokenizer.chat_pieces(short))[0]
    ids: list[int] = []
    passages = []
    for piece, reusable in pieces:
        if reusable:
            passages.append((len(ids), tuple(piece)))
        ids += piece
    prefix = () if is_passage else tuple(first)
    return PromptParts(ids, prefix, min(common_prefix(prefix, ids), len(ids) - 1), tuple(passages))


def _without_turns(messages: Sequence[Message]) -> list[Message]:
    """Return the template's own first messages, and the first message with passages."""
    own = next((i for i, m in enumerate(messages) if m.fixed < len(m.content)), len(messages))
    shown = next((i for i, m in enumerate(messages) if m.reusable), own)
    return [*messages[: min(own, shown)], *messages[shown : shown + 1]]
