"""Retrieval metrics that do not depend on how a tool breaks ties, and runs as TREC files.

The tools disagree: trec_eval compares scores in float32 and puts the higher document id first among equal scores,
others the lower; pytrec_eval leaves queries without results out of the mean. Here a run is first made
canonical: sorted by (score descending, document id ascending), with scores that strictly decrease in float32,
so that every tool sees the same ranking. A judged query without results counts as 0.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ir_measures
import numpy as np
from ir_measures import Measure
from ir_measures.providers import FallbackProvider

from rag.evaluate.metrics import find
from rag.types import UserError

DEFAULT_MEASURES = ("nDCG@10", "Recall@100", "MRR@10", "MAP")

_NAME = re.compile(r"([a-z]+)(?:@([1-9][0-9]*))?", re.IGNORECASE)
# Named, because the default choice depends on what else is installed. pytrec_eval has no RR with a cut-off.
_PROVIDER = FallbackProvider([ir_measures.pytrec_eval, ir_measures.msmarco])
_LARGEST = float(np.finfo(np.float32).max)

Qrels = Mapping[str, Mapping[str, int]]  # query id -> document id -> grade; 0 or less is not relevant
Run = Mapping[str, Mapping[str, float]]  # query id -> document id -> score; higher is better


def evaluate(
    qrels: Qrels, run: Run, measures: Sequence[str] = DEFAULT_MEASURES
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Compute the metrics of a run. As in trec_eval gains are the grades, discounts log2, and 1 or more is relevant.

    Args:
        qrels: The judgements.
        run: The documents found for each query, with their scores.
        measures: Names in any case: nDCG, MAP (AP) and MRR (RR), each with or without @k; Recall@k (R),
            Precision@k (P), Success@k; Rprec.

    Returns:
        (name -> mean over the judged queries, query id -> name -> value), under the names given.

    Raises:
        UserError: for an unknown name or empty qrels.
        ValueError: for a score that is not finite in float32.
    """
    if not qrels:
        raise UserError("There are no relevance judgements: check the dataset's qrels and split.")
    parsed = {name: _measure(name) for name in measures}
    found = {query: canonical_scores(run[query]) for query in qrels if run.get(query)}
    grades = {q: {d: max(grade, 0) for d, grade in judged.items()} for q, judged in qrels.items()}
    values = {measure: dict.fromkeys(qrels, 0.0) for measure in parsed.values()}
    for result in _PROVIDER.iter_calc(list(values), grades, found):
        values[result.measure][result.query_id] = float(result.value)
    means = {name: math.fsum(values[measure].values()) / len(qrels) for name, measure in parsed.items()}
    return means, {q: {name: values[measure][q] for name, measure in parsed.items()} for q in qrels}


def canonical_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Return document id -> score, best first, ties to the lower id; the scores strictly decrease in float32.

    A score stays where it can (rounded to float32) and is otherwise set just below the one before it.
    """
    canonical: dict[str, float] = {}
    previous = np.float32(np.inf)
    for document in sorted(scores, key=lambda d: (-scores[d], d)):
        score = scores[document]
        if not abs(score) <= _LARGEST or previous <= -_LARGEST:
            raise ValueError(f"the score {score} of {document!r} cannot be ranked in float32")
        previous = min(np.float32(score), np.nextafter(previous, np.float32(-np.inf)))
        canonical[document] = float(previous)
    return canonical


def _measure(name: str) -> Measure:
    match = _NAME.fullmatch(name)
    if match and (metric := find(match[1], "qrels")):
        cutoff = metric.function.SUPPORTED_PARAMS.get("cutoff")  # None: takes none
        if match[2] and cutoff:
            return metric.function @ int(match[2])
        if not match[2] and not (cutoff and cutoff.required):
            return metric.function
    examples = ", ".join((*DEFAULT_MEASURES, "Precision@5", "Success@1"))
    raise UserError(f'There is no measure "{name}": choose from such as {examples}.')


def check(measures: Sequence[str]) -> None:
    """Raise UserError for the first of the names that is not a retrieval metric."""
    for name in measures:
        _measure(name)


def trec_lines(run: Run, tag: str = "rag") -> Iterator[str]:
    """Yield the lines of a TREC run file: query, Q0, document, rank from 1, score, tag, separated by tabs.

    The scores are canonical, so trec_eval gives the figures of `evaluate`. Tabs let document ids hold spaces,
    as file names do (tools that split at spaces misread those).

    Raises:
        UserError: for an id with a tab or line break.
    """
    for query, scores in run.items():
        for rank, (document, score) in enumerate(canonical_scores(scores).items(), 1):
            if any(sign in name for name in (query, document, tag) for sign in "\t\n\r"):
                raise UserError(f"The id {document!r} or {query!r} has a tab or line break: rename it.")
            yield f"{query}\tQ0\t{document}\t{rank}\t{score:.9g}\t{tag}\n"


def read_trec_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a TREC run file, with tabs (ids may hold spaces) or any white space between the six fields.

    The ranks in the file are ignored, as in trec_eval.

    Raises:
        UserError: that names the line that is wrong.
    """
    run: dict[str, dict[str, float]] = {}
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for line, content in enumerate(file, 1):
                if content.strip():
                    query, document, score = _run_line(path, line, content.rstrip("\r\n"))
                    if document in run.setdefault(query, {}):
                        raise UserError(
                            f'{path}, line {line} repeats "{document}" for "{query}": remove one.'
                        )
                    run[query][document] = score
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The run {path} cannot be read ({error}): give a TREC run file.") from error
    return run


def _run_line(path: str | Path, line: int, content: str) -> tuple[str, str, float]:
    fields = content.split("\t") if "\t" in content else content.split()
    try:
        query, _, document, _, score, _ = fields
        if abs(float(score)) <= _LARGEST:
            return query, document, float(score)
    except ValueError:
        pass
    raise UserError(f"{path}, line {line} is not: query, Q0, document, rank, finite score, tag: correct it.")
