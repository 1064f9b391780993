"""Rerankers, which read a question beside each found passage: cross-encoder, late interaction, LLM likelihood.

All give the same hits back with new scores, best first; hits of equal score keep their order.

Letters: C candidates (passages of one question), P pairs, T query tokens, S passage tokens, E embedding dim, L labels.
"""

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Annotated, ClassVar, Literal
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Array, Float, Float32, Float64, Int

from rag.cache import content_key
from rag.embed import padded_length, plan
from rag.generate import LogLikelihood
from rag.models import bert, bert_checkpoint, checkpoint, hub
from rag.models.bert import BertClassifier
from rag.models.bert_checkpoint import ClassifierSettings
from rag.models.tokenizer import Tokenizer
from rag.retrieve.collection import Collection
from rag.types import Hit, Message, UserError
from rag.values import Count, Filled, check_fields

_CANDIDATES = 16  # passages of one call of maxsim
_BLOCK = 1024  # passages whose token vectors are made together
_KEPT_BYTES = 1 << 30  # of token vectors a collection, in float16
_LONGEST_TOKEN = 40  # characters: what is cut to n tokens is first cut to n times this


@dataclass(frozen=True)
class CrossEncoder:
    """The score that a sequence classifier of the BERT family gives question and passage, read as one input.

    Nogueira and Cho 2019 (arXiv:1901.04085). `uri` (rag.models.hub) names a checkpoint such as
    cross-encoder/ms-marco-MiniLM-L-6-v2. The score is the logit of a head with one label (sentence-transformers
    puts a sigmoid over it, which changes no order), and of a head with several the log-odds of `label` against
    the rest, by default the last.

    A pair that exceeds `max_length` tokens, special ones included, is cut as transformers' longest_first does;
    None takes the checkpoint's limit. Raises UserError for weights that cannot be had or loaded, a label that
    the head lacks, and a max_length beyond its positions.
    """

    uri: Filled = "hf:cross-encoder/ms-marco-MiniLM-L-6-v2"
    max_length: Count | None = None
    tokens_per_batch: Count = 1024
    label: Annotated[int, Ge(-100_000), Le(100_000)] = -1
    weights: str = field(init=False, repr=False)  # digest of the checkpoint: its name alone says too little

    uses: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        files = bert_checkpoint.source_files(hub.local_path(self.uri))
        object.__setattr__(self, "weights", content_key(checkpoint.contents(files)))

    def rerank(
        self, collection: Collection, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        model, tokenizer, settings = _classifier(self.uri, self.weights)
        limit = self._limit(settings)
        pairs = _pair_ids(tokenizer, _pairs(questions, hits), settings.separators, limit)
        types = min(settings.config.type_vocab_size, 2) - 1  # of the passage: RoBERTa has one type
        logits = np.zeros((len(pairs), settings.labels), np.float32)
        for rows, size, width in plan(_lengths(pairs), self.tokens_per_batch, limit):
            batch = _pair_batch([pairs[row] for row in rows], size, width, types)
            logits[rows] = np.asarray(bert.classify(model, *batch))[: len(rows)]
        return _ranked(hits, label_scores(logits, self._checked_label(settings.labels)))

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


def label_scores(logits: Float32[np.ndarray, "P L"], label: int) -> Float64[np.ndarray, "P"]:
    """The one label's logit, or the log-odds of `label`: log p(label) - log p(any other)."""
    logits = logits.astype(np.float64)
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[:, label] - np.logaddexp.reduce(np.delete(logits, label, axis=1), axis=1)


@lru_cache(maxsize=2)
def _classifier(uri: str, weights: str) -> tuple[BertClassifier, Tokenizer, ClassifierSettings]:
    """The loaded checkpoint; `weights` is there so that changed files are loaded anew."""
    return bert_checkpoint.load_classifier(hub.local_path(uri))


def _pair_ids(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], separators: int, limit: int
) -> list[tuple[list[int], list[int]]]:
    """([CLS] question [SEP] ..., passage [SEP]) of each pair, cut so that both together fit `limit` tokens."""
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    ids = dict(zip(texts, tokenizer.encode_batch(texts, special=False), strict=True))
    first, separator = tokenizer.encode("")
    made = []
    for question, passage in pairs:
        room = limit - 2 - separators
        left, right = longest_first(len(ids[question]), len(ids[passage]), room)
        before = [first, *ids[question][:left], *[separator] * separators]
        made.append((before, [*ids[passage][:right], separator]))
    return made


