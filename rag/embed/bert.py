"""Texts to unit vectors: a BERT-family encoder of ours, or counted words.

Equal texts are embedded once. The others are packed: a long text opens a row, shorter ones fill it, and rows run
together in batches of about as many tokens each. Hardly a token is padding, the shapes are few (each is a program
to compile), and rows are no longer than they must be, since attention is dearer the longer a row (LOG.md). Batches are
dispatched ahead, so the next texts are tokenised while the last are computed. A text's vector does not depend on
its neighbours, up to the rounding of float32.

Letters: N texts, B rows of a batch, T tokens, S texts of a row, E embedding dim.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float32, Int

from rag.embed import Progress
from rag.embed.packing import Batch, _batch, pack_texts, plan_batches
from rag.models import hub
from rag.models.bert import checkpoint as bert_checkpoint
from rag.models.bert import model as bert
from rag.runtime import cache_key, file_hash
from rag.runtime.options import Count, Filled, checked
from rag.runtime.shapes import round_up_text
from rag.types import UserError

# Part of fingerprints, by which an index on disk knows its embedder, whatever the code: raise one when the same
# weights begin to give other vectors, which do not compare with an index's. Kept results need neither (rag.runtime.import_closure).
BERT_VERSION = 1

_BLOCK = 2048  # texts that are tokenised and sorted together
_IN_FLIGHT = 8  # batches dispatched ahead of the one being waited for


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
        score_threshold: float | None = None,
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
        self.score_threshold = score_threshold
        self.dim = config.hidden_size
        self.spec = {"kind": "bert", "uri": uri, "dim": self.dim, "dtype": dtype, **asdict(self._settings)}
        digests = [file_hash.file_sha256(file) for file in bert_checkpoint.source_files(path)]
        kind = "bert" if dtype == "float32" else f"bert in {dtype}"
        self.fingerprint = cache_key.content_key(kind, BERT_VERSION, digests, asdict(self._settings))

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
                batch = _batch([ids], [[0]], (1, round_up_text(len(ids), limit)))
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
            packed = pack_texts([len(row) for row in ids], limit)
            used = np.array([sum(len(ids[i]) for i in row) for row in packed])
            for rows, size, width in plan_batches(used, self._tokens_per_batch, limit):
                yield _batch(ids, [packed[row] for row in rows], (size, width), start)
