"""The options of a measurement of numerical sensitivity, its report, and scripts/sensitivity.py."""

import json

import pytest
import sensitivity as script
from hydra import compose, initialize_config_dir
from launch import CONF
from quoting import quote_overrides
from settings import build

from rag.evaluate.sensitivity.measure import measure_sensitivity
from rag.evaluate.sensitivity.options import SensitivityOptions
from rag.evaluate.sensitivity.report import SensitivityReport
from rag.types import UserError
from tests import tiny_models
from tests.evaluate.default_options import defaults, sensitivity_options
from tests.evaluate.sensitivity.sensitivity_system import FEW, RandomEmbedder, system
from tests.typecheck import unchecked


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("decoder")
    tiny_models.write_decoder(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"k": 0}, "k=0 "),
        ({"questions": 0}, "questions=0 "),
        ({"answers": -1}, "answers=-1 "),
        ({"passages": 0}, "passages=0 "),
        ({"tokens_per_batch": (64, 0)}, r"tokens_per_batch=\[64,0\]"),
        ({"search_batches": (-1, "all")}, r"search_batches=\[-1,all\]"),
        ({"vector_dtypes": ("int8",)}, r"int8.* float32, bfloat16 or float16"),
        ({"measure": "nDGC"}, "no measure"),
    ],
)
def test_an_invalid_option_is_one_sentence(settings, says):
    with pytest.raises(UserError, match=says) as error:
        unchecked(SensitivityOptions, **defaults("sensitivity.yaml", "sensitivity") | settings)
    assert len(str(error.value).splitlines()) == 1


def test_the_depth_is_enough_for_list_passages_and_metric():
    assert sensitivity_options(k=5, measure="Recall@20").depth == 20
    assert sensitivity_options(k=5, measure="MAP", passages=8).depth == 8
    assert sensitivity_options(k=30, measure="nDCG@10").depth == 30


def strict(text: str):
    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def folder(tmp_path):
    """The layout of BEIR, with three passages and two questions."""
    (tmp_path / "qrels").mkdir()
    passages = [{"_id": f"d{i}", "text": text} for i, text in enumerate(("eat fish", "eat krill", "nests"))]
    questions = [{"_id": "q1", "text": "fish", "answers": ["fish"]}, {"_id": "q2", "text": "krill nests"}]
    for name, rows in (("corpus", passages), ("queries", questions)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td0\t1\nq2\td2\t1\n")
    return tmp_path


def test_the_script_prints_tables_and_writes_the_report(decoder, folder, monkeypatch, capsys):
    monkeypatch.setenv("RAG_CACHE", str(folder / "cache"))
    monkeypatch.setattr(script, "run_dir", lambda: folder)
    few = ("sensitivity.answers=1", "sensitivity.answer_batches=[2]", "sensitivity.answer_dtypes=[bfloat16]",
           "sensitivity.answer_budgets=1")  # fmt: skip
    model = ("embedder=bag_of_words", f"generator.weights={decoder}", "answer.max_new_tokens=4")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("sensitivity", quote_overrides([f"dataset.path={folder}", *model, *few]))
    script.main(config)
    out = capsys.readouterr().out
    record = strict((folder / "sensitivity.json").read_text())
    assert record["verdict"] in out.replace("\n", " ")
    assert (folder / "verdict.txt").read_text() == record["verdict"] + "\n"
    assert [(row["axis"], row["setting"], row["lists"]) for row in record["lists"]] == [
        ("search_batches", "1", 2),
        ("search_batches", "7", 2),
        ("search_batches", "all", 2),
        ("vector_dtypes", "float32", 2),
        ("vector_dtypes", "bfloat16", 2),
        ("vector_dtypes", "float16", 2),
    ]
    assert record["means"]["nDCG@10"] == pytest.approx((1 + 1) / 2)
    assert [row["setting"] for row in record["answers"]] == ["2", "bfloat16"]
    assert set(record["answers"][0]["movements"]) == {"F1", "contains"}
    assert record["skipped"] == [
        "tokens_per_batch is left out: the embedder has no such setting.",
        "answer_budgets is left out: no two prompts are prefilled together and need caches of two sizes.",
    ]
    assert record["environment"]["device"]
    assert record["variations"]["search_batches"] == [1, 7, "all"]
    for heading in ("2 top-10 lists", "1 answers", "passages", "bfloat16"):
        assert heading in out


@pytest.mark.parametrize(
    "wrong", ["search_batches=all", "search_batches=[some]", "answer_batches=[all]", "tokens_per_batch=[x]"]
)
def test_settings_of_the_wrong_type_are_named(wrong):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("sensitivity", ["dataset=sample", f"sensitivity.{wrong}"])
    with pytest.raises(UserError, match=f"sensitivity.{wrong.partition('=')[0]}"):
        build(config.sensitivity)


def test_a_part_is_varied_only_by_settings_that_its_target_has():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("sensitivity", ["dataset=sample", "generator=ollama"])
    assert script.takes(config.embedder, "tokens_per_batch")
    assert not script.takes(config.generator, "dtype")


def test_a_report_is_plain_values():
    report = measure_sensitivity(system(RandomEmbedder()), sensitivity_options(k=2, measure="MAP", **FEW))
    assert isinstance(report, SensitivityReport)
    record = strict(json.dumps(report.summary(), allow_nan=False))
    assert record["method"] == "Dense(index=Exact())"
    assert len(record["dataset"]["fingerprint"]) == 64
