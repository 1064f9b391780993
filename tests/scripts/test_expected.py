"""The table of expected results over data/sample (data/sample/expected.tsv): every command gives what it promises.

A command that reads answers (`ablation.conditions`) asks the generator every question: it is run with `--long` alone.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import eval as eval_script
import pytest
from hydra import compose, initialize_config_dir
from launch import CONF, quote_overrides

ROOT = CONF.parent
TABLE = ROOT / "data" / "sample" / "expected.tsv"
ROWS = [line.split("\t") for line in TABLE.read_text().splitlines()[1:]]
COMMANDS = list(dict.fromkeys(row[0] for row in ROWS))


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory) -> Callable[[str], dict[str, float]]:
    """evaluate(command) -> its measures; the commands share one cache, as they would where they are typed."""
    home = tmp_path_factory.mktemp("home")

    def evaluate(command: str) -> dict[str, float]:
        _, script, *overrides = shlex.split(command)
        assert script == "scripts/eval.py"
        with initialize_config_dir(str(CONF), version_base="1.3"), pytest.MonkeyPatch.context() as patch:
            config = compose("eval", quote_overrides(overrides))
            patch.setattr("rag.evaluate.experiment.cache_root", lambda: home)
            patch.setattr("rag.embed.vector_cache.cache_root", lambda: home)
            patch.setattr(eval_script, "run_dir", lambda: home / "run")
            patch.setattr(eval_script, "overrides", lambda: overrides)
            patch.setattr(eval_script, "label", lambda: command)
            eval_script.main(config)
        return json.loads((home / "run" / "metrics.json").read_text())

    return evaluate


def asks_generator(command: str) -> bool:
    return "ablation.conditions=" in command


def marks(command: str) -> list[pytest.MarkDecorator]:
    """What a command needs: the default weights, and for answers and late interaction a long time."""
    weights = asks_generator(command) or "embedder=bag_of_words" not in command
    long = asks_generator(command) or "method=maxsim" in command
    return [pytest.mark.weights] * weights + [pytest.mark.long] * long


@pytest.mark.parametrize("command", [pytest.param(c, marks=marks(c)) for c in COMMANDS])
def test_a_command_gives_what_the_table_promises(evaluate, command):
    measured = evaluate(command)
    for _, measure, low, high in (row for row in ROWS if row[0] == command):
        assert float(low) <= measured[measure] <= float(high), measure


def test_the_documents_show_the_table():
    page = Path(ROOT / "docs" / "experiments.md").read_text()
    for command, measure, low, high in ROWS:
        assert f"| `{command}` | {measure} | {low} to {high} |" in page


def test_the_table_promises_something():
    assert len(ROWS) >= 10
    for command, measure, low, high in ROWS:
        assert ("/" in measure) == asks_generator(command), measure  # of answers, or of retrieval
        widest = 0.1 if asks_generator(command) else 0.05  # an answer hangs on the processor's rounding
        assert 0 <= float(low) < float(high) <= 1 and float(high) - float(low) <= widest, measure


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        ("eval.py embedder=bag_of_words retriever=bm25", []),
        ("eval.py method=dense", ["weights"]),
        ("eval.py embedder=bag_of_words 'ablation.conditions=[retrieved]'", ["weights", "long"]),
    ],
)
def test_a_command_is_marked_by_what_it_needs(command, needs):
    assert [mark.name for mark in marks(command)] == needs
