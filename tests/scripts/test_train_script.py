"""scripts/train.py with a tiny decoder: from questions to an adapter, or to weights, that answers."""

import json

import pytest
import train

from rag.generate import Request, join_text
from rag.generate.local import LocalGenerator
from rag.models.adapters import load_adapter, read_card
from rag.types import Message, UserError
from tests.run_script import run_script
from tests.tiny_models import write_decoder

ROWS = [
    {
        "id": f"q{i}",
        "question": f"Who is king of {name}?",
        "context": f"{name} has king {king}.",
        "answers": [king],
    }
    for i, (name, king) in enumerate(
        zip(
            "Lom Ase Tor Ulv Bek Dal Fjord Gran".split(),
            "Odd Ull Rolf Stig Tore Vidar Yngve Åke".split(),
            strict=True,
        )
    )
]


@pytest.fixture
def setting(tmp_path):
    """Return a function that trains the tiny decoder on the rows, with further overrides."""
    weights = write_decoder(tmp_path / "decoder")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(*overrides: str) -> None:
        run_script(
            train,
            f"dataset.path={tmp_path}/questions.jsonl",
            f"output.path={tmp_path}/reader",
            f"task.weights={weights}",
            "embedder=bag_of_words",
            "task.options.rows=1",
            "task.options.row_tokens=512",
            "task.options.holdout=2",
            "task.options.dtype=float32",
            "train.epochs=2",
            *overrides,
        )

    return run


def answer(weights, adapter) -> str:
    generator = LocalGenerator(str(weights), "float32", adapter)
    request = Request([Message("user", "Lom has king Odd. Who is king of Lom?")], max_new_tokens=8)
    return join_text(generator.stream(request))


def test_an_adapter_with_its_card_and_metrics(setting, tmp_path, capsys):
    setting()
    reader = tmp_path / "reader"
    assert sorted(path.name for path in reader.iterdir()) == [
        "adapter.safetensors",
        "card.json",
        "metrics.jsonl",
    ]
    card, adapter = read_card(reader), load_adapter(reader)
    assert card.base["sha256"] == adapter.base_sha256
    assert len(card.held_out) == 2 and set(card.held_out) < {row["id"] for row in ROWS}
    [data] = card.data
    assert data["questions"] == 8 and len(data["sha256"]) == 64
    rows = [json.loads(line) for line in (reader / "metrics.jsonl").read_text().splitlines()]
    assert card.metrics["steps"] == max(row["step"] for row in rows) and card.seconds > 0
    assert "8 questions on 8 passages; 2 held out" in capsys.readouterr().out
    assert answer(tmp_path / "decoder", str(reader)) != answer(tmp_path / "decoder", None)


def test_all_weights_are_a_folder_of_their_own(setting, tmp_path):
    setting("task.options.rank=0")
    reader = tmp_path / "reader"
    assert {"model.safetensors", "config.json", "card.json", "metrics.jsonl"} <= {
        p.name for p in reader.iterdir()
    }
    assert answer(reader, None) != answer(tmp_path / "decoder", None)


def test_the_same_command_goes_on(setting, tmp_path, capsys):
    setting()
    whole = (tmp_path / "reader" / "adapter.safetensors").read_bytes()
    stopped = "train.stop_after_minutes=0"
    setting(stopped, "output.overwrite=true")
    assert "stopped after 1 steps; the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "reader" / "card.json").exists()
    setting(stopped)
    setting()
    assert (tmp_path / "reader" / "adapter.safetensors").read_bytes() == whole


def test_a_finished_training_is_not_replaced_by_mistake(setting, tmp_path):
    setting()
    with pytest.raises(UserError, match=r"holds a finished training: choose another output\.path, or add"):
        setting()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match=r"other exists and holds no training: choose another output\.path"):
        setting(f"output.path={tmp_path}/other", "output.overwrite=true")
    assert (tmp_path / "other" / "letter.txt").read_text() == "mine"


def test_an_evaluation_set_in_the_training_data_is_refused(setting, tmp_path):
    with pytest.raises(UserError, match="8 questions of the evaluation sets are in the training sets"):
        setting(f"leakage.against=[{tmp_path}/questions.jsonl]")
    assert not (tmp_path / "reader").exists()


def test_nothing_to_train_on(setting):
    with pytest.raises(
        UserError, match=r"No question is left to train on: give more, or lower task\.options\.holdout"
    ):
        setting("task.options.holdout=100")
    with pytest.raises(
        UserError, match=r"do not fill a batch of 64 rows of 512 tokens: lower task\.options\.rows"
    ):
        setting("task.options.rows=64")
    with pytest.raises(UserError, match=r"No style of .* has a weight above 0"):
        setting(*(f"task.options.styles.{name}.weight=0" for name in ("short", "cited", "plain")))
