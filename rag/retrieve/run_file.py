"""Retrieve what a TREC run file ranks for a dataset's queries: the output of Pyserini, PyTerrier or another tool.

    q1 Q0 doc7 1 14.25 bm25        query id, Q0, document id, rank, score, tag

A run can so be evaluated, compared, reranked, fused and read like any other method.
"""

import gzip
import zlib
from collections.abc import Collection as Group
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rag.retrieve.collection import Collection, dataclasses_in
from rag.runtime.cache.keys import content_key
from rag.runtime.options import Filled, checked
from rag.types import Hit, UserError

LARGEST_SCORE = (
    3.4e38  # trec_eval holds scores in float32; between this and its least number there is room for ties
)
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RunFile:
    """Find for each query of a dataset the documents that a run lists for it.

    Documents are ordered as trec_eval does: by score in float32, of equal scores the higher id first; the ranks in the
    file are ignored. Scores that are equal are lowered by the least amount that keeps this order. A document of several
    chunks is given as all of its chunks, in their order in the document. Documents that are not in the collection are
    left out; `problems` counts them, and the queries that the run does not have.

    Attributes:
        key: The hash of the rankings, which stands for them in cache keys.
    """

    key: str
    run: InitVar[Mapping[str, Mapping[str, float]]]  # query id -> document id -> score

    depends_on: ClassVar[tuple[str, ...]] = ("queries",)

    def __post_init__(self, run: Mapping[str, Mapping[str, float]]) -> None:
        object.__setattr__(self, "_run", run)

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        """Return at most k hits for each question. Raises UserError for a question that is no query of a dataset."""
        run: Mapping[str, Mapping[str, float]] = vars(self)["_run"]
        query_ids, results = collection.query_ids, []
        for question in questions:
            scores = _scores_of(question, query_ids, run)
            ranking = trec_eval_order(
                {name: score for name, score in scores.items() if collection.has_document(name)}
            )
            hits = (
                hit
                for name, score in ranking.items()
                for rows in [collection.rows_of([name])]
                for hit in collection.hits(rows, [score] * len(rows))
            )
            results.append(list(islice(hits, k)))
        return results

    def problems(self, queries: Iterable[str], document_ids: Group[str]) -> list[str]:
        """Return sentences that count what the corpus and the run do not have of each other.

        Args:
            queries: The ids of the judged queries; the run may leave out others.
            document_ids: The ids of the corpus.
        """
        run: Mapping[str, Mapping[str, float]] = vars(self)["_run"]
        listed = {query: run.get(query, {}) for query in queries}
        unknown = {name for scores in listed.values() for name in scores if name not in document_ids}
        absent = [query for query, scores in listed.items() if not scores]
        found = []
        if unknown:
            found.append(
                f"{len(unknown)} documents of the run are not in the corpus, such as {min(unknown)!r}."
            )
        if absent:
            found.append(
                f"{len(absent)} of {len(listed)} queries are not in the run, such as {min(absent)!r}."
            )
        return found


def run_problems(method: Any, queries: Iterable[str], document_ids: Iterable[str]) -> list[str]:
    """Return the `problems` of all run files in a retrieval method, each once."""
    runs = [stage for stage in dataclasses_in(method) if isinstance(stage, RunFile)]
    queries, known = list(queries), set(document_ids) if runs else set()
    return list(dict.fromkeys(problem for run in runs for problem in run.problems(queries, known)))


def _scores_of(
    question: str, query_ids: Mapping[str, Sequence[str]], run: Mapping[str, Mapping[str, float]]
) -> Mapping[str, float]:
    """Return document id -> score of the query with this text."""
    if question not in query_ids:
        raise UserError(
            f"retriever=run knows only the queries of a dataset, and {question!r} is none of them: use scripts/eval.py "
            "without a transform."
        )
    first, *others = query_ids[question]
    scores = run.get(first, {})
    for other in others:
        if run.get(other, {}) != scores:
            raise UserError(
                f"The queries {first!r} and {other!r} have the same text, and the run ranks other documents for each: "
                "remove one of them from the dataset."
            )
    return scores


def trec_eval_order(scores: Mapping[str, float]) -> dict[str, float]:
    """Return document id -> score in the order of trec_eval; the scores strictly decrease in float32."""
    ranking = sorted(scores, key=lambda name: (np.float32(scores[name]), name), reverse=True)
    return strictly_decreasing(ranking, scores)


def strictly_decreasing(ranking: Iterable[str], scores: Mapping[str, float]) -> dict[str, float]:
    """Return document id -> score in the order of the ranking; the scores strictly decrease in float32.

    A score stays where it can (rounded to float32) and is otherwise set just below the one before it. Raises
    ValueError for a score that float32 has not, and below its lowest number.
    """
    found: dict[str, float] = {}
    previous = np.float32(np.inf)
    for name in ranking:
        if not abs(scores[name]) <= _LARGEST_FLOAT32 or previous <= -_LARGEST_FLOAT32:
            raise ValueError(f"the score {scores[name]} of {name!r} cannot be ranked in float32")
        previous = min(np.float32(scores[name]), np.nextafter(previous, np.float32(-np.inf)))
        found[name] = float(previous)
    return found


@checked
def load_run(path: Filled | Path) -> RunFile:
    """Return the retriever of a run file. Raises UserError as `read_trec_run` does, and for a file without lines."""
    file = Path(path).expanduser()
    run = read_trec_run(file)
    if not run:
        raise UserError(f"The run {file} is empty: give a TREC run file.")
    return RunFile(content_key("run", run), run)  # not of the file's bytes: a pipe can be read only once


def read_trec_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a TREC run file, with tabs (ids may hold spaces) or any white space between the six fields of a line.

    The ranks in the file are ignored, as in trec_eval. A file whose name ends in .gz is unpacked.

    Raises:
        UserError: that names the line that is wrong.
    """
    run: dict[str, dict[str, float]] = {}
    try:
        open_file = gzip.open if str(path).endswith(".gz") else open
        with open_file(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for line, content in enumerate(file, 1):
                if content.strip():
                    query, document, score = _run_line(path, line, content.rstrip("\r\n"))
                    if document in run.setdefault(query, {}):
                        raise UserError(
                            f'{path}, line {line} repeats "{document}" for "{query}": remove one.'
                        )
                    run[query][document] = score
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"The run {path} cannot be read ({error}): give a TREC run file.") from error
    return run


def _run_line(path: str | Path, line: int, content: str) -> tuple[str, str, float]:
    fields = content.split("\t")
    if len(fields) != 6:
        fields = content.split()
    try:
        query, _, document, _, score, _ = fields
        if abs(float(score)) <= LARGEST_SCORE:
            return query, document, float(score)
    except ValueError:
        pass
    raise UserError(
        f"{path}, line {line} is not: query, Q0, document, rank, score from -{LARGEST_SCORE:g} to {LARGEST_SCORE:g}, "
        "tag: correct it."
    )
