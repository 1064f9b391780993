"""Changed top-k lists are counted as a plain numpy computation counts them; where nothing changes, all counts are 0."""

import math

import numpy as np
import pytest

from rag.embed import Embedder
from rag.embed.bag_of_words import BagOfWords
from rag.embed.bert import BertEmbedder
from rag.evaluate.sensitivity.measure import measure_sensitivity
from rag.evaluate.sensitivity.reduced_precision import ReducedPrecisionEmbedder, reduce_precision
from rag.retrieve.search import Hybrid, Lexical
from tests import tiny_models
from tests.evaluate.default_options import sensitivity_options
from tests.evaluate.sensitivity.sensitivity_system import (
    FEW,
    RandomEmbedder,
    bfloat16,
    by_setting,
    check_against,
    ndcg,
    ranked,
    system,
    texts,
)


def test_lists_that_change_with_the_batch_of_the_embedder_are_counted():
    """An embedder that uses less of a text in small batches: the counts agree with plain numpy."""
    vary = sensitivity_options(k=4, measure="nDCG@4", vector_dtypes=(), **FEW)
    report = measure_sensitivity(
        system(RandomEmbedder(), embedder_of_batch=lambda n: RandomEmbedder(n if n < 100 else None)), vary
    )
    rows = by_setting(report.lists)
    passages, questions = texts()
    whole = ranked(RandomEmbedder().encode(passages), RandomEmbedder().encode(questions), 4)
    cut = ranked(RandomEmbedder(16).encode(passages), RandomEmbedder(16).encode(questions), 4)
    assert whole != cut
    check_against(rows["tokens_per_batch", "16"], whole, cut)
    check_against(rows["tokens_per_batch", "512"], whole, whole)
    assert rows["tokens_per_batch", "512"].score_difference == 0
    assert report.means == {"nDCG@4": pytest.approx(np.mean([ndcg(r, i) for i, r in enumerate(whole)]), abs=1e-6)} | {
        "F1": None, "contains": None}  # fmt: skip
    changed = len(rows["tokens_per_batch", "16"].changed)
    move = abs(rows["tokens_per_batch", "16"].movements["nDCG@4"].change)
    assert report.verdict == (
        f"Of 7 top-4 lists {changed} change with the batch size and move nDCG@4 by up to {move:.4f}."
    )


def test_lists_that_change_with_the_batch_of_questions_are_counted():
    report = measure_sensitivity(
        system(RandomEmbedder(flips_single=True)),
        sensitivity_options(k=4, measure="nDCG@4", vector_dtypes=(), **FEW),
    )
    rows = by_setting(report.lists)
    passages, questions = (RandomEmbedder().encode(some) for some in texts())
    alone, together = ranked(passages, -questions, 4), ranked(passages, questions, 4)
    check_against(rows["search_batches", "1"], together, alone)
    assert rows["search_batches", "3"].changed == ("q6",)  # the seventh is alone in the third batch
    check_against(rows["search_batches", "all"], together, together)
    assert report.skipped == ("tokens_per_batch is left out: the embedder has no such setting.",)


def test_rounded_vectors_change_the_lists_as_numpy_computes_it():
    passages, questions = (RandomEmbedder().encode(some) for some in texts())
    assert (reduce_precision(passages, "bfloat16") == bfloat16(passages)).all()
    assert (reduce_precision(passages, "float16") == passages.astype(np.float16)).all()
    vary = sensitivity_options(k=12, measure="nDCG@12", **FEW)
    rows = by_setting(measure_sensitivity(system(RandomEmbedder()), vary).lists)
    exact = ranked(passages, questions, 12)
    check_against(
        rows["vector_dtypes", "bfloat16"], exact, ranked(bfloat16(passages), bfloat16(questions), 12)
    )
    scores = [q.astype(np.float64) @ p.astype(np.float64).T for p, q in
              ((passages, questions), (bfloat16(passages), bfloat16(questions)))]  # fmt: skip
    difference = rows["vector_dtypes", "bfloat16"].score_difference
    assert difference == pytest.approx(np.abs(scores[0] - scores[1]).max(), abs=1e-6)
    assert rows["vector_dtypes", "float32"].score_difference == 0
    assert 0 < rows["vector_dtypes", "float16"].score_difference < difference


def test_an_embedder_of_reduced_precision_is_an_embedder():
    inner = BagOfWords().fit(["a seal", "a whale"])
    embedder = ReducedPrecisionEmbedder(inner, "bfloat16")
    assert isinstance(embedder, Embedder)
    assert embedder.dim == 3
    assert embedder.fingerprint not in (
        inner.fingerprint,
        ReducedPrecisionEmbedder(inner, "float32").fingerprint,
    )
    assert embedder.fit(["a b c d"]).dim == 4
    [vector] = embedder.encode(["a seal"])
    assert np.unique(vector).tolist() == [0, bfloat16(np.array([1 / math.sqrt(2)], np.float32))[0]]
    assert embedder.encode_queries(["a seal"]).tolist() == [vector.tolist()]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return str(tiny_models.write_encoder(tmp_path_factory.mktemp("encoder")))


def test_our_encoder_does_not_depend_on_its_batch(encoder):
    """Batches of one text and of all, hence other paddings: the same lists, scores equal to rounding."""
    bert = system(
        BertEmbedder(encoder), Hybrid(), embedder_of_batch=lambda n: BertEmbedder(encoder, tokens_per_batch=n)
    )
    vary = sensitivity_options(
        k=5,
        measure="MAP",
        tokens_per_batch=(16,),
        search_batches=(1,),
        vector_dtypes=("float32",),
        answers=0,
    )
    report = measure_sensitivity(bert, vary)
    assert [row.axis for row in report.lists] == ["tokens_per_batch", "search_batches", "vector_dtypes"]
    for row in report.lists:
        assert (row.lists, row.changed, row.replaced) == (7, (), ())
        assert row.score_difference < 1e-5
        assert (row.movements["MAP"].change, row.movements["MAP"].largest) == (0, 0)
    assert report.skipped == ()
    assert report.verdict == "Of 7 top-5 lists 0 change with the batch size."


def test_axes_without_effect_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    report = measure_sensitivity(
        system(RandomEmbedder(), Lexical(), embedder_of_batch=RandomEmbedder), sensitivity_options(**FEW)
    )
    assert [row.axis for row in report.lists] == ["search_batches"] * 3
    assert all(row.changed == () and row.score_difference == 0 for row in report.lists)
    assert report.skipped == ("tokens_per_batch and vector_dtypes are left out: the method uses no vectors.",)
    assert list(tmp_path.iterdir()) == []  # nothing was cached, so nothing cached was used


def test_a_sample_of_the_questions_and_no_variation():
    vary = sensitivity_options(
        questions=3, tokens_per_batch=(), search_batches=(1,), vector_dtypes=(), answers=0
    )
    report = measure_sensitivity(system(BagOfWords()), vary)
    assert report.dataset["queries"] == report.lists[0].lists == 3
    nothing = measure_sensitivity(
        system(BagOfWords()), sensitivity_options(search_batches=(), vector_dtypes=(), answers=0)
    )
    assert (nothing.lists, nothing.answers, nothing.verdict) == ((), (), "Nothing was varied.")