def longest_first(left: int, right: int, room: int) -> tuple[int, int]:
    """How many tokens each of two texts keeps in `room`: the longer is cut first, then both to halves.

    As the tokenizers library does it: an odd token more is the longer text's, the second one's among equals.
    """
    if left + right <= room:
        return left, right
    shorter = min(left, right, room // 2)
    return (room - shorter, shorter) if left > right else (shorter, room - shorter)


def _lengths(pairs: Sequence[tuple[list[int], list[int]]]) -> Int[np.ndarray, "P"]:
    return np.array([len(before) + len(after) for before, after in pairs], np.int64)


def _pair_batch(
    pairs: Sequence[tuple[list[int], list[int]]], size: int, width: int, types: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"], Int[np.ndarray, "B T"]]:
    """(tokens, lengths, token types) of `size` rows; those past the pairs are filling."""
    tokens, kinds = np.zeros((size, width), np.int32), np.zeros((size, width), np.int32)
    lengths = np.ones(size, np.int32)
    for row, (before, after) in enumerate(pairs):
        lengths[row] = len(before) + len(after)
        tokens[row, : lengths[row]] = before + after
        kinds[row, len(before) : lengths[row]] = types
    return tokens, lengths, kinds


@dataclass(frozen=True)
class MaxSim:
    """Late interaction: the mean over the question's tokens of the best cosine with any token of the passage.

    Khattab and Zaharia 2020 (ColBERT, arXiv:2004.12832), who take the sum: the order is the same, and the mean
    compares across questions. The token states are the embedder's own, which was not trained for this; nothing
    else is loaded. They are kept in float16 while the collection lives, up to a gigabyte, so a passage that many
    questions find is encoded once. A passage without tokens scores -1, the lowest cosine; a question without
    tokens leaves the order as it is. Raises UserError for an embedder without token states.
    """

    uses: ClassVar[tuple[str, ...]] = ("embedder",)

    def rerank(
        self, collection: Collection, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        encode = getattr(collection.embedder, "token_vectors", None)
        if encode is None:
            raise UserError(
                "reranker=maxsim compares tokens' vectors, and this embedder has none: take a BERT-family one, "
                "such as embedder=minilm"
            )
        asked = list(dict.fromkeys(questions))
        queries = dict(zip(asked, encode(asked, queries=True), strict=True))
        passages = _token_vectors(collection, encode, [passage for _, passage in _pairs(questions, hits)])
        scores = [
            _maxsim_scores(queries[question], [passages[hit.chunk.text] for hit in found])
            for question, found in zip(questions, hits, strict=True)
        ]
        return _ranked(hits, np.concatenate([np.zeros(0, np.float32), *scores]))


@jax.jit
@partial(jax.vmap, in_axes=(None, None, 0, 0))
def maxsim(
    query: Float[Array, "T E"], length: Int[Array, ""], passage: Float[Array, "S E"], size: Int[Array, ""]
) -> Float[Array, ""]:
    """Written for one passage: the mean over `length` query tokens of the highest dot product with `size` tokens.

    Vectors of unit length; what stands past `length` and `size` is padding. Without passage tokens -1, without
    query tokens 0.
    """
    similarity = jnp.einsum("te,se->ts", query, passage, preferred_element_type=jnp.float32)
    best = jnp.where(jnp.arange(passage.shape[0]) < size, similarity, -1.0).max(axis=1)
    return jnp.where(jnp.arange(query.shape[0]) < length, best, 0.0).sum() / jnp.maximum(length, 1)


def _maxsim_scores(
    query: Float32[np.ndarray, "T E"], passages: Sequence[Float[np.ndarray, "_ E"]]
) -> Float32[np.ndarray, "C"]:
    """Every candidate's score; those of like lengths run together, in programs of few shapes."""
    padded = _padded([query], 1)[0]
    order = np.argsort([len(passage) for passage in passages], kind="stable")
    scores = np.zeros(len(passages), np.float32)
    for start in range(0, len(order), _CANDIDATES):
        rows = order[start : start + _CANDIDATES]
        some = [passages[row] for row in rows]
        sizes = np.zeros(_CANDIDATES, np.int32)
        sizes[: len(some)] = [len(passage) for passage in some]
        found = maxsim(padded, np.int32(len(query)), _padded(some, _CANDIDATES), sizes)
        scores[rows] = np.asarray(found)[: len(rows)]
    return scores


def _padded(vectors: Sequence[Float[np.ndarray, "_ E"]], rows: int) -> Float32[np.ndarray, "C S E"]:
    """The matrices in one array of `rows`, float32, zeros where they end."""
    longest = max(1, *(len(matrix) for matrix in vectors))
    array = np.zeros((rows, padded_length(longest, 1 << 30), vectors[0].shape[1]), np.float32)
    for row, matrix in zip(array, vectors, strict=False):
        row[: len(matrix)] = matrix
    return array


# Token vectors of each living collection's passages, by text, the oldest first.
_kept: WeakKeyDictionary[Collection, OrderedDict[str, np.ndarray]] = WeakKeyDictionary()


def _token_vectors(
    collection: Collection, encode: Callable[[Sequence[str]], list[np.ndarray]], texts: Sequence[str]
) -> dict[str, np.ndarray]:
    """float16 [S, E] of each text, from what is kept where it is there.

    Always rounded to float16, kept or not: what was asked before may change no score.
    """
    kept = _kept.setdefault(collection, OrderedDict())
    found = {text: kept.get(text) for text in texts}
    missing = [text for text, vectors in found.items() if vectors is None]
    for start in range(0, len(missing), _BLOCK):
        block = missing[start : start + _BLOCK]
        for text, vectors in zip(block, encode(block), strict=True):
            found[text] = kept[text] = vectors.astype(np.float16)
    size = sum(vectors.nbytes for vectors in kept.values())
    while size > _KEPT_BYTES:
        size -= kept.popitem(last=False)[1].nbytes
    return found


@dataclass(frozen=True)
class Likelihood:
    """How likely the generator finds the question after the passage: log p(question | passage).

    Sachan et al. 2022 (UPR, arXiv:2204.07496), whose prompt is the default. `prompt` holds {passage}, then
    {question} at its very end; other braces are plain text. Spaces before {question} are scored with it, because
    byte-level tokens carry the space before a word. With `chat` what stands before {question} is a user's
    message in the model's chat format. `average` is over the question's tokens: mean is theirs, and sum gives
    the same order, but scores that do not compare across questions.

    Passage and question are cut at the end of a word to `passage_tokens` and `question_tokens`. An empty question
    leaves the order as it is. Raises UserError for a prompt of another form, lengths below 1, a pair that does
    not fit the model's context, and a generator that cannot tell likelihoods.
    """

    prompt: str = "Passage: {passage}\nPlease write a question based on this passage.\nQuestion: {question}"
    chat: bool = False
    average: Literal["mean", "sum"] = "mean"
    passage_tokens: Count = 256
    question_tokens: Count = 64

    uses: ClassVar[tuple[str, ...]] = ("generator",)

    def __post_init__(self) -> None:
        check_fields(self)
        once = all(self.prompt.count(name) == 1 for name in ("{passage}", "{question}"))
        if not once or not self.prompt.endswith("{question}"):
            raise UserError(
                "reranker.prompt must hold {passage} once and then {question} once, at its very end: correct it"
            )

    def rerank(
        self, collection: Collection, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        generator = collection.generator
        passage = lru_cache(None)(partial(_cut, tokens=self.passage_tokens, count=generator.count))
        question = lru_cache(None)(partial(_cut, tokens=self.question_tokens, count=generator.count))
        pairs = [(passage(text), question(asked)) for asked, text in _pairs(questions, hits)]
        before, between = self.prompt.removesuffix("{question}").split("{passage}")
        context = between.rstrip(" ")
        if self.chat:
            found = generator.log_likelihood(
                [([Message("user", before + text + context)], asked) for text, asked in pairs]
            )
        else:
            spaces = between[len(context) :]
            found = generator.text_log_likelihood(
                [(before + text + context, spaces + asked if asked else "") for text, asked in pairs]
            )
        return _ranked(hits, [self._score(value) for value in found])

    def _score(self, value: LogLikelihood) -> float:
        return value.total / max(value.tokens, 1) if self.average == "mean" else value.total


def _cut(text: str, tokens: int, count: Callable[[str], int]) -> str:
    """The beginning of a text that has at most `tokens` tokens: whole words, or characters where one is too long."""
    text = text[: tokens * _LONGEST_TOKEN]
    if count(text) <= tokens:
        return text
    words = [found.end() for found in re.finditer(r"\S+", text)]
    for ends in (words, range(1, len(text) + 1)):
        if fit := bisect_right(ends, tokens, key=lambda end: count(text[:end])):
            return text[: ends[fit - 1]]
    return ""


def _pairs(questions: Sequence[str], hits: Sequence[Sequence[Hit]]) -> list[tuple[str, str]]:
    """(question, passage) of every hit, question by question."""
    return [
        (question, hit.chunk.text) for question, found in zip(questions, hits, strict=True) for hit in found
    ]


def _ranked(hits: Sequence[Sequence[Hit]], scores: Sequence[float] | np.ndarray) -> list[list[Hit]]:
    """The hits of each question with their new scores, given for all one after the other; best first, stable."""
    each: Iterator[float] = iter(scores)
    scored = [[Hit(hit.chunk, float(next(each))) for hit in found] for found in hits]
    return [sorted(found, key=lambda hit: -hit.score) for found in scored]
