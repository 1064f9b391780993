"""Embed texts with an encoder of the BERT family.

Equal texts are embedded once. The texts are packed: a long text opens a row and shorter ones fill it
(rag.embed.packing), and rows run together in batches of about the same number of tokens. So there is hardly any
padding, there are few shapes (each needs a compiled program), and rows are as short as possible, because the cost of
attention grows with the length of a row (LOG.md). Batches are dispatched ahead, so that the next texts are tokenised
while the last ones are computed. The vector of a text does not depend on its neighbours, up to the rounding of float32.

Letters: N texts, T tokens, E embedding dim, n tokens of a text.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32, Int

from rag.embed import Progress
from rag.embed.packing import Batch, make_batch, pack_texts, plan_batches
from rag.models import hub
from rag.models.bert import checkpoint as bert_checkpoint
from rag.models.bert import model as bert
from rag.runtime.cache import file_hash
from rag.runtime.cache.keys import content_key
from rag.runtime.options import Count, Filled, checked
from rag.runtime.shapes import round_up_text
from rag.types import UserError

# A part of the fingerprint by which an index recognises its embedder, whatever the code. Increase it when the same
# weights give other vectors than before, which cannot be compared with those of an index. Cached results do not need
# it, since their keys contain the code (rag.runtime.code.import_closure).
BERT_VERSION = 1

_BLOCK = 2048  # texts that are tokenised and sorted together
_IN_FLIGHT = 8  # batches dispatched ahead of the one being waited for


class BertEmbedder:
    """Embed texts with a checkpoint of the BERT family, with its own kind of pooling.

    Vectors always have unit length, even if the checkpoint does not normalise them, because an index compares by
    cosine.
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
        dtype: bert_checkpoint.LayerDtype = "float32",
    ):
        """Load a checkpoint.

        Args:
            uri: the checkpoint (rag.models.hub).
            max_length: a text is cut after so many tokens, [CLS] and [SEP] included; None: the checkpoint's own limit.
            tokens_per_batch: about how many tokens a batch has.
            query_prompt: the text before every question; None: the checkpoint's own.
            document_prompt: the text before every passage; None: the checkpoint's own.
            score_threshold: see rag.embed.Embedder.
            dtype: the type of the layers' weights and of their products: float32, bfloat16, or int8 with a scale for
                each row (rag.ops.linear). The vectors are always float32. Each dtype has its own fingerprint.

        Raises:
            UserError: the checkpoint cannot be loaded, it has fewer positions than `max_length`, or the dtype is
                unknown.
        """
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
        self.fingerprint = content_key(kind, BERT_VERSION, digests, asdict(self._settings))

    def encode(
        self, texts: Sequence[str], progress: Progress = lambda done: None
    ) -> Float32[np.ndarray, "N E"]:
        return self._encode([self._settings.document_prompt + text for text in texts], progress)

    def encode_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        return self._encode([self._settings.query_prompt + text for text in texts], lambda done: None)

    def token_vectors(
        self, texts: Sequence[str], *, queries: bool = False
    ) -> list[Float32[np.ndarray, "T E"]]:
        """Return the last layer's state of every token of each text, of unit length, without [CLS] and [SEP].

        Each text runs alone, so that its states are the same to the bit whatever the other texts are, and may be
        cached.

        Args:
            texts: the texts.
            queries: the texts are questions, and get the prompt of questions.
        """
        prompt = self._settings.query_prompt if queries else self._settings.document_prompt
        limit = self._settings.pooling.max_length
        found = []
        for start in range(0, len(texts), _BLOCK):
            for ids in self._ids([prompt + text for text in texts[start : start + _BLOCK]]):
                batch = make_batch([ids], [[0]], (1, round_up_text(len(ids), limit)))
                states = np.asarray(bert.token_states(self._model, batch.tokens, batch.lengths[:, 0]))[0]
                found.append(states[self._leading : self._leading + len(ids) - self._specials])
        return found

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, special ones included, cut at the limit."""
        if self._settings.lower_case:
            texts = [text.lower() for text in texts]
        return self._tokenizer.encode_batch(texts, max_length=self._settings.pooling.max_length)

    @cached_property
    def _specials(self) -> int:
        """Return the number of special tokens around a text."""
        return len(self._tokenizer.encode(""))

    @property
    def max_query_tokens(self) -> int:
        """Return how many tokens of a question are embedded, beside the query prompt and the special tokens."""
        prompt = self._tokenizer.encode(self._settings.query_prompt, special=False)
        return max(0, self._settings.pooling.max_length - self._specials - len(prompt))

    @cached_property
    def _leading(self) -> int:
        """Return the number of special tokens before a text."""
        around, within = self._tokenizer.encode("a"), self._tokenizer.encode("a", special=False)
        return next(i for i in range(len(around)) if around[i : i + len(within)] == within)

    def token_spans(self, text: str) -> Int[np.ndarray, "n 2"]:
        return self._tokenizer.token_spans(text)

    def fit(self, texts: Sequence[str]) -> "BertEmbedder":
        return self

    def save(self, folder: Path) -> None:
        """Write nothing, because nothing was learned."""

    def restore(self, folder: Path) -> "BertEmbedder":
        return self

    def _encode(self, texts: Sequence[str], progress: Progress) -> Float32[np.ndarray, "N E"]:
        index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        unique = np.empty((len(index), self.dim), np.float32)
        inverse = np.array([index[text] for text in texts], np.int64)
        copies = np.bincount(inverse, minlength=len(index))
        done = 0

        def collect(batch: Batch, vectors: jax.Array) -> None:
            nonlocal done
            valid = batch.texts >= 0
            unique[batch.texts[valid]] = np.asarray(vectors)[valid]
            done += int(copies[batch.texts[valid]].sum())
            progress(done)

        running: deque[tuple[Batch, jax.Array]] = deque()
        for batch in self._batches(list(index)):
            vectors = bert.embed(self._model, batch.tokens, batch.lengths, pooling=self._settings.pooling)
            running.append((batch, vectors))  # it runs while the next batches are prepared
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
                yield make_batch(ids, [packed[row] for row in rows], (size, width), start)
