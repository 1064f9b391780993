"""docs/pictures/terminal.py: a well-formed picture of any output, and one sentence where there is none."""

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from tests.docs.documents import ROOT


def draw(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "docs" / "pictures" / "terminal.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, input="")


def test_control_characters_are_left_out(tmp_path):
    done = draw(str(tmp_path / "a.svg"), r"printf '\033[1mbold\033[0m\001\033\000 \377 end\n'")
    assert done.returncode == 0, done.stderr
    text = "".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
    assert "bold\N{NO-BREAK SPACE}\N{REPLACEMENT CHARACTER}\N{NO-BREAK SPACE}end" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Give two arguments, the file of the picture and the command in quotes."),
        (["a.svg", "echo no >&2; exit 3"], "failed with exit code 3 (no)."),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence):
    done = draw(*arguments)
    assert done.returncode == 1
    assert sentence in done.stderr and done.stderr.count("\n") == 1
