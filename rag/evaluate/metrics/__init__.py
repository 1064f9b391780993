"""The table of all metrics: what each is called, what it needs, its function and its best value.

A new metric is one function and one row of METRICS. All that computes, tunes or reports metrics reads this table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ir_measures

from rag.evaluate.metrics import answers, gains, overlap
from rag.evaluate.metrics.answers import JudgedAnswer, best_over_gold
from rag.evaluate.metrics.gains import Gain

Needs = Literal[
    "qrels",  # relevance judgements: a metric of ranked documents
    "evidence",  # spans of documents: a metric of ranked chunks
    "gold answers",
    "citations",  # marks in the answer that cite a document
    "relevant documents",
    "an unanswerable question",
    "an answerable question",
    "log-likelihood",
]


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Attributes:
        name: The name without a cut-off: "nDCG" stands for nDCG@10, "CharRecall" for CharRecall@5 and CharRecall@512t.
        needs: What a query must have. Without it the metric is not defined there.
        function: For "qrels" the measure of ir_measures; for "evidence" a function of an Overlap; for the others a
            function of a JudgedAnswer that returns None where the metric is not defined.
        best: The value of a perfect system.
        lower_is_better: Whether a smaller value is the better one.
        aliases: Other names, in lower case.
        gain: The metric for compiled programs; None for one that cannot be tuned for.
    """

    name: str
    needs: Needs
    function: Any
    best: float = 1.0
    lower_is_better: bool = False
    aliases: tuple[str, ...] = ()
    gain: Gain | None = None


METRICS = (
    Metric("nDCG", "qrels", ir_measures.nDCG, gain=gains.NDCG),
    Metric("MRR", "qrels", ir_measures.RR, aliases=("rr",), gain=gains.RECIPROCAL_RANK),
    Metric("Recall", "qrels", ir_measures.R, aliases=("r",), gain=gains.RECALL),
    Metric("Precision", "qrels", ir_measures.P, aliases=("p",), gain=gains.PRECISION),
    Metric("Success", "qrels", ir_measures.Success, gain=gains.SUCCESS),
    Metric("MAP", "qrels", ir_measures.AP, aliases=("ap",)),
    Metric("Rprec", "qrels", ir_measures.Rprec),
    Metric("CharRecall", "evidence", overlap.recall),
    Metric("CharPrecision", "evidence", overlap.precision),
    Metric("CharIoU", "evidence", overlap.iou),
    Metric("TokenRecall", "evidence", overlap.recall),
    Metric("TokenPrecision", "evidence", overlap.precision),
    Metric("TokenIoU", "evidence", overlap.iou),
    Metric("EM", "gold answers", best_over_gold(answers.exact_match)),
    Metric("F1", "gold answers", best_over_gold(answers.f1)),
    Metric("contains", "gold answers", best_over_gold(answers.contains)),
    Metric("ROUGE-L", "gold answers", best_over_gold(answers.rouge_l)),
    Metric("citation precision", "citations", answers.citation_precision),
    Metric("citation recall", "relevant documents", answers.citation_recall),
    Metric("abstention recall", "an unanswerable question", answers.abstention_recall),
    Metric(
        "false abstention",
        "an answerable question",
        answers.false_abstention,
        best=0.0,
        lower_is_better=True,
    ),
    Metric("gold log-likelihood", "log-likelihood", answers.gold_log_likelihood, best=0.0),
)


def names_of(*needs: Needs) -> tuple[str, ...]:
    """Return the names of the metrics that need one of `needs`, in the order of the table."""
    return tuple(metric.name for metric in METRICS if metric.needs in needs)


# Keys of metrics.json and per_query.jsonl beside the metrics: no metric has such a name.
RESERVED_KEYS = frozenset(
    {"label", "key", "dataset", "means", "intervals", "statistics", "warnings", "query"}
)
GOLD_METRICS = names_of("gold answers")
ANSWER_METRICS = names_of(
    *("gold answers", "citations", "relevant documents", "an unanswerable question", "an answerable question")
)
LIKELIHOOD_METRICS = names_of("log-likelihood")


def find(name: str, *needs: Needs) -> Metric | None:
    """Return the metric of a name or alias, in upper or lower case, among those that need one of `needs`, or None."""
    wanted = name.lower()
    return next(
        (m for m in METRICS if m.needs in needs and wanted in (m.name.lower(), *m.aliases)),
        None,
    )


def lower_is_better(name: str) -> bool:
    """Return whether a smaller value of a metric is better; a condition may precede its name ("oracle/F1")."""
    plain = name.rpartition("/")[2]
    return any(metric.lower_is_better for metric in METRICS if metric.name == plain)


def measure_answer(answer: JudgedAnswer, names: Sequence[str] = ANSWER_METRICS) -> dict[str, float | None]:
    """Return metric name -> value of one answer, or None where the question does not define the metric."""
    return {metric.name: metric.function(answer) for metric in METRICS if metric.name in names}
