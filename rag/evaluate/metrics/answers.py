"""Metrics of one answer: against the gold answers, of its citations, and whether it should have been given.

Texts are compared as SQuAD's script does (Rajpurkar et al. 2016): lower-cased, without ASCII punctuation and the
articles a, an, the, and with single spaces; the best of several gold answers counts. Citation marks such as [1] or
[1, 3] are not words of an answer and are removed first, which SQuAD's script does not do. An answer that abstains
counts as an empty text, whatever its sentence says.

Declining to answer has two rates, which one figure would hide (a system that answers everything is right on every
answerable question): "abstention recall", the share of the unanswerable questions that were declined, and "false
abstention", the share of the answerable ones that were, for which lower is better. The terms are those of the survey by
Wen et al. 2025 (arXiv:2407.18418), where false abstention is also called over-abstention; 1 less it is the coverage of
selective answering (Kamath et al. 2020, arXiv:2006.09462).

The functions of a JudgedAnswer return None where its question does not define the metric.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from rag.types import UserError

_CITATION = re.compile(r"\[\s*\d{1,4}(?:\s*[,;]\s*\d{1,4})*\s*\]")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_WORD = re.compile(r"[^\W_]+")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer with all that metrics compare it with.

    Attributes:
        answer: The text as generated.
        gold: The accepted answers; none where the dataset has none.
        abstained: Whether the system declined to answer.
        answerable: Whether the corpus holds an answer.
        cited: Ids of the documents that the answer cites.
        relevant: Ids of the documents with a grade of 1 or more.
        log_likelihood: Natural logarithm of the probability of the first gold answer; None where not computed.

    Raises:
        UserError: for an unanswerable question with gold answers.
    """

    answer: str
    gold: Sequence[str] = ()
    abstained: bool = False
    answerable: bool = True
    cited: Collection[str] = ()
    relevant: Collection[str] = ()
    log_likelihood: float | None = None

    def __post_init__(self) -> None:
        if self.gold and not self.answerable:
            raise UserError(
                f"A question without an answer has the gold answer {self.gold[0]!r}: correct the dataset."
            )

    @cached_property
    def text(self) -> str:
        """The text that is compared with gold answers: without citation marks, and empty for an abstention."""
        return "" if self.abstained else _CITATION.sub(" ", self.answer)

    @cached_property
    def relevant_cited(self) -> int:
        """The number of relevant documents that are cited."""
        return len(set(self.cited) & set(self.relevant))


def best_over_gold(compare: Callable[[str, str], float]) -> Callable[[JudgedAnswer], float | None]:
    """Return a metric that takes the best value of `compare` (answer, gold answer) over the gold answers."""
    return lambda answer: max((compare(answer.text, gold) for gold in answer.gold), default=None)


def citation_precision(answer: JudgedAnswer) -> float | None:
    """Return the share of the cited documents that are relevant."""
    return answer.relevant_cited / len(set(answer.cited)) if answer.cited else None


def citation_recall(answer: JudgedAnswer) -> float | None:
    """Return the share of the relevant documents that are cited."""
    return answer.relevant_cited / len(set(answer.relevant)) if answer.relevant else None


def abstention_recall(answer: JudgedAnswer) -> float | None:
    """Return 1 for an unanswerable question that was declined, 0 for one that was answered."""
    return None if answer.answerable else float(answer.abstained)


def false_abstention(answer: JudgedAnswer) -> float | None:
    """Return 1 for an answerable question that was declined, 0 for one that was answered."""
    return float(answer.abstained) if answer.answerable else None


def gold_log_likelihood(answer: JudgedAnswer) -> float | None:
    """Return the log-likelihood of the first gold answer."""
    return answer.log_likelihood


def normalized(text: str) -> str:
    """Apply SQuAD's normalisation. Punctuation beyond ASCII stays: "l’été" is one word, and "été" is not "ete"."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """Return 1 where the normalised texts are equal, else 0."""
    return float(normalized(answer) == normalized(gold))


def f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall of the words, each counted as often as it is in both.

    Where either text normalises to nothing it is 1 if both do, as in SQuAD 2.0's script, and so never below
    the exact match.
    """
    ours, theirs = normalized(answer).split(), normalized(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def contains(answer: str, gold: str) -> float:
    """Return 1 where the gold answer's words are in the answer as whole words, in order, with none between.

    So "art" is not in "party". A gold answer that normalises to nothing is in no answer.
    """
    words = normalized(gold)
    return float(bool(words) and f" {words} " in f" {normalized(answer)} ")


def rouge_l(answer: str, gold: str) -> float:
    """Return the F-measure of the longest common subsequence of words (Lin 2004), by rouge_score, unstemmed.

    Words are runs of letters and digits of any script; the library's own tokenizer knows only ASCII.
    """
    return float(_rouge().score(gold, answer)["rougeL"].fmeasure)


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


@cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer  # brings nltk, which takes seconds: only where answers are measured

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())
