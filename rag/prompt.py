"""Question and context to chat messages, by templates that are data: nothing in them is ever evaluated."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rag.types import Context, Message, Source, UserError

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
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

    {question} and {context} stand in `system` and `user`; {n}, {text} and {path} in `passage`, which is
    rendered for each source and joined by `separator` into {context}. Other braces are plain text. Raises
    UserError for a placeholder that is none of these, or when {question} or {text} is nowhere.
    """

    user: str
    passage: str = "[{n}] {text}"
    system: str = ""
    separator: str = "\n\n"
    abstain_answer: str = "The documents do not answer this question."

    def __post_init__(self) -> None:
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


def render(
    template: PromptTemplate, question: str, context: Context, history: Sequence[Message] = ()
) -> list[Message]:
    """Return the messages to send: the system text unless it is blank, the earlier turns, the user's turn.

    Each template is filled in one pass, so what looks like a placeholder in a question, a passage or a path
    stays as it was written.
    """
    passages = template.separator.join(render_passage(template, source) for source in context.sources)
    values = {"question": question, "context": passages}
    system = _fill(template.system, values)
    first = [Message("system", system)] if system.strip() else []
    return [*first, *history, Message("user", _fill(template.user, values))]


def render_passage(template: PromptTemplate, source: Source) -> str:
    """Return one source as the prompt shows it, without the separator."""
    return _fill(template.passage, {"n": str(source.n), "text": source.text, "path": source.path})


def _fill(template: str, values: dict[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)
