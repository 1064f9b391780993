"""scripts/generate.py: an answer with its sources, JSON, and a session."""

import io
import json
import signal
import sys
import time
from types import SimpleNamespace

import answers
import explain
import generate
import ingest
import jax
import process
import pytest
import session
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from launch import CONF, quote_overrides
from settings import check
from system import build_method

from rag.pipeline import AnswerOptions
from rag.types import Answer, Source, Timings, UserError
from tests.scripts.commands import ASK, FILES, QUESTIONS


def test_a_question_is_answered_with_sources_and_times(index, run_main):
    out, _ = run_main(generate, *ASK, "question=What eats krill?")
    assert "krill.md:1  score 0." in out
    assert "tokens/s" in out


@pytest.mark.parametrize("question", QUESTIONS)
def test_json_is_one_object_with_the_question_as_typed(index, run_main, question):
    out, _ = run_main(generate, *ASK, f"question={question}", "output=json", "context.min_score=null")
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
    of_a_source = ("n", "path", "start", "end", "score", "text", "first_line", "last_line", "heading")
    assert set(answer["sources"][0]) == {*of_a_source, "document_id", "excerpt", "best"}
    assert sum(source["best"] for source in answer["sources"]) == 1
    assert answer["finish_reason"] in ("stop", "length")
    source = answer["sources"][0]
    assert FILES[source["path"]][source["start"] : source["end"]] == source["text"]
    assert 0 < answer["timings"]["new_tokens"] <= 8


def test_nothing_relevant_means_abstaining(index, run_main):
    out, _ = run_main(generate, *ASK, "question=quarks", "context.min_score=0.3", "output=json")
    answer = json.loads(out)
    assert (answer["abstained"], answer["sources"]) == (True, [])
    assert answer["answer"] == "The documents do not answer this question."


def test_a_session_knows_its_commands(index, run_main, monkeypatch):
    lines = "/sources\nWhat eats krill?\n/sources\n/context\n/nothing\n/help\nquit\nAnd a seal?\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    out, err = run_main(generate, *ASK, "k=1")
    assert "/help explains how" in err
    assert out.count("No sources.") == 1
    assert out.count("krill.md:1  score 0.") >= 3  # under the answer, /sources, /context
    assert "A whale eats krill.\n\n" in out
    assert "There is no command '/nothing'" in out
    assert out.count("Commands begin with a slash") == 1
    assert all(f"/{name} " in out for name in ("sources", "context", "new", "help", "quit"))
    assert "never read" not in out
    assert out.count("prefill ") == 2


def test_a_session_searches_for_the_earlier_questions_too(index, run_main, monkeypatch):
    searched, ask = [], session.ask

    def spy(question, search, reader, search_text):
        searched.append((question, search_text))
        return ask(question, search, reader, search_text)

    monkeypatch.setattr(session, "ask", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a whale?\na seal?\nice?\nfish?\n/new\nkrill?\n"))
    run_main(generate, *ASK)
    assert searched == [
        ("a whale?", "a whale?"),
        ("a seal?", "a seal? a whale?"),
        ("ice?", "ice? a seal? a whale?"),
        ("fish?", "fish? ice? a seal?"),
        ("krill?", "krill?"),
    ]


@pytest.mark.parametrize("converted", [False, True])
def test_ctrl_c_ends_the_answer_and_not_the_session(index, run_main, monkeypatch, converted):
    asked, ask = [], session.ask

    def interrupted(question, search, reader, search_text):
        asked.append(search_text)
        if len(asked) > 1:
            return ask(question, search, reader, search_text)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if not converted:
                raise
        raise RuntimeError("a library's own")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process.prepare_ctrl_c()
    monkeypatch.setattr(session, "ask", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a whale?\na seal?\n"))
    try:
        out, _ = run_main(generate, *ASK)
        assert not process.interrupted()
        assert signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked == ["a whale?", "a seal?"]
    assert out.count("Interrupted.") == 1 and out.count("prefill ") == 1


def test_ctrl_c_at_the_prompt_leaves(index, run_main, monkeypatch):
    def press(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", press)
    with pytest.raises(KeyboardInterrupt):
        run_main(generate, *ASK)


def test_a_long_heading_is_cut(capsys):
    source = Source(1, "d.md", 0, 4, 1.0, "text", first_line=1, heading="h" * 10_000)
    answers.show_sources([source])
    assert f"d.md:1, {'h' * 99}…  score 1.000\n" in capsys.readouterr().out


def test_a_question_that_failed_is_not_searched_for_again(index, run_main, monkeypatch):
    searched = []

    def refuse(question, search, reader, search_text):
        searched.append(search_text)
        raise UserError("It is too long.")

    monkeypatch.setattr(session, "ask", refuse)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a whale?\na seal?\n"))
    out, _ = run_main(generate, *ASK)
    assert searched == ["a whale?", "a seal?"]
    assert out.count("It is too long.") == 2


@pytest.mark.parametrize(("reason", "says"), [("length", True), ("stop", False)])
def test_an_answer_that_was_cut_says_so(capsys, monkeypatch, reason, says):
    monkeypatch.setattr("rag.generate.describe", lambda _: "a model")
    reader = SimpleNamespace(options=AnswerOptions(max_new_tokens=7), generator=object())
    timings = Timings(0.1, 0.2, 0.3, 50, 7)
    answers.show(Answer("Why?", "Because", False, (), timings, finish_reason=reason), reader)
    assert ("(cut at answer.max_new_tokens=7)" in capsys.readouterr().out) == says


def test_the_best_source_is_named(index, run_main):
    ask = (*ASK, "question=What eats krill on the ice?", "context.min_score=null")
    out, _ = run_main(generate, *ask)
    assert "2 sources in the order of the prompt; the best is [2], the last, next to the question:" in out
    out, _ = run_main(generate, *ask, "context=score")
    assert "2 sources in the order of the prompt; the best is [1]:" in out
    assert "\n    A whale eats krill.\n" in out  # the excerpt


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([("jaxpr_to_mlir_module", 0.0)], True),  # and still compiling
        ([("jaxpr_to_mlir_module", 0.0), ("backend_compile", 0.01)], False),
        ([("jaxpr_to_mlir_module", 0.0), ("backend_compile", 9.0), ("jaxpr_to_mlir_module", 0.0)], True),
        ([("jaxpr_trace", 9.0)], False),
    ],
)
def test_compiling_is_mentioned_when_it_takes_long(monkeypatch, capsys, events, says):
    monkeypatch.setattr(answers, "_PATIENCE", 0.1)
    with answers._CompilingNotice():
        for name, seconds in events:
            jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{name}_duration", seconds)
        time.sleep(0.4)
    assert capsys.readouterr().err.count("compiling ...") == says


METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_a_choice_here_too(method):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        if method == "tuned":
            with pytest.raises(HydraException) as error:
                compose("generate", [f"method={method}"])
            assert "only scripts/eval.py has" in explain.explain(error.value, "generate", CONF)
            return
        config = compose("generate", [f"method={method}", "index.path=index"])
    check(config, generate.GenerateSettings)
    assert build_method(config)


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
