"""Measures of one answer: beside the gold answers, by its citations, and whether it should have been given.

Texts are compared as SQuAD's script does (Rajpurkar et al. 2016): lower-cased, without ASCII punctuation and the
articles a, an, the, white space made one space; the best of several gold answers counts. Citation marks such as
[1] or [1, 3] are no words of an answer and are taken out first, which SQuAD's script does not know about. An
answer that abstains counts as an empty text, whatever its sentence says.

Declining to answer has two rates, which one figure would hide (a system that answers everything is right on every
answerable question): "abstention recall", the share of the unanswerable questions that were declined, and "false
abstention", the share of the answerable ones that were, for which lower is better. The terms are those of the survey by
Wen et al. 2025 (arXiv:2407.18418), where false abstention is also called over-abstention; 1 less it is the coverage of
selective answering (Kamath et al. 2020, arXiv:2006.09462).

A measure is None where a question does not define it: without gold answers, citations or relevant documents, and of the
two rates the one that is about the other kind of question.
"""

import re
import string
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

from rag.types import UserError

MEASURES = (
    *("EM", "F1", "contains", "ROUGE-L", "citation precision", "citation recall"),
    *("abstention recall", "false abstention"),
)
LOWER_IS_BETTER = frozenset({"false abstention"})

_CITATION = re.compile(r"\[\s*\d{1,4}(?:\s*[,;]\s*\d{1,4})*\s*\]")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_WORD = re.compile(r"[^\W_]+")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def measure(
    *,
    answer: str,
    gold: Sequence[str],
    abstained: bool,
    answerable: bool,
    cited: Collection[str],
    relevant: Collection[str],
) -> dict[str, float | None]:
    """Measure name (MEASURES) -> value from 0 to 1, or None where this question does not define it.

    EM, F1, contains and ROUGE-L: see the functions; None without gold answers. `cited` and `relevant` are ids
    of documents: those that the answer marks, and those that the judgements give 1 or more. Citation precision
    is the relevant share of the cited, None when nothing is cited; citation recall the cited share of the
    relevant, None when nothing is relevant. Both rates of abstention are 1 where the question was declined, else 0:
    "abstention recall" of an unanswerable question, "false abstention" of an answerable one; the other is None.
    Raises UserError for an unanswerable question with gold answers.
    """
    if gold and not answerable:
        raise UserError(f"A question without an answer has the gold answer {gold[0]!r}: correct the dataset.")
    text = "" if abstained else _CITATION.sub(" ", answer)
    compared = {"EM": exact_match, "F1": f1, "contains": contains, "ROUGE-L": rouge_l}
    scores = {name: max((score(text, one) for one in gold), default=None) for name, score in compared.items()}
    hits = len(set(cited) & set(relevant))
    return scores | {
        "citation precision": hits / len(set(cited)) if cited else None,
        "citation recall": hits / len(set(relevant)) if relevant else None,
        "abstention recall": None if answerable else float(abstained),
        "false abstention": float(abstained) if answerable else None,
    }


def lower_is_better(measure: str) -> bool:
    """Whether less of a measure is better, which may stand behind a condition ("retrieved/false abstention")."""
    return measure.rpartition("/")[2] in LOWER_IS_BETTER


def normalized(text: str) -> str:
    """SQuAD's normalisation. Other than ASCII punctuation stays: "l’été" is one word, "été" not "ete"."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """1 where the normalised texts are equal."""
    return float(normalized(answer) == normalized(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, each counted as often as it stands in both.

    Where either text normalises to nothing it is 1 if both do, as in SQuAD 2.0's script, and so never below
    the exact match.
    """
    ours, theirs = normalized(answer).split(), normalized(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def contains(answer: str, gold: str) -> float:
    """1 where the gold answer's words stand in the answer as whole words, in order, with none between.

    So "art" is not in "party". A gold answer that normalises to nothing is in no answer.
    """
    words = normalized(gold)
    return float(bool(words) and f" {words} " in f" {normalized(answer)} ")


def rouge_l(answer: str, gold: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), by the rouge_score library, unstemmed.

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
