"""Show each query of a dataset: its text, what each system scored on it, and the documents that each retrieved."""

from collections.abc import Iterator, Mapping
from itertools import islice

from rag.report.leaderboard import Leaderboard
from rag.report.numbers import number, shortened
from rag.report.page import Block, Details, Heading, Paragraph, Table
from rag.report.results import Run
from rag.retrieve.run_file import read_trec_run, trec_eval_order

_MOST = 500  # queries: a page of more would be slow to open
_DEPTH = 10  # documents of each system
_LONGEST = 300  # characters of a query's text


def queries(table: Leaderboard) -> Iterator[Block]:
    """Yield hidden details of each query, those first on which the systems differ most by the main metric."""
    questions = {query: text for run in table.runs for query, text in run.questions.items()}
    if not questions:
        return
    spread = {query: _spread(table, query) for query in questions}
    shown = sorted(questions, key=lambda query: -spread[query])[:_MOST]
    rankings = {run.label: _ranking(run) for run in table.runs}
    yield Heading(3, "Queries")
    first = f" The first {_MOST} of {len(questions)} are shown." if len(questions) > _MOST else ""
    yield Paragraph(
        f"Those first on which {table.measure} differs most between the systems; click one to see it.{first} "
        f"Relevant documents are marked with their grade."
    )
    for query in shown:
        text, relevant = questions[query].text, questions[query].relevant
        rows = [
            [
                table.name(run),
                _score(run, table.measure, query),
                *_documents(rankings[run.label], query, relevant),
            ]
            for run in table.runs
        ]
        known = Paragraph(f"Relevant: {', '.join(f'{name} ({grade})' for name, grade in relevant.items())}")
        header = ["system", table.measure, f"the first {_DEPTH} documents with their scores"]
        yield Details(
            f"{query}: {shortened(text, _LONGEST)} (differs by {spread[query]:.4f})",
            [known, Table(header, rows)],
        )


def _spread(table: Leaderboard, query: str) -> float:
    """Return the difference between the best and the worst value of the main metric."""
    values = [run.per_query.get(table.measure, {}).get(query) for run in table.runs]
    defined = [value for value in values if value is not None]
    return max(defined) - min(defined) if defined else 0.0


def _ranking(run: Run) -> Mapping[str, Mapping[str, float]]:
    path = run.folder / "run.trec"
    return read_trec_run(path) if path.exists() else {}


def _score(run: Run, measure: str, query: str) -> str:
    return number(run.per_query.get(measure, {}).get(query))


def _documents(
    ranking: Mapping[str, Mapping[str, float]], query: str, relevant: Mapping[str, int]
) -> list[str]:
    best = islice(trec_eval_order(ranking.get(query, {})).items(), _DEPTH)
    marks = {name: f" ✓{grade}" for name, grade in relevant.items()}
    return [", ".join(f"{name}{marks.get(name, '')} {score:z.4g}" for name, score in best)]
