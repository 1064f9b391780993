"""What the stages hand to one another: frozen records without logic, and the one error a person sees.

files -> Document -> Chunk -> (vectors, index) -> Hit -> Context(Source ...) -> Answer
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where, and what to do about it.

    Scripts print the sentence without a traceback and exit with status 2. Anything else that is raised is a
    bug of ours and keeps its traceback.
    """


@dataclass(frozen=True, slots=True)
class Document:
    """One loaded file or dataset entry; every character span of the project points into its `text`."""

    id: str  # unique in its corpus: the path relative to the corpus root, or the dataset's own id
    path: str  # what a reader is shown as the source
    text: str  # the extracted and cleaned text
    title: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A passage that is embedded and retrieved as one; `text == document.text[start:end]`."""

    id: str  # "<document id>:<start>-<end>"
    document_id: str
    path: str
    start: int  # characters, inclusive
    end: int  # characters, exclusive
    text: str


def chunk_at(document: Document, start: int, end: int) -> Chunk:
    """The chunk of a document between two characters, `end` exclusive."""
    name = f"{document.id}:{start}-{end}"
    return Chunk(name, document.id, document.path, start, end, document.text[start:end])


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved chunk and its score (cosine for the dense index); higher is better."""

    chunk: Chunk
    score: float


@dataclass(frozen=True, slots=True)
class Source:
    """A passage as the prompt shows it, under its citation number `[n]`, n from 1."""

    n: int
    path: str
    start: int
    end: int
    score: float
    text: str


@dataclass(frozen=True, slots=True)
class Context:
    """The passages that fit the token budget, in prompt order."""

    sources: tuple[Source, ...]
    tokens: int  # of the rendered passages, by the generator's tokenizer
    dropped: int = 0  # passages left out, or cut short, because the budget was full


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn, in the roles that chat templates know; equal to another that says the same.

    `reusable` are the character spans (start, end) of the passages in it, ascending and apart: texts that are the
    same whatever stands around them, and so may be read once for many prompts. Its first `fixed` characters are the
    template's own, the same whatever is asked and retrieved.
    """

    role: Literal["system", "user", "assistant"]
    content: str
    reusable: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    fixed: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Usage:
    """What one generation took; a generator yields it last, after the pieces of text.

    The seconds are disjoint: making or loading programs (`rag.runtime.clock.compile_seconds`), and with a server loading the
    model, is in `prepare_s` alone. Our own engine's weights are loaded before any of them begins.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_s: float  # to the first new token, what is read from files included
    decode_s: float  # from the first new token to the last
    prepare_s: float = 0.0
    notices: tuple[str, ...] = ()  # what the reader should know


@dataclass(frozen=True, slots=True)
class Timings:
    """Where an answer's time went, in disjoint seconds, and its tokens."""

    retrieve_s: float
    prefill_s: float
    decode_s: float
    prompt_tokens: int
    new_tokens: int
    prepare_s: float = 0.0  # `Usage.prepare_s`, and the programs of retrieval


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer with the sources it was shown."""

    question: str
    answer: str
    abstained: bool  # nothing relevant was retrieved, so no model was asked
    sources: tuple[Source, ...]
    timings: Timings
    cited: tuple[int, ...] = ()  # the numbers of the sources that the answer itself marks, as [n]
    notices: Sequence[str] = field(
        default=()
    )  # what the reader should know: a trimmed context, a full budget
