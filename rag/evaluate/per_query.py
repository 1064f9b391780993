"""The metrics of every query: of its ranking, of the chunks found for it, and of its answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Int

from rag.evaluate.ablation import ContextAblation, Reply
from rag.evaluate.datasets import Dataset
from rag.evaluate.metrics import ANSWER_METRICS, LIKELIHOOD_METRICS, measure_answer
from rag.evaluate.metrics import retrieval as retrieval_metrics
from rag.evaluate.metrics.answers import JudgedAnswer
from rag.evaluate.metrics.own import OwnMetric, own_answer_row
from rag.evaluate.metrics.retrieval import Run
from rag.evaluate.metrics.spans import DocumentTokens, span_measures
from rag.types import Hit

Row = dict[str, float | None]  # metric -> value; None where the query does not define it


def retrieval_rows(dataset: Dataset, ranking: Run, measures: Sequence[str]) -> dict[str, Row]:
    """Return query id -> metrics of its ranking of documents."""
    _, values = retrieval_metrics.evaluate(dataset.qrels, ranking, measures)
    return {query: dict(row) for query, row in values.items()}


def span_rows(
    dataset: Dataset,
    found: Mapping[str, Sequence[Hit]],
    measures: Sequence[str],
    token_spans: Callable[[str], Int[np.ndarray, "n 2"]],
) -> dict[str, Row]:
    """Return query id -> metrics of the chunks found, of the judged queries with evidence.

    Args:
        dataset: Documents and evidence.
        found: Query id -> hits, best first.
        measures: Names of span metrics.
        token_spans: Returns the character spans of a text's tokens, as an embedder does.
    """
    tokens = DocumentTokens(dataset.corpus, token_spans)
    return {
        query: dict(span_measures(found[query], evidence, tokens, measures))
        for query, evidence in dataset.evidence.items()
        if query in dataset.queries
    }


def reply_metrics(
    dataset: Dataset, reply: Reply, ablation: ContextAblation, own: OwnMetric | None = None
) -> Row:
    """Return the metrics of one answer.

    Args:
        dataset: Gold answers and judgements.
        reply: The answer.
        ablation: The conditions for which the log-likelihood of the gold answer is a metric.
        own: A metric of the user's own.
    """
    judged = dataset.qrels.get(reply.query, {})
    answer = JudgedAnswer(
        answer=reply.answer,
        gold=dataset.answers.get(reply.query, ()),
        abstained=reply.abstained,
        answerable=reply.query not in dataset.unanswerable,
        cited=reply.cited,
        relevant=tuple(name for name, grade in judged.items() if grade > 0),
        log_likelihood=reply.log_likelihood,
    )
    scored = reply.condition in ablation.likelihood
    row = measure_answer(answer, ANSWER_METRICS + LIKELIHOOD_METRICS if scored else ANSWER_METRICS)
    return row | (own_answer_row(own, answer) if own else {})


def answer_rows(replies: Sequence[Reply], metrics: Sequence[Row]) -> dict[str, Row]:
    """Return query id -> metrics of its answers, named with their condition as in "oracle/F1"."""
    rows: dict[str, Row] = {}
    for reply, values in zip(replies, metrics, strict=True):
        named = {f"{reply.condition}/{name}": value for name, value in values.items()}
        rows.setdefault(reply.query, {}).update(named)
    return rows


def joined(*tables: Mapping[str, Row]) -> dict[str, Row]:
    """Return the rows of all tables side by side, with the same metrics in each row; queries in the order met."""
    rows: dict[str, Row] = {}
    for table in tables:
        for query, row in table.items():
            rows[query] = rows.get(query, {}) | row
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return {query: {name: row.get(name) for name in names} for query, row in rows.items()}


def reply_record(dataset: Dataset, reply: Reply, metrics: Row) -> dict[str, Any]:
    """Return a line of answers.jsonl: the reply, its question and gold answers, and its metrics."""
    gold = dataset.answers.get(reply.query, ())
    return asdict(reply) | {"question": dataset.question(reply.query), "gold": gold} | metrics
