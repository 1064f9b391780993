"""Mark chat messages, to tell special tokens from equal characters, and passages from the text around them.

Messages are marked before the chat template renders them, and the marks are removed from the rendered text before it is
tokenized. Marks are surrogates (halves of UTF-16 pairs), which `replace_surrogates` leaves in no text: so no content of
a message can be taken for a mark.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rag.types import Message

_MASK, _END_FIXED, _BEGIN, _END = "\ud800", "\ud801", "\ud802", "\ud803"
_CUTS = re.compile(f"([{_END_FIXED}{_BEGIN}{_END}])")


def replace_surrogates(text: str) -> str:
    """Return the text with lone surrogates, which are not Unicode text, as U+FFFD; its length does not change."""
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)


class ChatMarks:
    """Marks messages for the special tokens of one tokenizer."""

    def __init__(self, special_texts: Iterable[str]):
        longest_first = sorted(special_texts, key=len, reverse=True)
        self._special = "|".join(map(re.escape, longest_first)) or "(?!)"

    def mask(self, message: Message) -> Message:
        """Return the message with a mask before each text of a special token, so that it is not tokenized as one."""
        return replace(message, content=self._masked(message.content))

    def mark(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages masked, with marks around their `reusable` spans and where the fixed text ends.

        The fixed text ends in the first message that is not `fixed` to its end.
        """
        marked, open_ended = [], False
        for message in messages:
            spans = [(start, stop) for start, stop in message.reusable if start < stop]
            marks = [(stop, _END) for _, stop in spans] + [(start, _BEGIN) for start, _ in spans]
            if not open_ended and message.fixed < len(message.content):
                open_ended = True
                marks.insert(0, (message.fixed, _END_FIXED))
            marked.append(replace(message, content=self._marked(message.content, marks)))
        return marked

    def fragments(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """Yield (text without masks, whether it is a special token) of a rendered text, in order."""
        for i, fragment in enumerate(re.split(f"(?<!{_MASK})({self._special})", rendered)):
            yield fragment.replace(_MASK, ""), i % 2 == 1

    def _masked(self, content: str) -> str:
        return re.sub(f"(?={self._special})", _MASK, replace_surrogates(content))

    def _marked(self, content: str, marks: list[tuple[int, str]]) -> str:
        """Return the content with marks at their positions; the text between them is masked."""
        parts, last = [], 0
        for position, mark in sorted(marks, key=lambda item: item[0]):  # stable: an end before a beginning
            parts += [self._masked(content[last:position]), mark]
            last = position
        return "".join([*parts, self._masked(content[last:])])


def is_masked(rendered: str) -> bool:
    """Whether a rendered text contains masks."""
    return _MASK in rendered


def cut(rendered: str) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether it is a passage) of a rendered text, cut at the marks of `ChatMarks.mark`; none is empty."""
    inside = False
    for part in _CUTS.split(rendered):
        if _CUTS.fullmatch(part):
            inside = part == _BEGIN
        elif part:
            yield part, inside
