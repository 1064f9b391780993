"""An index that lives in memory, for evaluation: the chunks of a corpus, and their vectors once they are asked for.

Letters: N chunks, E embedding dim.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int

from rag.runtime.cache_key import content_key
from rag.types import Chunk, Document


class MemoryIndex:
    """The same face as rag.index.store.Index; chunk numbers are places in `chunks`."""

    lexical = None  # no postings are kept

    def __init__(
        self, documents: Sequence[Document], chunks: Sequence[Chunk], embed: Callable[[list[str]], np.ndarray]
    ):
        """`embed` gives the texts' vectors, [N, E] float32; it is called when vectors are first needed."""
        self._documents = {document.id: document for document in documents}
        self._chunks, self._embed = list(chunks), embed

    def __len__(self) -> int:
        """How many chunks there are."""
        return len(self._chunks)

    def recheck(self) -> None:
        """Do nothing: there is no file that somebody could write to."""

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits of the chunks and their texts, in order."""
        return content_key(
            [(chunk.document_id, chunk.start, chunk.end, chunk.text) for chunk in self._chunks]
        )

    @cached_property
    def vectors(self) -> Float32[np.ndarray, "N E"]:
        """The vectors of all chunks."""
        return self._embed([chunk.text for chunk in self._chunks])

    def chunks(self, rows: Iterable[int] | Int[np.ndarray, "n"]) -> list[Chunk]:
        """The chunks with these numbers, in this order. Raises IndexError for a number out of range."""
        return [self._chunks[row] for row in rows]

    def document_ids(self) -> list[str]:
        """The documents' ids in their order."""
        return list(self._documents)

    def spans(self) -> Int[np.ndarray, "N 3"]:
        """Of each chunk the number of its document, its first character and its end, exclusive: int64."""
        places = {name: place for place, name in enumerate(self._documents)}
        spans = [(places[chunk.document_id], chunk.start, chunk.end) for chunk in self._chunks]
        return np.array(spans, np.int64).reshape(-1, 3)

    def document_text(self, document_id: str) -> str:
        """The text that a document's spans point into. Raises KeyError for an unknown id."""
        return self._documents[document_id].text
