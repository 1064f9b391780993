"""Render a question and its context as chat messages. Templates are data: nothing in them is evaluated."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rag.runtime.options import check_fields
from rag.types import Context, Message, Source, UserError

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
_LABEL = re.compile(r"^[^\S\n]*(\w+(?: \w+){0,2}[:\uff1a])", re.MULTILINE)  # of at most three words
_KNOWN = {
    "system": ("question", "context"),
    "user": ("question", "context"),
    "passage": ("n", "text", "path"),
    "separator": (),
    "abstain_answer": (),
}


@dataclass(frozen=True)
class PromptTemplate:
    """The texts of a prompt, with placeholders in braces.

    `system` and `user` may contain {question} and {context}. `passage` may contain {n}, {text} and {path}; it is
    rendered for each source, and the results, joined by `separator`, are {context}. Other braces are plain text.

    Raises:
        UserError: for an unknown placeholder, and when {question} or {text} is missing.
    """

    user: str = "Passages:\n\n{context}\n\nQuestion: {question}"
    passage: str = "[{n}] {text}"
    system: str = ""
    separator: str = "\n\n"
    abstain_answer: str = "The documents do not answer this question."

    def __post_init__(self) -> None:
        check_fields(self)
        for field, known in _KNOWN.items():
            for name in _PLACEHOLDER.findall(getattr(self, field)):
                if name not in known:
                    allowed = " and ".join(f"{{{k}}}" for k in known) or "no placeholder"
                    raise UserError(
                        f"The prompt's {field} has the unknown placeholder {{{name}}}: it may hold {allowed}."
                    )
        if "{question}" not in self.user + self.system:
            raise UserError(
                "The prompt shows the question nowhere: put {question} into its user or system text."
            )
        if "{text}" not in self.passage:
            raise UserError("The prompt's passage shows no text: put {text} into it.")

    @property
    def labels(self) -> tuple[str, ...]:
        """Return what begins lines of the prompt's own texts and ends in a colon, such as "Question:"."""
        return tuple(dict.fromkeys(_LABEL.findall("\n".join((self.system, self.user, self.passage)))))

    def abstains(self, answer: str) -> bool:
        """Return whether an answer is `abstain_answer`; case, punctuation and citation marks do not count."""
        return _words(answer) == _words(self.abstain_answer)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"\[[\d\s,;]*\]", " ", text).casefold())


def render(template: PromptTemplate, question: str, context: Context) -> list[Message]:
    """Return the messages to send: the system text unless it is blank, then the user's text.

    Placeholders are replaced in one pass, so a question, a passage or a path may contain texts that look like one. The
    messages have the spans of their passages, and the length of the first part, which comes from the template.

    Args:
        template: the texts with placeholders.
        question: as the user asks it.
        context: the passages to show.
    """
    shown = _joined([_passage(template, source) for source in context.sources], template.separator)
    values = {"question": (question, ()), "context": shown}
    system = _message("system", template.system, values)
    first = [system] if system.content.strip() else []
    return [*first, _message("user", template.user, values)]


def render_passage(template: PromptTemplate, source: Source) -> str:
    """Return one source as it is in the prompt, without the separator."""
    return _passage(template, source)[0]


_Spans = tuple[tuple[int, int], ...]
_Marked = tuple[str, _Spans]  # a text, and the spans of the passages in it


def _message(role: Literal["system", "user"], template: str, values: dict[str, _Marked]) -> Message:
    content, spans = _fill(template, values)
    placeholder = _PLACEHOLDER.search(template)
    fixed = placeholder.start() if placeholder else len(content)
    return Message(role, content, _with_space(content, spans), fixed)


def _with_space(content: str, spans: _Spans) -> _Spans:
    """Return the spans that are not empty, each with the space before it: most tokens begin with a space."""
    widened, end = [], 0
    for start, stop in spans:
        if start < stop:
            widened.append((start - (start > end and content[start - 1] == " "), stop))
            end = stop
    return tuple(widened)


def _passage(template: PromptTemplate, source: Source) -> _Marked:
    text = (source.text, ((0, len(source.text)),))
    return _fill(template.passage, {"n": (str(source.n), ()), "text": text, "path": (source.path, ())})


def _joined(texts: Sequence[_Marked], separator: str) -> _Marked:
    parts = [part for text in texts for part in ((separator, ()), text)]
    return _concatenated(parts[1:])


def _fill(template: str, values: dict[str, _Marked]) -> _Marked:
    """Return the template with the values in place of the placeholders."""
    parts = re.split(_PLACEHOLDER, template)  # literal, name, literal, ...
    return _concatenated(values[part] if i % 2 else (part, ()) for i, part in enumerate(parts))


def _concatenated(texts: Iterable[_Marked]) -> _Marked:
    """Return the texts one after another, with their spans shifted to the new positions."""
    content = ""
    spans: list[tuple[int, int]] = []
    for text, inside in texts:
        spans += [(len(content) + start, len(content) + end) for start, end in inside]
        content += text
    return content, tuple(spans)
