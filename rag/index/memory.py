"""An index in memory, for evaluation: the chunks of a corpus, and their vectors once they are asked for.

N chunks, E embedding dim
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int

from rag.runtime.cache.keys import content_key
from rag.types import Chunk, Document


class MemoryIndex:
    """Chunks with the methods of rag.index.store.Index that searches use.

    Args:
        documents: of which the chunks are spans.
        chunks: in the order of their rows.
        embed: returns the vectors of texts, [N, E] float32; called when vectors are first needed.
    """

    lexical = None  # postings are not stored

    def __init__(
        self, documents: Sequence[Document], chunks: Sequence[Chunk], embed: Callable[[list[str]], np.ndarray]
    ):
        self._documents = {document.id: document for document in documents}
        self._chunks, self._embed = list(chunks), embed

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self._chunks)

    def recheck(self) -> None:
        """Do nothing: there are no files."""

    @cached_property
    def fingerprint(self) -> str:
        """Return 64 hex digits of the chunks and their texts, in order."""
        return content_key(
            [(chunk.document_id, chunk.start, chunk.end, chunk.text) for chunk in self._chunks]
        )

    @cached_property
    def vectors(self) -> Float32[np.ndarray, "N E"]:
        """Return the vectors of all chunks."""
        return self._embed([chunk.text for chunk in self._chunks])

    def chunks(self, rows: Iterable[int] | Int[np.ndarray, "n"]) -> list[Chunk]:
        """Return the chunks of these rows, in this order. Raises IndexError for a row out of range."""
        return [self._chunks[row] for row in rows]

    def document_ids(self) -> list[str]:
        """Return the documents' ids in their order."""
        return list(self._documents)

    @cached_property
    def spans(self) -> Int[np.ndarray, "N 3"]:
        """Return the row of each chunk's document, its first character and its end, exclusive (int64)."""
        rows = {name: row for row, name in enumerate(self._documents)}
        spans = [(rows[chunk.document_id], chunk.start, chunk.end) for chunk in self._chunks]
        return np.array(spans, np.int64).reshape(-1, 3)

    def document_text(self, document_id: str) -> str:
        """Return the text that a document's spans point into. Raises KeyError for an unknown id."""
        return self._documents[document_id].text
