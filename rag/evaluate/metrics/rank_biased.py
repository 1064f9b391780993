"""Rank-biased precision, for ir_measures, whose own provider knows neither a cut-off nor a default threshold."""

from collections.abc import Iterable, Iterator

import ir_measures
from ir_measures.measures import Measure
from ir_measures.providers import Evaluator, Provider
from ir_measures.providers.base import Any as AnyValue
from ir_measures.util import QrelsConverter, RunConverter


class RankBiasedPrecision(Provider):
    """Compute RBP (Moffat and Zobel 2008): (1 - p) times the sum of p ** (rank - 1) over the relevant documents.

    A document of grade `rel` or more is relevant, by default of grade 1 or more; p is the probability that a user looks
    at the next document. A rank after the cut-off adds nothing.
    """

    NAME = "rank_biased"
    SUPPORTED_MEASURES = [ir_measures.RBP(p=AnyValue(), rel=AnyValue(), cutoff=AnyValue())]  # noqa: RUF012

    def supports(self, measure: Measure) -> bool:
        return super().supports(measure) and 0 < measure["p"] < 1

    def _evaluator(self, measures: Iterable[Measure], qrels: object) -> "RankBiasedEvaluator":
        return RankBiasedEvaluator(measures, QrelsConverter(qrels).as_dict_of_dict())


class RankBiasedEvaluator(Evaluator):
    """The measures of one set of judgements."""

    def __init__(self, measures: Iterable[Measure], qrels: dict[str, dict[str, int]]):
        super().__init__(measures, set(qrels))
        self.qrels = qrels

    def _iter_calc(self, run: object) -> Iterator[ir_measures.Metric]:
        for query, scores in RunConverter(run).as_dict_of_dict().items():
            judged = self.qrels.get(query, {})
            ranking = sorted(scores, key=lambda document: (-scores[document], document))
            for measure in self.measures:
                p, rel, cutoff = measure["p"], measure.params.get("rel", 1), measure.params.get("cutoff")
                seen = (
                    p**rank
                    for rank, document in enumerate(ranking[:cutoff])
                    if judged.get(document, 0) >= rel
                )
                yield ir_measures.Metric(query, measure, (1 - p) * sum(seen))
