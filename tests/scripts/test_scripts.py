"""The scripts with a tiny checkpoint, counted words and a few files: most in this process, one as it is typed."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import eval as eval_script
import generate
import index as index_script
import ingest
import pytest
from hydra import compose, initialize_config_dir
from launch import CONF, quote_overrides

from rag.index import manifest as manifests
from rag.types import UserError
from tests.run_script import run_script
from tests.tiny_models import write_decoder

FILES = {"seal.txt": "A seal eats fish on the ice.", "krill.md": "A whale eats krill.", "logo.png": "PNG"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with documents, an index of them, and a tiny decoder."""
    home = tmp_path_factory.mktemp("home")
    (home / "documents").mkdir()
    (home / "decoder").mkdir()
    for name, text in FILES.items():
        (home / "documents" / name).write_text(text)
    write_decoder(home / "decoder")
    return home


@pytest.fixture
def run(home, monkeypatch, capsys):
    """run(script, *overrides) -> stdout, stderr. What launch adds has its own tests (test_launch.py)."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("RAG_CACHE", str(home / "cache"))

    def run(script, *overrides):
        run_script(script, *overrides)
        return capsys.readouterr()

    return run


WORDS = ("embedder=bag_of_words",)
INDEX = ("index.path=index", *WORDS)
ASK = (*INDEX, "generator.weights=decoder", "answer.max_new_tokens=8")


@pytest.fixture
def index(home, run):
    if not (home / "index").exists():
        out, _ = run(ingest, "corpus.path=documents", *INDEX)
        assert "2 documents, 2 chunks" in out
        assert "skipped logo.png: unsupported type .png" in out
    return home / "index"


def test_an_index_is_shown_and_verified(index, run):
    out, _ = run(index_script, "index.path=index")
    assert "2 documents, 2 chunks, " in out
    assert "by bag_of_words" in out
    assert "as they were written" not in out
    out, _ = run(index_script, "index.path=index", "action=verify")
    assert re.search(r"all \d+ files are as they were written", out)
    file = next(index.glob("segment-*/vectors.npy"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"vectors\.npy has changed since it was written"):
        run(index_script, "index.path=index", "action=verify")
    file.write_bytes(whole)


def test_the_recall_of_an_approximate_search_is_audited(index, run):
    out, _ = run(index_script, "index.path=index", "action=audit", "vector_index.recall=0.9", "audit.k=1")
    assert re.search(r"recall@1 of Binary\(recall=0\.9, .*\): 1\.0000, at least 0\.4\d+ with 95%", out)
    assert "2 queries" in out


def test_a_folder_is_added_to_an_index(home, run):
    grown = ("index.path=grown", *WORDS, "index.add=true")
    out, _ = run(ingest, "corpus.path=documents", *grown)
    assert "2 documents, 2 chunks (2 newly embedded), " in out
    assert "this is a new one" in out
    (home / "more").mkdir()
    (home / "more" / "gull.txt").write_text("A gull nests on a cliff.")
    out, _ = run(ingest, "corpus.path=more", *grown)
    assert (
        "3 documents, 3 chunks (3 newly embedded), " in out
    )  # a new word is a new dimension of every vector
    assert "1 documents added, 0 replaced, 2 as they were; postings extended" in out


def test_a_question_is_answered_with_sources_and_times(index, run):
    out, _ = run(generate, *ASK, "question=What eats krill?")
    assert "krill.md:0-19  score 0." in out
    assert "tokens/s" in out


QUESTIONS = [
    r"""What's attention, (really)? [yes=no] #1 "x" 🤖""",
    "a\\'b ${oc.env:HOME} {n} $x, y",
    "null",
    "???",
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_json_is_one_object_with_the_question_as_typed(index, run, question):
    out, _ = run(generate, *ASK, f"question={question}", "output=json", "context.min_score=null")
    answer = json.loads(out)
    assert answer["question"] == question
    assert set(answer) >= {"question", "answer", "abstained", "sources", "timings", "environment"}
    assert set(answer["timings"]) == {
        "retrieve_s",
        "prefill_s",
        "decode_s",
        "prompt_tokens",
        "new_tokens",
        "prepare_s",
    }
    assert set(answer["sources"][0]) == {"n", "path", "start", "end", "score", "text"}
    source = answer["sources"][0]
    assert FILES[source["path"]][source["start"] : source["end"]] == source["text"]
    assert 0 < answer["timings"]["new_tokens"] <= 8


