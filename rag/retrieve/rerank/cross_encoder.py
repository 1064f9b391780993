"""Rerank with a cross-encoder: a sequence classifier of question and passage (Nogueira and Cho 2019, arXiv:1901.04085).

B batch, T tokens of a pair, L labels
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Float32, Float64, Int

from rag.embed.packing import plan_batches
from rag.models import hub
from rag.models.bert import checkpoint as bert_checkpoint
from rag.models.bert import model as bert
from rag.models.bert.checkpoint import ClassifierSettings
from rag.models.bert.model import BertClassifier
from rag.models.conversion_cache import file_digests
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.retrieve.collection import Collection
from rag.retrieve.rerank.pairs import question_passage_pairs, ranked
from rag.runtime.cache.keys import content_key
from rag.runtime.options import Count, Filled, check_fields
from rag.types import Hit, UserError


@dataclass(frozen=True)
class CrossEncoder:
    """Score each pair of question and passage with a sequence classifier of the BERT family.

    `uri` (rag.models.hub) names a checkpoint such as cross-encoder/ms-marco-MiniLM-L-6-v2. The score is the logit of a
    head with one label (sentence-transformers applies a sigmoid, which does not change the order), and of a head with
    several the log-odds of `label` against the rest, by default the last. A pair that exceeds `max_length` tokens,
    special ones included, is truncated as by longest_first of transformers; None takes the checkpoint's limit.

    Raises:
        UserError: for weights that cannot be found or loaded, a label that the head lacks, and a max_length beyond the
            model's positions.
    """

    uri: Filled = "hf:cross-encoder/ms-marco-MiniLM-L-6-v2"
    max_length: Count | None = None
    tokens_per_batch: Count = 1024
    label: Annotated[int, Ge(-100_000), Le(100_000)] = -1
    weights: str = field(init=False, repr=False)  # digest of the checkpoint's files, for the cache key

    depends_on: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        files = bert_checkpoint.source_files(hub.local_path(self.uri))
        object.__setattr__(self, "weights", content_key(file_digests(files)))

    def rerank(
        self, collection: Collection, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        model, tokenizer, settings = _classifier(self.uri, self.weights)
        limit = self._limit(settings)
        pairs = _pair_ids(tokenizer, question_passage_pairs(questions, hits), settings.separators, limit)
        types = min(settings.config.type_vocab_size, 2) - 1  # of the passage: RoBERTa has one type
        logits = np.zeros((len(pairs), settings.labels), np.float32)
        for rows, size, width in plan_batches(_lengths(pairs), self.tokens_per_batch, limit):
            batch = _pair_batch([pairs[row] for row in rows], size, width, types)
            logits[rows] = np.asarray(bert.classify(model, *batch))[: len(rows)]
        return ranked(hits, label_scores(logits, self._checked_label(settings.labels)))

    def _limit(self, settings: ClassifierSettings) -> int:
        longest = settings.config.max_position_embeddings - settings.config.position_offset
        wanted = settings.max_length if self.max_length is None else self.max_length
        least = 4 + settings.separators  # two special tokens at the ends, one of each text
        if not least <= wanted <= longest:
            raise UserError(
                f"reranker.max_length={wanted} does not suit {self.uri}: choose from {least} to {longest} tokens"
            )
        return wanted

    def _checked_label(self, labels: int) -> int:
        if not -labels <= self.label < labels:
            raise UserError(
                f"reranker.label={self.label}, but {self.uri} has {labels} labels: count from 0 or -1 backwards"
            )
        return self.label


def label_scores(logits: Float32[np.ndarray, "pairs L"], label: int) -> Float64[np.ndarray, "pairs"]:
    """Return the logit of a single label, else the log-odds of `label`: log p(label) - log p(any other)."""
    logits = logits.astype(np.float64)
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[:, label] - np.logaddexp.reduce(np.delete(logits, label, axis=1), axis=1)


@lru_cache(maxsize=2)
def _classifier(uri: str, weights: str) -> tuple[BertClassifier, Tokenizer, ClassifierSettings]:
    """Load the checkpoint; `weights` is in the arguments so that changed files are loaded again."""
    return bert_checkpoint.load_classifier(hub.local_path(uri))


def _pair_ids(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], separators: int, limit: int
) -> list[tuple[list[int], list[int]]]:
    """Return ([CLS] question [SEP] ..., passage [SEP]) of each pair, truncated to `limit` tokens together."""
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    ids = dict(zip(texts, tokenizer.encode_batch(texts, special=False), strict=True))
    first, separator = tokenizer.encode("")
    made = []
    for question, passage in pairs:
        left, right = longest_first(len(ids[question]), len(ids[passage]), limit - 2 - separators)
        before = [first, *ids[question][:left], *[separator] * separators]
        made.append((before, [*ids[passage][:right], separator]))
    return made


def longest_first(left: int, right: int, limit: int) -> tuple[int, int]:
    """Return how many tokens of two texts remain when both are truncated to `limit` together.

    The longer is truncated first, then both to halves, as in the tokenizers library: the longer text gets an odd token
    more, the second text where both are equal.
    """
    if left + right <= limit:
        return left, right
    shorter = min(left, right, limit // 2)
    return (limit - shorter, shorter) if left > right else (shorter, limit - shorter)


def _lengths(pairs: Sequence[tuple[list[int], list[int]]]) -> Int[np.ndarray, "pairs"]:
    return np.array([len(before) + len(after) for before, after in pairs], np.int64)


def _pair_batch(
    pairs: Sequence[tuple[list[int], list[int]]], size: int, width: int, types: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"], Int[np.ndarray, "B T"]]:
    """Return (tokens, lengths, token types) of `size` rows; those after the pairs are padding."""
    tokens, kinds = np.zeros((size, width), np.int32), np.zeros((size, width), np.int32)
    lengths = np.ones(size, np.int32)
    for row, (before, after) in enumerate(pairs):
        lengths[row] = len(before) + len(after)
        tokens[row, : lengths[row]] = before + after
        kinds[row, len(before) : lengths[row]] = types
    return tokens, lengths, kinds
