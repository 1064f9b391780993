"""Datasets of the ir_datasets package."""

import importlib
from collections.abc import Iterable
from typing import Any

from rag.evaluate.datasets import Dataset, Judgement, assemble
from rag.evaluate.datasets.questions import Question, named
from rag.runtime.options import Count, Filled, Seed
from rag.types import Document, UserError

# --- ir_datasets


def load_ir_datasets(
    id: Filled, *, strict: bool = True, limit: Count | None = None, seed: Seed = 0
) -> Dataset:
    """Load a set by its id in the ir_datasets catalogue (MacAvaney et al. 2021), such as "beir/scifact/test".

    The library is not required otherwise; it downloads the set on first use. A document's and a query's text is
    what the library holds for it (default_text). Raises UserError without the library or a connection, and for
    an id that is unknown or lacks documents, queries or judgements.
    """
    what = f"The ir_datasets set {id}"
    source = _ir_dataset(id)
    parts = ("docs", "queries", "qrels")
    if missing := [part for part in parts if not getattr(source, f"has_{part}")()]:
        raise UserError(
            f"{what} has no {' and no '.join(missing)}: choose an id that has {', '.join(parts)}."
        )
    try:
        corpus = [
            Document(doc.doc_id, doc.doc_id, doc.default_text().strip(), getattr(doc, "title", "") or "")
            for doc in source.docs_iter()
        ]
        questions = [Question(query.query_id, query.default_text()) for query in source.queries_iter()]
        judgements = [
            Judgement(f"judgement {number}", row.query_id, row.doc_id, row.relevance)
            for number, row in enumerate(source.qrels_iter(), 1)
        ]
    except (OSError, RuntimeError) as error:  # what its downloads raise
        raise UserError(f"{what} cannot be fetched ({error}): go online, or choose another set.") from error
    _check_once((document.id for document in corpus), f"{what} repeats the document")
    _check_once((question.id for question in questions), f"{what} repeats the query")
    return assemble(id, corpus, questions, judgements, what, what, strict, []).sample(limit, seed)


def _ir_dataset(id: str) -> Any:
    try:
        return importlib.import_module("ir_datasets").load(id)
    except ImportError as error:
        raise UserError(
            f"dataset.id={id} needs the library ir_datasets ({error}): install it with pip install ir_datasets."
        ) from error
    except KeyError as error:
        raise UserError(f"ir_datasets knows no set {id}: choose an id of https://ir-datasets.com.") from error


def _check_once(ids: Iterable[str], fault: str) -> None:
    seen: set[str] = set()
    repeated = [f'"{id}"' for id in ids if id in seen or seen.add(id)]
    if repeated:
        raise UserError(f"{fault} {named(repeated)}: remove the second.")
