"""Retrieval metrics that do not depend on how a tool breaks ties, and runs as TREC files.

The tools disagree: trec_eval compares scores in float32 and puts the higher document id first among equal scores,
others the lower; pytrec_eval leaves queries without results out of the mean. Here a run is first made
canonical: sorted by (score descending, document id ascending), with scores that strictly decrease in float32,
so that every tool sees the same ranking. A judged query without results counts as 0.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import ir_measures
from ir_measures import Measure
from ir_measures.providers import FallbackProvider

from rag.evaluate.metrics import METRICS, find
from rag.evaluate.metrics.rank_biased import RankBiasedPrecision
from rag.retrieve.run_file import strictly_decreasing
from rag.types import UserError

DEFAULT_MEASURES = ("nDCG@10", "Recall@100", "MRR@10", "MAP")

_NAME = re.compile(r"([a-z]+)(?:@([1-9][0-9]*))?", re.IGNORECASE)
# Named, because the default choice depends on what else is installed; the first that supports a measure computes it.
# All measures of our own table are computed by the first two: pytrec_eval has no RR with a cut-off.
_PROVIDER = FallbackProvider(
    [
        *(ir_measures.pytrec_eval, ir_measures.msmarco, RankBiasedPrecision(), ir_measures.judged),
        *(ir_measures.compat, ir_measures.accuracy, ir_measures.cwl_eval),
    ]
)
_LARGEST = 2**31 - 1  # of a cut-off and of a grade: the packages count in 32 bits
_OTHER_NAMES = {name.lower(): name for name in ir_measures.measures.registry}

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
            Precision@k (P), Success@k; Rprec; and what ir_measures names, such as RBP(p=0.8)@10 or P(rel=2)@5.

    Returns:
        (name -> mean over the judged queries, query id -> name -> value), under the names given.

    Raises:
        UserError: for an unknown name, a measure that no installed package computes, or empty qrels.
        ValueError: for a score that is not finite in float32.
    """
    if not qrels:
        raise UserError("There are no relevance judgements: check the dataset's qrels and split.")
    parsed = {name: _measure(name) for name in measures}
    found = {query: canonical_scores(run[query]) for query in qrels if run.get(query)}
    grades = {q: {d: max(grade, 0) for d, grade in judged.items()} for q, judged in qrels.items()}
    values = {measure: dict.fromkeys(qrels, 0.0) for measure in parsed.values()}
    for result in _PROVIDER.iter_calc(list(values), grades, found) if values else ():
        values[result.measure][result.query_id] = float(result.value)
    means = {name: math.fsum(values[measure].values()) / len(qrels) for name, measure in parsed.items()}
    return means, {q: {name: values[measure][q] for name, measure in parsed.items()} for q in qrels}


def canonical_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Return document id -> score, best first, ties to the lower id; the scores strictly decrease in float32.

    Raises ValueError as `strictly_decreasing` does.
    """
    return strictly_decreasing(sorted(scores, key=lambda d: (-scores[d], d)), scores)


def _measure(name: str) -> Measure:
    """Return the measure of a name. Raises UserError for one that nothing computes, and for numbers out of range."""
    if (cutoff := re.search(r"@0*([0-9]+)$", name)) and (
        len(cutoff[1]) > len(str(_LARGEST)) or int(cutoff[1]) > _LARGEST
    ):
        raise UserError(f"The cut-off of {name[:60]!r} is too large: give one of at most {_LARGEST}.")
    match = _NAME.fullmatch(name)
    if match and (metric := find(match[1], "qrels")):
        cutoff = metric.function.SUPPORTED_PARAMS.get("cutoff")  # None: takes none
        if match[2] and cutoff:
            return metric.function @ int(match[2])
        if not match[2] and not (cutoff and cutoff.required):
            return metric.function
    if (measure := _other_measure(name)) is not None:
        return measure
    named = [metric.name for metric in METRICS if metric.needs == "qrels"]
    base = re.split("[(@]", name)[0]
    near = difflib.get_close_matches(base, [*named, *_OTHER_NAMES.values()], n=1)
    hint = f" (did you mean {near[0]}?)" if near and near[0] != base else ""
    examples = ", ".join((*DEFAULT_MEASURES, "Precision@5", "Success@1", "RBP(p=0.8)@10"))
    raise UserError(f'There is no measure "{name}"{hint}: choose from such as {examples}.')


def _other_measure(name: str) -> Measure | None:
    """Return the measure that ir_measures knows by a name, or None. Raises UserError where no package computes it."""
    known = _OTHER_NAMES.get(re.split("[(@]", name)[0].lower())
    if known is None:
        return None
    try:
        measure = ir_measures.parse_measure(known + name[len(known) :])
        measure.validate_params()
    except (ValueError, TypeError, KeyError, AssertionError):  # how the library reports a wrong parameter
        return None
    if measure.params.get("cutoff", 1) < 1:
        return None
    if not 1 <= measure.params.get("rel", 1) <= _LARGEST:
        raise UserError(
            f'The measure "{name[:60]}" has a grade rel out of range: give one from 1, since a document without a '
            f"judgement has grade 0, to {_LARGEST}."
        )
    if not _PROVIDER.supports(measure):
        able = [one for one in _PROVIDER.providers if one.supports(measure)]
        remedy = f": {able[0].install_instructions()}" if able else _possible(measure)
        raise UserError(f'No installed package computes the measure "{name}"{remedy}')
    return measure


def cutoff_of(name: str) -> int:
    """Return the rank at which a retrieval metric is cut off, 0 for none. Raises UserError for an unknown name."""
    return _measure(name).params.get("cutoff") or 0


def is_measure(name: str) -> bool:
    """Return whether a name is that of a retrieval metric that can be computed."""
    try:
        _measure(name)
    except UserError:
        return False
    return True


def _possible(measure: Measure) -> str:
    """Return the end of a sentence: the parameters with which a measure is computed, or which measures are."""
    computed = [one for provider in _PROVIDER.providers for one in provider.SUPPORTED_MEASURES]
    if forms := [str(one) for one in computed if one.NAME == measure.NAME]:
        return f" with these parameters: choose {' or '.join(dict.fromkeys(forms))}."
    names = (text for one in computed for text in (one.NAME, f"{one.NAME}@10"))
    return f": choose one of {', '.join(sorted(filter(is_measure, set(names))))}."


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
