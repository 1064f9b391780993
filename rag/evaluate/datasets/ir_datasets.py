"""Datasets of the ir_datasets catalogue (MacAvaney et al. 2021)."""

import importlib
from typing import Any

from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.assemble import Judgement, assemble
from rag.evaluate.datasets.files import check_unique
from rag.evaluate.datasets.questions import Question
from rag.runtime.options import Count, Filled, Seed
from rag.types import Document, UserError


def load_ir_datasets(
    id: Filled, *, strict: bool = True, limit: Count | None = None, seed: Seed = 0
) -> Dataset:
    """Load a set by its id in the catalogue, such as "beir/scifact/test".

    The library is optional, and downloads the set on first use. The text of a document or query is the library's
    default_text.

    Args:
        id: The set's id.
        strict: Whether judgements of unknown ids are an error; otherwise they are left out.
        limit: How many queries to draw; None takes all.
        seed: Of the draw.

    Raises:
        UserError: without the library or a connection, and for an id that is unknown or lacks documents, queries or
            judgements.
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
    check_unique((document.id for document in corpus), f"{what} repeats the document")
    check_unique((question.id for question in questions), f"{what} repeats the query")
    return assemble(id, corpus, questions, judgements, what, strict=strict).sample(limit, seed)


def _ir_dataset(id: str) -> Any:
    try:
        return importlib.import_module("ir_datasets").load(id)
    except ImportError as error:
        raise UserError(
            f"dataset.id={id} needs the library ir_datasets ({error}): install it with pip install ir_datasets."
        ) from error
    except KeyError as error:
        raise UserError(f"ir_datasets knows no set {id}: choose an id of https://ir-datasets.com.") from error
