"""The scripts with a tiny checkpoint, counted words and a few files: indexes, mistakes, one run as it is typed."""

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
from launch import CONF

from rag.index import manifest as manifests
from rag.types import UserError
from tests.scripts.commands import ASK, INDEX, QUESTIONS, WORDS


def test_an_index_is_shown_and_verified(index, run_main):
    out, _ = run_main(index_script, "index.path=index")
    assert "2 documents, 2 chunks, " in out
    assert "by bag_of_words" in out
    assert "as they were written" not in out
    out, _ = run_main(index_script, "index.path=index", "action=verify")
    assert re.search(r"all \d+ files are as they were written", out)
    file = next(index.glob("segment-*/vectors.npy"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"vectors\.npy has changed since it was written"):
        run_main(index_script, "index.path=index", "action=verify")
    file.write_bytes(whole)


def test_the_recall_of_an_approximate_search_is_audited(home, index, run_main):
    with pytest.raises(UserError, match="has 2 chunks, and an audit needs 3"):
        run_main(index_script, "index.path=index", "action=audit")
    (home / "birds").mkdir()
    for bird, does in {"auk": "dives", "gull": "nests", "skua": "steals"}.items():
        (home / "birds" / f"{bird}.txt").write_text(f"A {bird} {does}.")
    run_main(ingest, "corpus.path=birds", "index.path=audited", *WORDS)
    out, _ = run_main(
        index_script, "index.path=audited", "action=audit", "vector_index.recall=0.9", "audit.k=1"
    )
    assert re.search(r"recall@1 of Binary\(recall=0\.9, .*\): 1\.0000, at least 0\.5\d+ with 95%", out)
    assert "3 queries" in out


def test_skipped_files_are_counted_by_type_and_listed_on_request(home, run_main):
    (home / "mixed").mkdir()
    for name in ("a.png", "b.png", "c.rst", "README", "empty.txt", "seal.txt"):
        (home / "mixed" / name).write_text("A seal." if name == "seal.txt" else "")
    command = (ingest, "corpus.path=mixed", "index.path=from_mixed", *WORDS)
    out, _ = run_main(*command)
    kinds = "5 skipped: 2 png, 1 no file extension, 1 rst, 1 no text in it"
    assert sorted(out.splitlines()[1].partition(";")[0].split(", ")) == sorted(kinds.split(", "))
    assert len(out.splitlines()) == 2
    out, _ = run_main(*command, "corpus.list_skipped=true")
    assert "skipped a.png: unsupported type .png" in out
    assert len(out.splitlines()) == 2 + 5


def test_a_folder_is_added_to_an_index(home, run_main):
    grown = ("index.path=grown", *WORDS, "index.add=true")
    out, _ = run_main(ingest, "corpus.path=documents", *grown)
    assert "2 documents, 2 chunks (2 newly embedded), " in out
    assert "this is a new one" in out
    (home / "more").mkdir()
    (home / "more" / "gull.txt").write_text("A gull nests on a cliff.")
    out, _ = run_main(ingest, "corpus.path=more", *grown)
    assert (
        "3 documents, 3 chunks (3 newly embedded), " in out
    )  # a new word is a new dimension of every vector
    assert "1 documents added, 0 replaced, 2 as they were; postings extended" in out


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
def test_mistakes_are_reported_in_one_sentence(index, run_main, script, overrides, says):
    with pytest.raises(UserError) as told:
        run_main(script, *overrides)
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
    assert not (home / "outputs").exists() and not (home / "generate.log").exists()
    wrong = typed("retreiver._target_=x")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "retriever" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "override", "says"),
    [
        ("generate", "k=abc", "k=abc is not valid: it must be a whole number from 1 to 2147483647."),
        ("generate", "k=null", "k=null is not valid"),
        (
            "generate",
            "context.min_score=nan",
            "context.min_score=nan is not valid: it must be a number, auto or null.",
        ),
        ("generate", "question=", "it must be a question that is not empty; leave it out"),
        ("generate", "prompt=null", "prompt=null is not valid: it must be one of cited, closed_book"),
        ("generate", "embedder._target_=nowhere", "nothing that can be built"),
        ("ingest", "corpus.path=", 'corpus.path="" is not valid: it must be text that is not empty.'),
        ("ingest", "index.path=", 'index.path="" is not valid'),
        ("ingest", "chunker.size=1.5", "chunker.size=1.5 is not valid"),
        ("ingest", "index.add=yes", "index.add=yes is not valid: it must be true or false."),
        ("ingest", "corpus.follow_links=1", "corpus.follow_links=1 is not valid: it must be true or false."),
        ("ingest", "corpus.max_file_mb=0", "corpus.max_file_mb=0 is not valid"),
        ("eval", "plan=maybe", "plan=maybe is not valid: it must be true or false."),
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


def test_no_reranker_and_no_postings_may_be_chosen(home, index, run_main):
    out, _ = run_main(
        generate, *ASK, "question=What eats krill?", "reranker=null", "transform=null", "output=json"
    )
    assert json.loads(out)["sources"]
    out, _ = run_main(ingest, "corpus.path=documents", "index.path=bare", *WORDS, "analyzer=null")
    assert "2 documents, 2 chunks" in out
    out, _ = run_main(generate, *ASK, "index.path=bare", "retriever=bm25", "question=krill", "output=json")
    assert [source["path"] for source in json.loads(out)["sources"]] == ["krill.md"]


def test_an_index_of_another_embedder_is_reported(home, index, run_main):
    manifest = index / "manifest.json"
    whole, fields = manifest.read_text(), manifests.read(index)
    other = fields.embedder.model_copy(update={"fingerprint": "0" * 64})
    manifest.write_text(manifests.to_json(fields.model_copy(update={"embedder": other})))
    try:
        with pytest.raises(UserError, match="another embedder"):
            run_main(generate, *ASK, "question=x")
    finally:
        manifest.write_text(whole)
