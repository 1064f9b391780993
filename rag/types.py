"""The records that the stages give to one another, frozen and without logic, and the error that users see.

files -> Document -> Chunk -> (vectors, index) -> Hit -> Context(Source ...) -> Answer
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

# Why an answer ended: the model ended it, or a stop string did; or it had as many tokens as it may have.
FinishReason = Literal["stop", "length"]


class UserError(Exception):
    """An error in the user's input. Its one sentence says what is wrong, where, and what to do about it.

    Scripts print the sentence without a traceback and exit with status 2. Any other exception is a bug of ours and is
    shown with its traceback.
    """


@dataclass(frozen=True, slots=True)
class Document:
    """A loaded file or dataset entry; every character span of the project points into its `text`."""

    id: str  # unique in its corpus: the path relative to the corpus root, or the dataset's own id
    path: str  # shown to users as the source
    text: str  # the extracted and cleaned text
    title: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A passage that is embedded and retrieved as a unit; `text == document.text[start:end]`."""

    id: str  # "<document id>:<start>-<end>"
    document_id: str
    path: str
    start: int  # characters, inclusive
    end: int  # characters, exclusive
    text: str


def chunk_at(document: Document, start: int, end: int) -> Chunk:
    """Return the chunk of a document between two characters, `end` exclusive."""
    name = f"{document.id}:{start}-{end}"
    return Chunk(name, document.id, document.path, start, end, document.text[start:end])


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved chunk."""

    chunk: Chunk
    score: float  # higher is better; the scale depends on the retriever
    row: int  # the chunk's number in its index


@dataclass(frozen=True, slots=True)
class Source:
    """A passage in the prompt, with its citation number `[n]`, n from 1."""

    n: int
    path: str
    start: int
    end: int
    score: float
    text: str
    document_id: str = ""
    # Only the sources of an Answer have a line and a heading (rag.citations.locate).
    first_line: int = (
        0  # from 1, in the document's text; loading removes some blank lines of the file (rag.ingest.clean)
    )
    heading: str = ""  # the nearest one above the passage, or at its beginning; "" where there is none

    @property
    def last_line(self) -> int:
        return self.first_line + self.text.count("\n")


@dataclass(frozen=True, slots=True)
class Context:
    """The passages that fit the token budget, in prompt order."""

    sources: tuple[Source, ...]
    tokens: int  # of the rendered passages, by the generator's tokenizer
    dropped: int = 0  # passages that were left out or truncated because of the budget


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn, in the roles that chat templates have; messages of equal role and content are equal.

    `reusable` are the character spans (start, end) of the passages in it, ascending and disjoint: texts that are the
    same in every prompt, so that their keys and values can be computed once for many prompts. The first `fixed`
    characters come from the template and are the same for every question.
    """

    role: Literal["system", "user", "assistant"]
    content: str
    reusable: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    fixed: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Usage:
    """The cost of one generation; a generator yields it last, after the pieces of text.

    The seconds are disjoint: compiling or loading programs (`rag.runtime.machine.clock`), and with a server
    loading the model, is only in `prepare_s`. Our own engine's weights are loaded before any of them begins.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_s: float  # until the first new token, including what is loaded from files
    decode_s: float  # from the first new token to the last
    prepare_s: float = 0.0
    notices: tuple[str, ...] = ()  # for the user
    finish_reason: FinishReason = "stop"


@dataclass(frozen=True, slots=True)
class Timings:
    """The time of an answer, in disjoint seconds, and its tokens."""

    retrieve_s: float
    prefill_s: float
    decode_s: float
    prompt_tokens: int
    new_tokens: int
    prepare_s: float = 0.0  # `Usage.prepare_s`, and compiling the programs of retrieval


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer with the sources that the model was shown."""

    question: str
    answer: str
    abstained: (
        bool  # nothing relevant was retrieved, so no model was asked; or the model said that it cannot answer
    )
    sources: tuple[Source, ...]
    timings: Timings
    cited: tuple[int, ...] = ()  # the numbers of the sources that the answer cites as [n]
    notices: Sequence[str] = ()  # for the user: passages that were left out, a full cache
    finish_reason: FinishReason = "stop"
