"""The files that other programs rely on: their names, their keys and the types of their values, each held by a schema.

A schema is a type, a [schema of each item], a {key: schema} of exactly these keys, Each(schema of every value), or a
tuple of alternatives. A measure's value is a float between its least and greatest, or None where nothing defines it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import bench
import eval as eval_script
import generate
import ingest
import pytest
import sensitivity
import yaml
from hydra import compose, initialize_config_dir
from launch import CONF
from omegaconf import OmegaConf
from quoting import quote_overrides

from rag.bench import peak_throughput
from rag.bench.timing import Row
from rag.evaluate.metrics import ANSWER_METRICS, METRICS
from rag.evaluate.metrics import retrieval as retrieval_metrics
from rag.evaluate.metrics.spans import is_span_measure
from rag.evaluate.summary import RESERVED_KEYS
from rag.report import results
from rag.runtime.machine.measurement import Spread
from rag.types import UserError
from tests.tiny_models import write_decoder

MAYBE = (float, type(None))


@dataclass(frozen=True)
class Each:
    """An object of any keys, every value of one shape."""

    shape: object


def misfit(value: object, shape: object, name: str = "it") -> str:
    """What is wrong with a value, "" for nothing."""
    match shape:
        case tuple():
            problems = [misfit(value, other, name) for other in shape]
            return "" if "" in problems else problems[0]
        case Each(inner) if isinstance(value, dict):
            return next((m for k, v in value.items() if (m := misfit(v, inner, f"{name}.{k}"))), "")
        case dict() if isinstance(value, dict):
            if value.keys() != shape.keys():
                return f"{name} has the keys {sorted(value)}"
            return next((m for k, s in shape.items() if (m := misfit(value[k], s, f"{name}.{k}"))), "")
        case [inner] if isinstance(value, list):
            return next((m for i, v in enumerate(value) if (m := misfit(v, inner, f"{name}[{i}]"))), "")
        case type() if type(value) is shape or (shape is object):
            return ""
    return f"{name} is {value!r}"


ENVIRONMENT = {
    "commit": (str, type(None)),
    "dirty": (bool, type(None)),
    "python": str,
    "versions": Each(str),
    "cpu": str,
    "cpu_flags": [str],
    "cores": int,
    "device": str,
    "xla_flags": str,
    "load_average": [float],
    "peak_memory_bytes": int,
    "date": str,
}
RETRIEVAL = dict.fromkeys(retrieval_metrics.DEFAULT_MEASURES, MAYBE)
ANSWERED = {f"{c}/{name}": MAYBE for c in ("oracle", "retrieved") for name in ANSWER_METRICS}
ANSWERED |= {"retrieved/gold log-likelihood": MAYBE}
INTERVAL = ([float], type(None))


def metrics_shape(measures: dict) -> dict:
    return measures | {
        "label": str,
        "key": str,
        "dataset": {
            "name": str,
            "fingerprint": str,
            "queries": int,
            "unjudged": int,
            "limit": (int, type(None)),
            "seed": int,
        },
        "means": measures,
        "intervals": dict.fromkeys(measures, INTERVAL),
        "statistics": {"confidence": float, "resamples": int, "seed": int},
        "warnings": [str],
    }


COSTS = {
    "generator": (str, type(None)),
    "stages": Each({"seconds": float, "items": int, "reused": int}),
    "index_build_s": float,
    "index_bytes": int,
    "passages": int,
    "passages_per_s": MAYBE,
    "tokens_per_s": MAYBE,
    "query_p50_s": float,
    "query_p95_s": float,
    "query_n": int,
    "compile_s": float,
    "peak_memory_bytes": int,
    "environment": ENVIRONMENT,
}
ANSWER = {
    "query": str,
    "condition": str,
    "answer": str,
    "abstained": bool,
    "fits": bool,
    "sources": [str],
    "cited": [str],
    "prompt_tokens": int,
    "new_tokens": int,
    "found": bool,
    "shown": bool,
    "log_likelihood": MAYBE,
    "question": str,
    "gold": [str],
} | dict.fromkeys(ANSWER_METRICS, MAYBE)
CAUSES = dict.fromkeys(("retrieval miss", "truncation", "distraction", "reader"), float)
ERROR_BREAKDOWN = {
    "measure": str,
    "n": int,
    "ceiling": float,
    "scores": {"oracle": float, "retrieved": float},
    "errors": CAUSES,
    "intervals": dict.fromkeys(CAUSES, INTERVAL),
}
TUNING = {
    "family": str,
    "measure": str,
    "nested": float,
    "naive": float,
    "naive_parameters": Each(object),
    "optimism": float,
    "folds": [{"parameters": Each(object), "train": float, "test": float, "queries": int}],
}
MOVEMENTS = Each({"mean": MAYBE, "change": MAYBE, "largest": MAYBE})
CHANGES = {"axis": str, "setting": str, "changed": [str], "movements": MOVEMENTS}
SENSITIVITY = {
    "verdict": str,
    "variations": Each(object),
    "dataset": {"name": str, "fingerprint": str, "queries": int},
    "method": str,
    "means": Each(MAYBE),
    "lists": [CHANGES | {"lists": int, "replaced": [str], "score_difference": float}],
    "answers": [CHANGES | {"answers": int}],
    "skipped": [str],
    "environment": ENVIRONMENT,
}
SOURCE = {"n": int, "path": str, "document_id": str, "start": int, "end": int, "score": float, "text": str}
SOURCE |= {"first_line": int, "last_line": int, "heading": str, "excerpt": str, "best": bool}
QUERY = {"query": str, "text": str, "relevant": Each(int)}
ONE_ANSWER = {
    "question": str,
    "answer": str,
    "abstained": bool,
    "sources": [SOURCE],
    "timings": {
        "retrieve_s": float,
        "prefill_s": float,
        "decode_s": float,
        "prompt_tokens": int,
        "new_tokens": int,
        "prepare_s": float,
    },
    "cited": [int],
    "notices": [str],
    "finish_reason": str,
    "generator": str,
    "environment": ENVIRONMENT,
}
FIGURES = Each((float, int, {"median": float, "low": float, "high": float}))
BENCH = {
    "bench": str,
    "command": str,
    "load_before": [float],
    "machine": ENVIRONMENT | {"peaks": Each(float)},
    "rows": [{"case": str, "ours": FIGURES, "peers": Each(FIGURES), "ratio": Each((float, int))}],
}


# --- files made by the scripts


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A dataset with one question that has no answer, its documents as files, and a tiny decoder."""
    home = tmp_path_factory.mktemp("home")
    for folder in ("decoder", "beir/qrels", "documents", "cache", "read", "tuned"):
        (home / folder).mkdir(parents=True)
    write_decoder(home / "decoder")
    texts = {"seal": "a seal eats fish", "gull": "a gull nests on cliffs", "whale": "a whale eats krill"}
    corpus = [{"_id": name, "text": text} for name, text in texts.items()]
    queries = [
        {"_id": f"q {name}", "text": f"{name}?", "answers": [text[2:]]} for name, text in texts.items()
    ]
    queries.append({"_id": "none", "text": "neutrino?", "answerable": False})
    for name, text in texts.items():
        (home / "documents" / f"{name}.txt").write_text(text)
    for file, lines in (("corpus", corpus), ("queries", queries)):
        (home / "beir" / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = "".join(f"q {name}\t{name}\t1\n" for name in texts)
    (home / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return home


@pytest.fixture
def run(home, monkeypatch, capsys):
    """run(script, folder, *overrides) -> what it printed; its files are in the folder below home."""
    monkeypatch.setenv("RAG_CACHE", str(home / "cache"))

    def run(script, folder: str, *overrides: str) -> str:
        own = [f"generator.weights={home / 'decoder'}", "embedder=bag_of_words", *overrides]
        for name, found in {"run_dir": home / folder, "overrides": own, "label": "this one"}.items():
            monkeypatch.setattr(script, name, lambda found=found: found, raising=False)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(script.__name__, quote_overrides(own))
        script.main(config)
        return capsys.readouterr().out

    return run


def strict(text: str) -> object:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def lines(path: Path) -> list:
    return [strict(line) for line in path.read_text().splitlines()]


def test_the_files_of_an_evaluation(home, run):
    options = ("ablation.conditions=[oracle,retrieved]", "ablation.k=1", "answer.max_new_tokens=3")
    run(eval_script, "read", f"dataset.path={home / 'beir'}", *options)
    folder = home / "read"
    assert {path.name for path in folder.iterdir()} == {
        *(
            "metrics.json",
            "per_query.jsonl",
            "run.trec",
            "costs.json",
            "answers.jsonl",
            "error_breakdown.json",
        ),
        *("config.yaml", "overrides.yaml", "queries.jsonl"),
    }
    found, measures = strict((folder / "metrics.json").read_text()), RETRIEVAL | ANSWERED
    assert misfit(found, metrics_shape(measures)) == ""
    assert {name: found[name] for name in measures} == found["means"]  # one number a measure, at the top
    assert 0 < found["nDCG@10"] <= 1 and found["retrieved/citation precision"] is None  # nothing was cited
    rows = lines(folder / "per_query.jsonl")
    assert misfit(rows, [{"query": str} | measures]) == ""
    assert [row["query"] for row in rows] == ["q seal", "q gull", "q whale", "none"]
    for name, mean in found["means"].items():
        values = [row[name] for row in rows if row[name] is not None]
        assert mean == (pytest.approx(sum(values) / len(values)) if values else None)
    assert [row["retrieved/false abstention"] is None for row in rows] == [False, False, False, True]
    assert [row["retrieved/abstention recall"] is None for row in rows] == [True, True, True, False]
    for line in (folder / "run.trec").read_text().splitlines():
        query, q0, document, rank, score, tag = line.split("\t")
        assert (q0, tag) == ("Q0", "rag") and int(rank) >= 1 and isinstance(float(score), float)
        assert query.startswith("q ") and document in ("seal", "gull", "whale")
    assert misfit(strict((folder / "costs.json").read_text()), COSTS) == ""
    replies = lines(folder / "answers.jsonl")
    for condition, shape in {"oracle": ANSWER, "retrieved": ANSWER | {"gold log-likelihood": MAYBE}}.items():
        chosen = [reply for reply in replies if reply["condition"] == condition]
        assert misfit(chosen, [shape]) == "" and len(chosen) == 4
    assert misfit(strict((folder / "error_breakdown.json").read_text()), ERROR_BREAKDOWN) == ""
    queries = lines(folder / "queries.jsonl")
    assert misfit(queries, [QUERY]) == ""
    assert queries[0] == {"query": "q seal", "text": "seal?", "relevant": {"seal": 1}} and len(queries) == 3
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["dataset"]["path"] == str(home / "beir") and config["ablation"]["k"] == 1
    assert "ablation.k=1" in yaml.safe_load((folder / "overrides.yaml").read_text())
    [read], _ = results.read([folder])  # by its own schemas
    assert (
        read.means == found["means"]
        and read.error_breakdown["measure"] == "F1"
        and read.settings["ablation.k"] == 1
    )


def test_the_files_of_a_tuned_evaluation(home, run):
    options = ("retriever=bm25", "tuning=bm25", "tuning.folds=2")
    run(eval_script, "tuned", f"dataset.path={home / 'beir'}", *options)
    assert misfit(strict((home / "tuned" / "tuning.json").read_text()), TUNING) == ""
    assert misfit(strict((home / "tuned" / "metrics.json").read_text()), metrics_shape(RETRIEVAL)) == ""
    [read], _ = results.read([home / "tuned"])
    assert read.tuning["family"] == "bm25" and read.costs["query_p50_s"] > 0


def test_the_files_of_a_sensitivity_measurement(home, run):
    few = ("answers=1", "answer_batches=[2]", "answer_dtypes=[bfloat16]", "vector_dtypes=[float16]")
    options = (*(f"sensitivity.{one}" for one in few), "answer.max_new_tokens=2")
    run(sensitivity, "", f"dataset.path={home / 'beir'}", *options)
    found = strict((home / "sensitivity.json").read_text())
    assert misfit(found, SENSITIVITY) == ""
    assert found["lists"] and found["answers"]
    assert (home / "verdict.txt").read_text() == found["verdict"] + "\n"


def test_an_answer_as_json(home, run):
    index = f"index.path={home / 'index'}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [index, "embedder=bag_of_words", f"corpus.path={home / 'documents'}"]
        ingest.main(compose("ingest", quote_overrides(words)))
    run(generate, "", index, "question=What eats krill?", "answer.max_new_tokens=3")
    for question, abstained in (("What eats krill?", False), ("quarks", True)):
        limits = ("output=json", "context.min_score=0.1", "answer.max_new_tokens=3")
        out = run(generate, "", index, f"question={question}", *limits)
        found = strict(out)
        assert misfit(found, ONE_ANSWER) == ""
        assert (found["abstained"], bool(found["sources"])) == (abstained, not abstained)


@dataclass(frozen=True)
class Fake:
    def run(self) -> list[Row]:
        return [Row("c", {"ms": Spread(2.0, 1.0, 3.0), "recall": 1}, {"peer": {"ms": 4.0}}, {"peer": 2.0})]


def test_a_benchmarks_line(home, monkeypatch, capsys):
    monkeypatch.setattr(peak_throughput, "GEMM_SIZES", (64,))
    monkeypatch.setattr(peak_throughput, "READ_BYTES", (1 << 18,))
    monkeypatch.setattr(peak_throughput, "SECONDS", 0.0)
    monkeypatch.setattr(bench, "run_dir", lambda: home)
    monkeypatch.setattr(bench, "overrides", lambda: ["bench=fake"])
    fake = {"_target_": f"{__name__}.Fake"}
    bench.main(OmegaConf.create({"bench": fake, "keep": None, "name": "fake"}))
    line = capsys.readouterr().out.splitlines()[-1]
    assert misfit(strict(line), BENCH) == ""
    assert lines(home / "fake.jsonl") == [strict(line)]


# --- the schemas themselves, and names


def test_a_schema_rejects_other_values():
    shape = {"a": [float], "b": (int, type(None)), "c": Each(str)}
    assert misfit({"a": [1.0], "b": None, "c": {"x": "y"}}, shape) == ""
    for wrong in (
        *({"a": [1], "b": 1, "c": {}}, {"a": [1.0], "b": 1.0, "c": {}}, {"a": 1.0, "b": 1, "c": {}}),
        *({"a": [], "b": 1}, {"a": [], "b": 1, "c": {}, "d": 1}, {"a": [], "b": True, "c": {}}),
        *({"a": [], "b": 1, "c": {"x": 1}}, {"a": [], "b": 1, "c": []}, []),
    ):
        assert misfit(wrong, shape)


def test_no_metric_has_the_name_of_another_key_of_metrics_json():
    """Names with cut-offs are decided by patterns; none of the other keys of metrics.json is such a name."""
    for name in RESERVED_KEYS:
        with pytest.raises(UserError, match="There is no measure"):
            retrieval_metrics.check([name])
        assert not is_span_measure(name) and "/" not in name
    assert not RESERVED_KEYS & {*retrieval_metrics.DEFAULT_MEASURES, *(metric.name for metric in METRICS)}
