"""Texts to unit vectors: a BERT-family encoder of ours, or counted words.

Equal texts are embedded once. The others are packed: a long text opens a row, shorter ones fill it, and rows run
together in batches of about as many tokens each. Hardly a token is padding, the shapes are few (each is a program
to compile), and rows are no longer than they must be, since attention is dearer the longer a row (LOG.md). Batches are
dispatched ahead, so the next texts are tokenised while the last are computed. A text's vector does not depend on
its neighbours, up to the rounding of float32.

Letters: N texts, B rows of a batch, T tokens, S texts of a row, E embedding dim.
"""

import json
import math
import re
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Float32, Float64, Int

from rag import cache
from rag.models import bert, bert_checkpoint, hub
from rag.types import UserError
from rag.values import Count, Filled, checked

# Part of fingerprints, by which an index on disk knows its embedder, whatever the code: raise one when the same
# weights begin to give other vectors, which do not compare with an index's. Kept results need neither (rag.closure).
BERT_VERSION = 1
BAG_OF_WORDS_VERSION = 1

Bytes = Annotated[int, Ge(1), Le(2**50)]
Progress = Callable[[int], None]  # texts done so far

_BLOCK = 2048  # texts that are tokenised and sorted together
_IN_FLIGHT = 8  # batches dispatched ahead of the one being waited for
_NARROWEST, _WIDEST = 16, 256  # tokens of a row that holds several texts
_SPARSE = 16  # tokens a text that a row of several has at least, on average
_VOCABULARY = "vocabulary.json"


@runtime_checkable
class Embedder(Protocol):
    """What turns passages and questions into vectors that are compared by their dot product."""

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """64 hex digits; two embedders that share it give the same vectors."""
        ...

    @property
    def relevant_from(self) -> float | None:
        """The score from which a passage is likely to be about the question; None where that is not known."""
        ...

    @property
    def spec(self) -> dict[str, Any]:
        """What an index says about the embedder that made it, JSON-able."""
        ...

    def encode(self, texts: Sequence[str], progress: Progress = ...) -> Float32[np.ndarray, "N E"]:
        """The vectors of passages, in their order."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        """The vectors of questions, in their order."""
        ...

    def token_spans(self, text: str) -> Int[np.ndarray, "n 2"]:
        """Character offsets (start, end) of the text's tokens, which chunk sizes are counted in."""
        ...

    def fit(self, texts: Sequence[str]) -> "Embedder":
        """The embedder made ready for a corpus."""
        ...

    def save(self, folder: Path) -> None:
        """Write into an index's folder what `fit` learned."""
        ...

    def restore(self, folder: Path) -> "Embedder":
        """The embedder as it was when it made the index in this folder."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens that run together, and the texts in them: their numbers and lengths, -1 and 0 for none."""

    texts: Int[np.ndarray, "B S"]
    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B S"]


