"""Changed answers are counted, and how far they move the metrics."""

from dataclasses import replace

import pytest

from rag.embed.bag_of_words import BagOfWords
from rag.evaluate.sensitivity.measure import measure_sensitivity
from rag.evaluate.sensitivity.report import MetricChange
from rag.generate import batched, prefill_batches, scheduler
from rag.generate.local import LocalGenerator
from rag.runtime import shapes
from tests import tiny_models
from tests.evaluate.default_options import sensitivity_options
from tests.evaluate.sensitivity.sensitivity_system import (
    BatchDependentGenerator,
    RandomEmbedder,
    by_setting,
    dataset,
    system,
)

ANSWERS = sensitivity_options(
    tokens_per_batch=(),
    search_batches=(),
    vector_dtypes=(),
    answers=5,
    answer_batches=(1, 4),
    answer_budgets=0,
    answer_dtypes=("float32", "bfloat16"),
    passages=2,
)


def test_answers_that_depend_on_batch_and_dtype_are_counted():
    whole = BatchDependentGenerator()
    steps = []
    report = measure_sensitivity(
        system(
            RandomEmbedder(), generator_of_batch=lambda n: whole, generator_of_dtype=BatchDependentGenerator
        ),
        ANSWERS,
        lambda *step: steps.append(step),
    )
    rows = by_setting(report.answers)
    assert report.means["F1"] == report.means["contains"] == 0  # "run", five in one call
    assert whole.calls == [1] * 5 + [4, 1]
    assert len(rows["answer_batches", "1"].changed) == 5
    assert rows["answer_batches", "1"].movements["F1"] == MetricChange(1.0, 1.0, 1.0)
    assert len(rows["answer_batches", "4"].changed) == 1  # the fifth was alone
    assert rows["answer_batches", "4"].movements["F1"] == MetricChange(0.2, 0.2, 1.0)
    assert rows["answer_dtypes", "float32"].changed == ()
    assert rows["answer_dtypes", "bfloat16"].movements["F1"].mean == pytest.approx(2 / 3)  # "stand"
    assert rows["answer_dtypes", "bfloat16"].movements["contains"] == MetricChange(0.0, 0.0, 0.0)
    assert report.verdict == (
        "Of 5 answers 5 change with the batch size and move F1 by up to 1.0000, 0 change in float32, "
        "5 change in bfloat16 and move F1 by up to 0.6667."
    )
    assert steps[-1] == ("answers", 4, 4)


def test_a_generator_without_these_settings_is_called_with_other_batches():
    report = measure_sensitivity(system(RandomEmbedder()), ANSWERS)
    assert [(row.setting, len(row.changed)) for row in report.answers] == [("1", 5), ("4", 1)]
    assert report.skipped[-1] == "answer_dtypes is left out: the generator has no such setting."


def test_a_metric_change_is_over_the_queries_that_have_both_values():
    assert MetricChange.between([None, 0.5, 1.0], [1.0, 0.25, 1.0]) == MetricChange(0.625, -0.125, 0.25)
    assert MetricChange.between([None], [1.0]) == MetricChange(None, None, None)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("decoder")
    tiny_models.write_decoder(folder)
    return str(folder)


def test_our_generator_does_not_depend_on_its_batch(decoder):
    vary = replace(ANSWERS, answers=2, answer_batches=(1,), answer_dtypes=("float32",))
    report = measure_sensitivity(
        system(
            BagOfWords(),
            generator=lambda: LocalGenerator(decoder, "float32"),
            generator_of_batch=lambda n: LocalGenerator(decoder, "float32", tokens_per_batch=n),
            generator_of_dtype=lambda name: LocalGenerator(decoder, name),
        ),
        vary,
    )
    assert [(row.axis, row.answers, row.changed) for row in report.answers] == [
        ("answer_batches", 2, ()),
        ("answer_dtypes", 2, ()),
    ]


@pytest.mark.parametrize("small", [False, True], ids=["as it is", "caches too small"])
def test_prompts_of_two_cache_sizes_are_answered_together_and_alone(decoder, small, monkeypatch):
    """A scheduler that gives prompts prefilled together the cache of the shortest is detected."""
    if small:

        def planned(requests, *rest):
            slots = [len(request.prompt) + request.max_new_tokens for request in requests]
            for group in prefill_batches.plan_prefill(requests, *rest):
                shortest = min(slots[i] for i in group.members)
                yield replace(group, capacity=shapes.round_up_cache(shortest))

        monkeypatch.setattr(batched, "plan_prefill", lambda *about: list(planned(*about)))
        monkeypatch.setattr(scheduler, "check_capacity", lambda *_: None)
    vary = replace(ANSWERS, answers=20, answer_batches=(), answer_budgets=2, answer_dtypes=())
    about = replace(system(BagOfWords()), dataset=dataset(24, 20))
    report = measure_sensitivity(replace(about, generator=lambda: LocalGenerator(decoder, "float32")), vary)
    assert [row.axis for row in report.answers] == ["answer_budgets"] * 2
    assert all(row.answers == 20 and row.setting.endswith(" tokens") for row in report.answers)
    changed = {query for row in report.answers for query in row.changed}
    assert bool(changed) == small
    assert f"{len(changed)} change with the batch size" in report.verdict