def test_nothing_relevant_means_abstaining(index, run):
    out, _ = run(generate, *ASK, "question=quarks", "context.min_score=0.3", "output=json")
    answer = json.loads(out)
    assert (answer["abstained"], answer["sources"]) == (True, [])
    assert answer["answer"] == "The documents do not answer this question."


def test_a_session_keeps_history_and_knows_its_commands(index, run, monkeypatch):
    lines = "What eats krill?\n/sources\n/context\n/nothing\nAnd a seal?\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    out, _ = run(generate, *ASK, "k=1")
    assert out.count("krill.md:0-19") >= 3  # under the answer, /sources, /context
    assert "A whale eats krill.\n" in out
    assert "There is no command /nothing" in out
    assert "never read" not in out
    prompts = [int(line.split("prefill ")[1].split()[0]) for line in out.splitlines() if "prefill " in line]
    assert prompts[1] > prompts[0]  # the first turn is part of the second prompt


@pytest.mark.parametrize(
    ("script", "overrides", "says"),
    [
        (generate, ("index.path=nowhere", "question=x"), "nowhere"),
        (generate, (*INDEX, "question=x", "output=xml"), "must be text or json"),
        (generate, (*INDEX, "output=json"), "question="),
        (generate, (*INDEX, "question=x", "k=0"), "k=0"),
        (generate, (*INDEX, "question=x", "generator.weights=/no/such.gguf"), "/no/such.gguf"),
        (ingest, ("corpus.path=missing", *INDEX), "missing"),
        (ingest, ("corpus.path=documents", "index.path=documents", *WORDS), "documents"),
        (ingest, ("corpus.path=documents", *INDEX, "index.add=yes"), "true or false"),
        (
            ingest,
            ("corpus.path=documents", *INDEX, "index.add=true", "chunker.size=99"),
            "choose that chunker",
        ),
        (eval_script, ("dataset.path=documents", *WORDS), "documents"),
    ],
)
def test_mistakes_are_told_in_one_sentence(index, run, script, overrides, says):
    with pytest.raises(UserError) as told:
        run(script, *overrides)
    assert says in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_as_it_is_typed(home, index):
    """A fresh process: the question arrives, stdout is one object, and a mistake is one sentence, exit code 2."""
    script = Path(generate.__file__)
    environment = os.environ | {"RAG_CACHE": str(home / "cache")}

    def typed(*overrides):
        command = [sys.executable, script, *ASK, f"question={QUESTIONS[0]}", *overrides]
        return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)

    done = typed("output=json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["question"] == QUESTIONS[0]
    wrong = typed("retreiver._target_=x")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "retriever" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "override", "says"),
    [
        ("generate", "k=abc", "k=abc will not do: it must be a whole number from 1 to 2147483647."),
        ("generate", "k=null", "k=null will not do"),
        (
            "generate",
            "context.min_score=nan",
            "context.min_score=nan will not do: it must be a number, auto or null.",
        ),
        ("generate", "question=", "it must be a question that is not empty; leave it out"),
        ("generate", "prompt=null", "prompt=null will not do: it must be one of cited, closed_book"),
        ("generate", "embedder._target_=nowhere", "nothing that can be built"),
        ("ingest", "corpus.path=", 'corpus.path="" will not do: it must be text that is not empty.'),
        ("ingest", "index.path=", 'index.path="" will not do'),
        ("ingest", "chunker.size=1.5", "chunker.size=1.5 will not do"),
        ("ingest", "index.add=yes", "index.add=yes will not do: it must be true or false."),
        ("ingest", "corpus.follow_links=1", "corpus.follow_links=1 will not do: it must be true or false."),
        ("ingest", "corpus.max_file_mb=0", "corpus.max_file_mb=0 will not do"),
        ("eval", "plan=maybe", "plan=maybe will not do: it must be true or false."),
    ],
)
def test_a_wrong_value_is_one_sentence_and_nothing_is_done(home, tmp_path, script, override, says):
    """As typed, in a folder with a file that an empty path would ingest."""
    (tmp_path / "here.txt").write_text("a seal")
    given = {"generate": ["index.path=new", "question=x"], "ingest": ["corpus.path=.", "index.path=new"]}
    command = [sys.executable, Path(CONF.parent, "scripts", f"{script}.py"), "hydra.run.dir=run", *WORDS]
    command += [
        text for text in given.get(script, ["dataset=sample"]) if text.split("=")[0] != override.split("=")[0]
    ]
    environment = os.environ | {"RAG_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*command, override], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert says in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"here.txt", "run"}


def test_no_reranker_and_no_postings_may_be_chosen(home, index, run):
    out, _ = run(
        generate, *ASK, "question=What eats krill?", "reranker=null", "transform=null", "output=json"
    )
    assert json.loads(out)["sources"]
    out, _ = run(ingest, "corpus.path=documents", "index.path=bare", *WORDS, "analyzer=null")
    assert "2 documents, 2 chunks" in out
    out, _ = run(generate, *ASK, "index.path=bare", "retriever=bm25", "question=krill", "output=json")
    assert [source["path"] for source in json.loads(out)["sources"]] == ["krill.md"]


def test_an_index_of_another_embedder_is_told(home, index, run):
    manifest = index / "manifest.json"
    whole, fields = manifest.read_text(), manifests.read(index)
    other = fields.embedder.model_copy(update={"fingerprint": "0" * 64})
    manifest.write_text(manifests.to_json(fields.model_copy(update={"embedder": other})))
    try:
        with pytest.raises(UserError, match="another embedder"):
            run(generate, *ASK, "question=x")
    finally:
        manifest.write_text(whole)


@pytest.fixture
def beir(home):
    dataset = home / "beir"
    (dataset / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = [
        {"_id": "d1", "title": "Seals", "text": "eat fish"},
        {"_id": "d2", "title": "", "text": "whales eat krill"},
    ]
    queries = [{"_id": "q1", "text": "fish"}, {"_id": "q2", "text": "krill whales"}]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (dataset / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (dataset / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td1\t1\n")
    return dataset


@pytest.fixture
def evaluated(run, tmp_path, monkeypatch):
    """evaluated(*overrides) -> the folder of the results, after running the script."""

    def evaluated(*overrides):
        monkeypatch.setattr(eval_script, "run_dir", lambda: tmp_path)
        monkeypatch.setattr(eval_script, "overrides", lambda: list(overrides))
        monkeypatch.setattr(eval_script, "label", lambda: "this [one]")
        evaluated.out, _ = run(eval_script, *overrides)
        return tmp_path

    return evaluated


def test_eval_writes_what_other_programs_rely_on(beir, evaluated):
    folder = evaluated(f"dataset.path={beir}", *WORDS)
    assert "nDCG@10" in evaluated.out and "this [one]" in evaluated.out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["MRR@10"] == metrics["means"]["MRR@10"] == pytest.approx((1 + 1 / 2) / 2)
    assert set(metrics["means"]) == {"nDCG@10", "Recall@100", "MRR@10", "MAP"}
    assert metrics["label"] == "this [one]"
    assert any("2 queries" in warning for warning in metrics["warnings"])
    costs = json.loads((folder / "costs.json").read_text())
    assert costs["query_p50_s"] > 0
    assert costs["index_bytes"] > 0
    rows = [json.loads(line) for line in (folder / "per_query.jsonl").read_text().splitlines()]
    assert [(row["query"], row["MRR@10"]) for row in rows] == [("q1", 1.0), ("q2", 0.5)]
    assert (folder / "run.trec").read_text().split()[:3] == ["q1", "Q0", "d1"]
    assert "rag.embed.bag_of_words.BagOfWords" in (folder / "config.yaml").read_text()


def test_a_cached_result_that_is_damaged_is_made_again(home, beir, evaluated, capsys):
    wanted = (f"dataset.path={beir}", *WORDS, "evaluation.probes=1")
    before = set((home / "cache" / "results").glob("*/metrics.json"))
    folder = evaluated(*wanted)
    [kept] = set((home / "cache" / "results").glob("*/metrics.json")) - before
    means = json.loads(kept.read_text())["means"]
    for text in ("", "[" * 200_000, kept.read_text().replace('"resamples": ', '"resamples": -')):
        kept.write_text(text)
        evaluated(*wanted)
        assert json.loads(kept.read_text())["means"] == means
    kept.with_name("costs.json").unlink()
    folder = evaluated(*wanted)
    assert json.loads((folder / "metrics.json").read_text())["means"] == means
    (folder / "run.trec").unlink()
    (folder / "run.trec").symlink_to("/proc/none/run.trec")
    with pytest.raises(UserError, match=r"Cannot copy .*: choose another with hydra\.run\.dir=DIR"):
        evaluated(*wanted)


def test_the_best_chunk_scores_for_its_document(beir, evaluated, tmp_path):
    words = ("chunker=fixed", "chunker.size=1", "chunker.overlap=0")
    evaluated(f"dataset.path={beir}", *WORDS, *words)
    first = (tmp_path / "run.trec").read_text().splitlines()[0].split()
    assert first[2] == "d1"
    assert float(first[4]) == pytest.approx(1.0)  # "fish" alone, of "Seals eat fish"


def test_one_long_document_does_not_crowd_the_others_out(home, evaluated, tmp_path):
    """Twenty chunks of one document score best; the other two documents are found all the same."""
    dataset = home / "long"
    (dataset / "qrels").mkdir(parents=True, exist_ok=True)
    texts = {"long": "krill " * 20, "a": "krill whale", "b": "krill seal ice"}
    rows = [json.dumps({"_id": name, "title": "", "text": text.strip()}) for name, text in texts.items()]
    (dataset / "corpus.jsonl").write_text("\n".join(rows))
    (dataset / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "krill"}))
    (dataset / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tb\t1\n")
    chunks = ("chunker=fixed", "chunker.size=1", "chunker.overlap=0", "evaluation.depth=3")
    evaluated(f"dataset.path={dataset}", *WORDS, *chunks)
    ranking = [line.split()[2] for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert sorted(ranking) == ["a", "b", "long"]


@pytest.mark.weights
def test_the_main_job_with_the_real_weights(embedder_weights, generator_weights, capsys, tmp_path):
    """The sample, ingested and asked with the defaults: the right passage is shown, and something is answered."""

    def compose_and_run(script, *overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            script.main(compose(script.__name__, quote_overrides(overrides)))
        return capsys.readouterr().out

    sample = CONF.parent / "data" / "sample" / "documents"
    compose_and_run(ingest, f"corpus.path={sample}", f"index.path={tmp_path / 'index'}")
    question = "question=What caused the decline of the wandering albatrosses of Fenwick Bay?"
    limits = ("output=json", "answer.max_new_tokens=24")
    answer = json.loads(compose_and_run(generate, f"index.path={tmp_path / 'index'}", question, *limits))
    assert not answer["abstained"]
    assert "albatross-study.html" in [source["path"] for source in answer["sources"]]
    assert "longline fishing" in answer["answer"].lower()
    assert 0 < answer["timings"]["new_tokens"] <= 24
    far = json.loads(
        compose_and_run(generate, f"index.path={tmp_path / 'index'}", "question=zebra tax law", *limits)
    )
    assert far["abstained"]