class BertEmbedder:
    """Any checkpoint of the BERT family, by its URI (rag.models.hub), with the pooling that it asks for.

    `max_length` tokens of a text are read, [CLS] and [SEP] included; None takes the checkpoint's own limit.
    Prompts are written before every passage or question; None takes the checkpoint's. Vectors have unit
    length even where the checkpoint would leave them longer, because an index compares by cosine.

    `dtype` is that of the layers' weights, and so of their products: float32, bfloat16, or int8 with a scale a row
    (rag.ops.linear); the vectors are float32 all the same, and another dtype has another fingerprint.
    Raises UserError for a checkpoint that cannot be loaded, a max_length beyond its positions and an unknown dtype.
    """

    @checked
    def __init__(
        self,
        uri: Filled = hub.DEFAULT_EMBEDDER,
        max_length: Count | None = None,
        tokens_per_batch: Count = 1024,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        relevant_from: float | None = None,
        dtype: Literal[bert_checkpoint.DTYPES] = "float32",
    ):
        path = hub.local_path(uri)
        self._model, self._tokenizer, settings = bert_checkpoint.load(path, dtype)
        config, wanted = settings.config, settings.pooling.max_length if max_length is None else max_length
        longest = config.max_position_embeddings - config.position_offset
        if not 3 <= wanted <= longest:
            raise UserError(f"max_length={wanted} does not suit {uri}: choose from 3 to {longest} tokens")
        self._settings = replace(
            settings,
            pooling=replace(settings.pooling, normalize=True, max_length=wanted),
            query_prompt=settings.query_prompt if query_prompt is None else query_prompt,
            document_prompt=settings.document_prompt if document_prompt is None else document_prompt,
        )
        self._tokens_per_batch = tokens_per_batch
        self.relevant_from = relevant_from
        self.dim = config.hidden_size
        self.spec = {"kind": "bert", "uri": uri, "dim": self.dim, "dtype": dtype, **asdict(self._settings)}
        digests = [cache.file_sha256(file) for file in bert_checkpoint.source_files(path)]
        kind = "bert" if dtype == "float32" else f"bert in {dtype}"
        self.fingerprint = cache.content_key(kind, BERT_VERSION, digests, asdict(self._settings))

    def encode(
        self, texts: Sequence[str], progress: Progress = lambda done: None
    ) -> Float32[np.ndarray, "N E"]:
        return self._encode([self._settings.document_prompt + text for text in texts], progress)

    def encode_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        return self._encode([self._settings.query_prompt + text for text in texts], lambda done: None)

    def token_vectors(
        self, texts: Sequence[str], *, queries: bool = False
    ) -> list[Float32[np.ndarray, "T E"]]:
        """The last layer's state of every token of each text, of unit length, without [CLS] and [SEP].

        With `queries` the texts are questions, which is a matter of the prompt. Each text runs alone: so its
        states are the same to the bit whatever is asked for beside it, and may be kept.
        """
        prompt = self._settings.query_prompt if queries else self._settings.document_prompt
        limit = self._settings.pooling.max_length
        found = []
        for start in range(0, len(texts), _BLOCK):
            for ids in self._ids([prompt + text for text in texts[start : start + _BLOCK]]):
                batch = _batch([ids], [[0]], (1, padded_length(len(ids), limit)))
                states = np.asarray(bert.token_states(self._model, batch.tokens, batch.lengths[:, 0]))[0]
                found.append(states[self._before : self._before + len(ids) - self._specials])
        return found

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, special ones included, no more than the limit."""
        if self._settings.lower_case:
            texts = [text.lower() for text in texts]
        return self._tokenizer.encode_batch(texts, max_length=self._settings.pooling.max_length)

    @cached_property
    def _specials(self) -> int:
        """How many special tokens stand around a text."""
        return len(self._tokenizer.encode(""))

    @cached_property
    def _before(self) -> int:
        """How many of them stand before it."""
        around, within = self._tokenizer.encode("a"), self._tokenizer.encode("a", special=False)
        return next(i for i in range(len(around)) if around[i : i + len(within)] == within)

    def token_spans(self, text: str) -> Int[np.ndarray, "n 2"]:
        return self._tokenizer.token_spans(text)

    def fit(self, texts: Sequence[str]) -> "BertEmbedder":
        return self

    def save(self, folder: Path) -> None:
        """Nothing was learned."""

    def restore(self, folder: Path) -> "BertEmbedder":
        return self

    def _encode(self, texts: Sequence[str], progress: Progress) -> Float32[np.ndarray, "N E"]:
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        unique = np.empty((len(place), self.dim), np.float32)
        inverse = np.array([place[text] for text in texts], np.int64)
        copies = np.bincount(inverse, minlength=len(place))
        done = 0

        def collect(batch: Batch, vectors: jax.Array) -> None:
            nonlocal done
            there = batch.texts >= 0
            unique[batch.texts[there]] = np.asarray(vectors)[there]
            done += int(copies[batch.texts[there]].sum())
            progress(done)

        running: deque = deque()
        for batch in self._batches(list(place)):
            vectors = bert.embed(self._model, batch.tokens, batch.lengths, pooling=self._settings.pooling)
            running.append((batch, vectors))  # not waited for: the next is prepared meanwhile
            if len(running) > _IN_FLIGHT:
                collect(*running.popleft())
        for batch, vectors in running:
            collect(batch, vectors)
        return unique[inverse]

    def _batches(self, texts: Sequence[str]) -> Iterator[Batch]:
        limit = self._settings.pooling.max_length
        for start in range(0, len(texts), _BLOCK):
            ids = self._ids(texts[start : start + _BLOCK])
            packed = pack([len(row) for row in ids], limit)
            used = np.array([sum(len(ids[i]) for i in row) for row in packed])
            for rows, size, width in plan(used, self._tokens_per_batch, limit):
                yield _batch(ids, [packed[row] for row in rows], (size, width), start)


def pack(lengths: Sequence[int], longest: int) -> list[list[int]]:
    """Which texts share a row, each text once: the longest left opens one, then the longest that fits goes in.

    A row has the next power of two of its first text's tokens as room, between 16 and 256, and no more than
    `longest`; a text beyond 256 tokens stands alone. Best-fit decreasing (Johnson et al. 1974).
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sizes, rows = [-lengths[i] for i in order], []  # ascending, as bisect wants them
    while order:
        first = -sizes.pop(0)
        row, room = [order.pop(0)], min(max(_NARROWEST, _power(first)), longest, _WIDEST) - first
        while len(row) < most_texts(first) and (place := bisect_left(sizes, -room)) < len(sizes):
            room += sizes.pop(place)
            row.append(order.pop(place))
        rows.append(row)
    return rows


