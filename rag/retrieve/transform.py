"""Query transforms: other texts to search for in place of a question, written by the language model.

A transform gives texts, and each is searched by itself. Small models answer when they are asked to rephrase,
repeat themselves and the prompt, and introduce what they write: it is parsed with that in mind, and where
nothing is left the question stands for itself.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rag import prompt
from rag.ops.sampling import Sampling
from rag.prompt import PromptTemplate
from rag.records import parse_json
from rag.retrieve.collection import Collection
from rag.types import Context, Message, UserError
from rag.values import Count, Filled, Penalty, Seed, Temperature, TopP, check_fields

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


@dataclass(frozen=True, kw_only=True)
class Rewrite(Instruction):
    """The question as a better query (Ma et al. 2023, "Query Rewriting for Retrieval-Augmented LLMs")."""

    include_original: bool = False  # the question is searched too, and stands first

    def expand(self, collection: Collection, questions: Sequence[str]) -> list[list[str]]:
        """The query that the model wrote for each question."""
        return _expanded(self, collection, questions, lines, self.include_original, most=1)


@dataclass(frozen=True, kw_only=True)
class MultiQuery(Instruction):
    """Up to `count` other ways to ask the question, written as one list. Raises UserError for a count below 1."""

    count: Count = 3
    include_original: bool = True

    def expand(self, collection: Collection, questions: Sequence[str]) -> list[list[str]]:
        """Each question, and the other ways to ask it that the model wrote, in its order."""
        return _expanded(self, collection, questions, lines, self.include_original, most=self.count)


@dataclass(frozen=True, kw_only=True)
class Decompose(Instruction):
    """Up to `max_parts` simpler questions that make up the question. Raises UserError for max_parts below 1."""

    max_parts: Count = 3
    include_original: bool = True

    def expand(self, collection: Collection, questions: Sequence[str]) -> list[list[str]]:
        """Each question, and its parts in the model's order."""
        return _expanded(self, collection, questions, lines, self.include_original, most=self.max_parts)


@dataclass(frozen=True, kw_only=True)
class HyDE(Instruction):
    """`count` passages that might answer the question, invented, to find real ones like them (Gao et al. 2022).

    The paper averages the vectors of the passages and of the question and searches once. Here each text is
    searched, and the rankings are fused, so that lexical search profits too. Raises UserError for a count
    below 1, and for several passages without temperature, which would all be the same.
    """

    count: Count = 1
    include_original: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count > 1 and not self.temperature:
            raise UserError(
                f"{self.count} passages at temperature 0 are the same: give transform.temperature, such as 0.7."
            )

    def expand(self, collection: Collection, questions: Sequence[str]) -> list[list[str]]:
        """The invented passages of each question."""
        options = {"most": self.count, "copies": self.count}
        return _expanded(self, collection, questions, passage, self.include_original, **options)


def _expanded(
    instruction: Instruction,
    collection: Collection,
    questions: Sequence[str],
    parse: Callable[[str], list[str]],
    include_original: bool,
    most: int,
    copies: int = 1,
) -> list[list[str]]:
    """For each question up to `most` different texts of those written, or itself where there is none."""
    nothing = Context((), 0)
    conversations = [prompt.render(instruction.template, question, nothing) for question in questions]
    expanded = []
    for question, messages, written in zip(
        questions, conversations, instruction.write(collection, conversations, copies), strict=True
    ):
        texts = [text for raw in written for text in parse(without_echoes(raw, messages))]
        first = [question] if include_original else []
        expanded.append(distinct([*first, *texts])[: most + len(first)] or [question])
    return expanded


# --- What small models write

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)  # of a model that reasons aloud
_MARK = re.compile(r"(?:[-*•·–—>#]+|\(?(?:\d{1,2}|[a-z])[.):])(?:\s+|$)", re.IGNORECASE)  # of a list
_NUMBER = re.compile(r"(?:^|(?<=\s))\(?(\d{1,2})[.)]\s+")
_LABEL = re.compile(
    r"(?:(?:the|re-?written|rephrased|reworded|alternative|other|search|sub|follow[ -]?up|simpler|new|original"
    r"|hypothetical|short|example)[ -]+)*"
    r"(?:sub)?(?:quer(?:y|ies)|questions?|passage|paragraph|document|answer|rewrite|keywords?|[qa])"
    r"(?: *#?\d{1,2})? *:\s*",
    re.IGNORECASE,
)
_QUOTED_AT_END = re.compile(r":\s*[\"“]([^\"“”]+)[\"”]?\.?$")  # ... you can use this query: "..."
_QUOTES = ('""', "“”", "''", "‘’", "«»", "``", "「」")


def lines(raw: str) -> list[str]:
    """The texts of a list, one on each line: without numbers, bullets, labels, quotes and introductions."""
    raw = _THOUGHT.sub("", raw).strip()
    found = _json_list(raw)
    if found is None:
        found = [item for line in raw.splitlines() for item in _numbered(line)]
    bare = [_bare(_quoted(item)) for item in found]
    return [text for text in bare if normal(text) and not text.endswith(":")]


def passage(raw: str) -> list[str]:
    """The one text that was written, on one line: without label, quotes and introduction; none if it is blank."""
    parts = [line.strip() for line in _THOUGHT.sub("", raw).splitlines() if line.strip()]
    if len(parts) > 1 and parts[0].endswith(":"):
        parts = parts[1:]
    text = _bare(" ".join(" ".join(parts).split()))
    return [text] if normal(text) else []


def without_echoes(raw: str, messages: Sequence[Message]) -> str:
    """What was written, without the lines that only repeat a line of the prompt."""
    prompted = {normal(_bare(line)) for message in messages for line in message.content.splitlines()}
    prompted.discard("")
    return "\n".join(line for line in raw.splitlines() if normal(_bare(line)) not in prompted)


def distinct(texts: Iterable[str]) -> list[str]:
    """The texts without those that repeat an earlier one but for case, punctuation and spaces."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(normal(text), text)
    return list(first.values())


def normal(text: str) -> str:
    """The words alone, in lower case; empty for a text without any."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _json_list(raw: str) -> list[str] | None:
    if not raw.startswith("["):
        return None
    try:
        values = parse_json(raw)
    except ValueError:  # no JSON, cut off, or nested too deep
        return None
    return values if all(isinstance(value, str) for value in values) else None


def _numbered(line: str) -> list[str]:
    """The items of "1. ... 2. ... 3. ..." on one line; else the line."""
    marks = list(_NUMBER.finditer(line))
    if len(marks) < 2 or [int(mark[1]) for mark in marks] != list(range(1, len(marks) + 1)):
        return [line]
    ends = [mark.start() for mark in marks[1:]] + [len(line)]
    return [line[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]


def _bare(line: str) -> str:
    """A line without list mark, label, emphasis and quotes, in whatever order they enclose it."""
    text, before = line.replace("**", "").strip(), None
    while text != before:
        before = text
        for pattern in (_MARK, _LABEL):
            if mark := pattern.match(text):
                text = text[mark.end() :]
        if len(text) > 1 and text[0] + text[-1] in _QUOTES:
            text = text[1:-1]
        text = text.strip()
    return text


def _quoted(line: str) -> str:
    """What an introduction on the same line quotes; else the line."""
    quoted = _QUOTED_AT_END.search(line.strip())
    return quoted[1] if quoted else line
