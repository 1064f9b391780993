"""Measure how much of the evaluation sets is in the training sets: ids, questions, and runs of 13 words.

A run of 13 words that two texts share is the sign of a copied text that Brown et al. use (2020, arXiv:2005.14165,
appendix C). Words are compared without case and punctuation.

Letters: n n-grams of all texts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Int, UInt64

from rag.evaluate.datasets import Dataset
from rag.index.lexical.analyzer import Analyzer
from rag.retrieve.transform.parse import normal
from rag.runtime.options import Share, checked
from rag.train.n_grams import n_grams
from rag.types import UserError

N_GRAM = 13  # words
PASSAGE_LIMIT = 0.02  # the share of an evaluation set's passages that may share an n-gram

_WORDS = Analyzer(pattern=r"\w+", stop_words=None)
_EXAMPLES = 5


@dataclass(frozen=True)
class Leaked:
    """The items of evaluation sets that training sets have too."""

    count: int
    total: int
    examples: tuple[str, ...]  # the ids of the first few

    @property
    def share(self) -> float:
        return self.count / self.total if self.total else 0.0


@dataclass(frozen=True)
class LeakageReport:
    """What evaluation sets have in common with training sets."""

    ids: Leaked  # questions with the id of a training question, which may be chance
    questions: Leaked  # questions with the words of a training question
    pairs: (
        Leaked  # questions with the words of a training question, on a passage with the words of its passage
    )
    question_n_grams: Leaked  # questions that share 13 words in a row with a training text
    passage_n_grams: Leaked  # passages that do

    def __str__(self) -> str:
        parts = ((name.replace("_", " "), getattr(self, name)) for name in asdict(self))
        return ", ".join(f"{name} {part.count} of {part.total}" for name, part in parts)

    def as_json(self) -> dict[str, dict[str, object]]:
        """Return the report for a card or a result file."""
        return {name: part | {"share": getattr(self, name).share} for name, part in asdict(self).items()}


def measure_leakage(training: Sequence[Dataset], evaluation: Sequence[Dataset]) -> LeakageReport:
    """Compare all questions and passages of the evaluation sets with those of the training sets.

    Passages are the documents of a set, compared without their titles. A question of fewer than 13 words has no
    n-gram: it can only be equal to another one.
    """
    known = {query for dataset in training for query in _questions(dataset)}
    known_questions = {normal(text) for dataset in training for text in _questions(dataset).values()}
    known_pairs = {pair for dataset in training for pairs in _pairs(dataset).values() for pair in pairs}
    asked = [item for dataset in evaluation for item in _questions(dataset).items()]
    paired = [item for dataset in evaluation for item in _pairs(dataset).items()]
    passages = [item for dataset in evaluation for item in _passages(dataset).items()]
    training_texts = [
        text for dataset in training for part in (_questions, _passages) for text in part(dataset).values()
    ]
    vocabulary: dict[str, int] = {}
    known_n_grams = np.unique(_n_grams(training_texts, vocabulary)[0])
    return LeakageReport(
        ids=_leaked((query, query in known) for query, _ in asked),
        questions=_leaked((query, normal(text) in known_questions) for query, text in asked),
        pairs=_leaked((query, not known_pairs.isdisjoint(pairs)) for query, pairs in paired),
        question_n_grams=_sharing(asked, known_n_grams, vocabulary),
        passage_n_grams=_sharing(passages, known_n_grams, vocabulary),
    )


@checked
def check_leakage(report: LeakageReport, limit: Share = PASSAGE_LIMIT) -> None:
    """Raise UserError where a larger share of the passages shares an n-gram, or a question is there with its passage.

    Equal questions on other passages, and equal ids, may be chance: they are only reported.
    """
    pairs, passages = report.pairs, report.passage_n_grams
    if pairs.count:
        raise UserError(
            f"{pairs.count} of {pairs.total} questions of the evaluation sets are in the training sets, with their "
            f"passages, such as {pairs.examples[0]!r}: leave them out of the training data."
        )
    if passages.share > limit:
        raise UserError(
            f"{passages.count} of {passages.total} passages of the evaluation sets ({passages.share:.1%}) share "
            f"{N_GRAM} words in a row with the training sets, such as {passages.examples[0]!r}, where {limit:.1%} may: "
            "leave these texts out of the training data, or raise the limit."
        )


def _questions(dataset: Dataset) -> dict[str, str]:
    return dataset.queries | dataset.unjudged


def _passages(dataset: Dataset) -> dict[str, str]:
    """Return document id -> text without the title."""
    return {d.id: d.text.removeprefix(d.title) for d in dataset.corpus}


def _pairs(dataset: Dataset) -> dict[str, set[tuple[str, str]]]:
    """Return query id -> the words of the query with those of each of its relevant documents."""
    words = {name: normal(text) for name, text in _passages(dataset).items()}
    return {
        query: {(normal(text), words[name]) for name, grade in dataset.qrels[query].items() if grade > 0}
        for query, text in dataset.queries.items()
    }


def _leaked(found: Iterable[tuple[str, bool]]) -> Leaked:
    """Return the report of items, each with whether the training sets have it."""
    items = list(found)
    ids = [name for name, leaked in items if leaked]
    return Leaked(len(ids), len(items), tuple(ids[:_EXAMPLES]))


def _sharing(
    texts: Sequence[tuple[str, str]], known: UInt64[np.ndarray, "n"], vocabulary: Mapping[str, int]
) -> Leaked:
    """Return which texts (id, text) have one of the known n-grams."""
    hashes, owners = _n_grams([text for _, text in texts], dict(vocabulary))
    shares = np.zeros(len(texts), bool)
    shares[owners[np.isin(hashes, known)]] = True
    return _leaked(zip((name for name, _ in texts), shares.tolist(), strict=True))


def _n_grams(
    texts: Sequence[str], vocabulary: dict[str, int]
) -> tuple[UInt64[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Return the hashes of the n-grams of all texts, and the number of the text that each is in.

    Args:
        texts: Any number of them.
        vocabulary: Word -> id; new words are added.
    """
    words, lengths = _WORDS.encode(map(str.casefold, texts), vocabulary)
    owners = np.repeat(np.arange(len(texts)), lengths)
    hashes, starts = n_grams(words, owners, N_GRAM)
    return hashes, owners[starts]