def most_texts(width: int) -> int:
    """How many texts a row may hold that is padded to so many tokens."""
    return max(1, min(_power(width), _WIDEST) // _SPARSE)


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def plan(
    lengths: Int[np.ndarray, "N"], tokens_per_batch: int, longest: int
) -> Iterator[tuple[Int[np.ndarray, "n"], int, int]]:
    """Which rows run together: (rows, B, T) with n <= B, the longest first, each row once.

    B T <= tokens_per_batch unless one row alone is longer. The shapes are few: T is as `padded_length` says,
    and B follows from it, or is the next power of two in the last batch.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = padded_length(int(lengths[order[start]]), longest)
        size = max(1, tokens_per_batch // width)
        rows = order[start : start + size]
        yield rows, min(size, _power(len(rows))), width
        start += size


def padded_length(length: int, longest: int) -> int:
    """The next multiple of 16 up to 128 tokens, of 32 up to 256, of 64 beyond, but no more than `longest`."""
    grain = 16 if length <= 128 else 32 if length <= 256 else 64
    return min(-(-length // grain) * grain, longest)


def _batch(
    ids: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], shape: tuple[int, int], start: int = 0
) -> Batch:
    """The rows' texts, of which ids[i] is text start + i, and rows of filling up to the shape (B, T)."""
    most = most_texts(shape[1]) if max(map(len, rows)) > 1 else 1
    tokens = np.zeros(shape, np.int32)
    texts, lengths = np.full((shape[0], most), -1), np.zeros((shape[0], most), np.int32)
    for b, row in enumerate(rows):
        texts[b, : len(row)] = np.array(row) + start
        lengths[b, : len(row)] = [len(ids[i]) for i in row]
        tokens[b, : lengths[b].sum()] = np.concatenate([ids[i] for i in row])
    return Batch(texts, tokens, lengths)


class BagOfWords:
    """The cosine of word counts: lower-cased, split at each space, counted, divided by the counts' norm.

    Two spaces in a row enclose an empty word, which counts as any other; punctuation stays with its word. The
    vocabulary is the corpus's, learned by `fit` and kept with the index. A question's words that the corpus
    lacks have no dimension, but they do lengthen its norm, so every score is the cosine of all the counts; a
    question of such words alone is the zero vector and scores 0.
    """

    @checked
    def __init__(
        self,
        max_bytes: Bytes = 1 << 30,
        relevant_from: float | None = None,
        vocabulary: Sequence[str] = (),
    ):
        """`max_bytes`: the largest matrix of passages by words, float32, that `fit` lets an index have."""
        self._max_bytes = max_bytes
        self.relevant_from = relevant_from
        self._place = {word: i for i, word in enumerate(vocabulary)}
        self.dim = len(self._place)
        self.spec = {"kind": "bag_of_words", "dim": self.dim}
        self.fingerprint = cache.content_key(
            "bag_of_words", BAG_OF_WORDS_VERSION
        )  # the vocabulary is the index's

    def encode(
        self, texts: Sequence[str], progress: Progress = lambda done: None
    ) -> Float32[np.ndarray, "N E"]:
        if not self._place:
            raise RuntimeError("a bag of words has no dimensions before fit() or restore()")
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            vectors[i] = self.vector(text)
        progress(len(texts))
        return vectors

    def encode_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        return self.encode(texts)

    def vector(self, text: str) -> Float64[np.ndarray, "E"]:
        """One text's vector, not yet rounded to float32."""
        counts = Counter(words(text))
        norm = math.sqrt(sum(count**2 for count in counts.values()))
        vector = np.zeros(self.dim)
        for word, count in counts.items():
            if word in self._place:
                vector[self._place[word]] = count / norm
        return vector

    def token_spans(self, text: str) -> Int[np.ndarray, "n 2"]:
        """The stretches between spaces; empty words have no span."""
        return np.array([found.span() for found in re.finditer("[^ ]+", text)], np.int64).reshape(-1, 2)

    def fit(self, texts: Sequence[str]) -> "BagOfWords":
        """With the vocabulary of these texts; UserError when their matrix would exceed `max_bytes`."""
        vocabulary = sorted({word for text in texts for word in words(text)})
        size = 4 * len(texts) * len(vocabulary)
        if size > self._max_bytes:
            raise UserError(
                f"{len(texts)} passages of {len(vocabulary)} different words make a bag_of_words matrix of "
                f"{size:,} bytes, more than embedder.max_bytes={self._max_bytes:,}: take embedder=minilm"
            )
        return BagOfWords(self._max_bytes, self.relevant_from, vocabulary)

    def save(self, folder: Path) -> None:
        (folder / _VOCABULARY).write_text(json.dumps(list(self._place), ensure_ascii=False), encoding="utf-8")

    def restore(self, folder: Path) -> "BagOfWords":
        """With the vocabulary that `save` wrote there. UserError when there is none."""
        path = folder / _VOCABULARY
        try:
            vocabulary = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read the index's words in {path} ({error}); ingest the corpus again"
            ) from error
        return BagOfWords(self._max_bytes, self.relevant_from, vocabulary)


def words(text: str) -> list[str]:
    """The words that are counted, empty ones included."""
    return text.lower().split(" ")
