"""Every command and every snippet of README.md, docs/, conf/ and scripts/ is run, or checked without doing its work.

Commands are composed and their settings checked (tests/docs/commands.py). Those of "console" blocks, which are shown
with their output, are run; "python" blocks are executed, and "yaml" and "json" blocks parsed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs import commands
from tests.docs.documents import ROOT, Block, documents, parse

BLOCKS = [block for path in documents() for block in parse(path)[1]]
QUESTION = re.search(r"QUESTION \?= (.*)", (ROOT / "Makefile").read_text())[1]
# Pages whose Python blocks, or whose commands too, a test of their own runs.
PYTHON_RUN_BY = {"docs/extending.md": "test_extending.py", "docs/python.md": "test_python.py"}
COMMANDS_RUN_BY = {"docs/extending.md": "test_extending.py"}


def of_language(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


@pytest.mark.parametrize(
    ("path", "command"), [c for c in commands.all_commands() if c[0] not in COMMANDS_RUN_BY]
)
def test_a_command_would_start(path, command):
    commands.check_command(command)


def test_a_block_names_its_language():
    """A block without a language could hold commands that nothing checks."""
    unknown = [str(block) for block in BLOCKS if block.language not in commands.LANGUAGES]
    assert unknown == []
    hidden = [
        str(block) for block in of_language("text") if re.search(r"^(\$ |python scripts/)", block.text, re.M)
    ]
    assert hidden == []


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("python scripts/generate.py question=x", "it lacks index.path"),
        ("python scripts/nothing.py", "there is no scripts/nothing.py"),
        ("python scripts/cache.py action=burn", "action"),
        ("python scripts/eval.py -m dataset=sample retriever=dense,bm26", "bm26"),
        ("python scripts/eval.py dataset=sample chunker.sise=3", "sise"),
        ("make nothing", "nothing"),
        ("rm -rf somewhere", "no check knows"),
    ],
)
def test_a_command_that_would_not_start_is_found(command, wanted):
    with pytest.raises(Exception, match=wanted):
        commands.check_command(command)


def test_commands_are_found_in_blocks_spans_and_comments(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Call `python scripts/cache.py` or `make test`.\n\n```bash\nmake demo  # first\npython scripts/eval.py \\\n"
        "    dataset=sample && make lint\n```\n\n```console\n$ python scripts/cache.py | tail -1\noutput\n```\n"
    )
    assert commands.of_document(page) == [
        *("make demo", "python scripts/eval.py dataset=sample", "make lint"),
        *("python scripts/cache.py", "make test"),
    ]
    page.write_text("# python scripts/cache.py action=info      -> a line\n# -> text\nkey: 1 # python\n")
    assert commands.of_source(page) == ["python scripts/cache.py action=info"]
    script = tmp_path / "script.py"
    script.write_text('"""Do it.\n\n    python scripts/cache.py | tail -1\n"""\n# python scripts/other.py\n')
    assert commands.of_source(script) == ["python scripts/cache.py"]


def test_a_sweep_is_checked_with_each_of_its_values():
    given = commands.combinations(["-m", "dataset=sample", "method=bm25,dense", "k=range(1,4)"])
    assert given == [
        ["dataset=sample", "method=bm25", "k=1"],
        ["dataset=sample", "method=dense", "k=2"],
        ["dataset=sample", "method=bm25", "k=3"],
    ]


PROGRAMS = sorted({b.path.relative_to(ROOT).as_posix() for b in of_language("python")} - PYTHON_RUN_BY.keys())


@pytest.mark.weights
@pytest.mark.parametrize("page", PROGRAMS)
def test_python_runs(page, home):
    """The blocks of a page are one program."""
    program = "\n\n".join(block.text for block in of_language("python") if block.path == ROOT / page)
    subprocess.run([sys.executable, "-c", program], cwd=home, env=environment(), check=True, timeout=300)


@pytest.mark.parametrize(("page", "test"), (PYTHON_RUN_BY | COMMANDS_RUN_BY).items())
def test_a_page_with_a_test_of_its_own_is_read_there(page, test):
    assert f'"{Path(page).name}"' in (Path(__file__).parent / test).read_text()


@pytest.mark.parametrize("block", of_language("yaml", "json"), ids=str)
def test_yaml_and_json_can_be_parsed(block):
    assert yaml.safe_load(block.text)  # JSON is YAML


@pytest.mark.weights
@pytest.mark.parametrize("block", of_language("console"), ids=str)
def test_a_command_prints_what_is_shown(block, home):
    """Seconds differ from run to run, and an answer's own words with the processor's rounding; all else is the same."""
    runs = re.findall(
        r"^(?:\$|\.venv/bin/python) (.*)\n((?:(?!\$ |\.venv/bin/python ).*(?:\n|$))*)", block.text, re.M
    )
    assert runs
    for command, output in runs:
        if command.startswith("make "):
            continue  # what it runs follows
        command = command.removeprefix("python ").removeprefix(".venv/bin/python ")
        shown = subprocess.run(
            ["bash", "-c", f'"{sys.executable}" {command}'],
            cwd=home,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert shown.returncode == 0, shown.stderr
        assert facts(shown.stdout, command) == facts(without_echo(output), command)


def without_echo(output: str) -> str:
    """Return the lines of an output that are not printed by the Makefile itself."""
    makefile = (ROOT / "Makefile").read_text().replace("$(PY)", ".venv/bin/python").replace('\\"', "'")
    echoed = {line.replace("'", '"') for line in re.findall(r'@echo "(.*)"', makefile)}
    return "".join(line for line in output.splitlines(True) if line.rstrip("\n") not in echoed)


def facts(output: str, command: str) -> list[str]:
    """Return the lines of an output without times and what is cached, and without an answer: the first paragraph."""
    if command.startswith("scripts/generate.py"):
        output = output.partition("\n\n")[2]
    masked = re.sub(
        r"\d+(\.\d+)?( s\b| tokens/s| newly)|decode \d+ tokens|; and [^;]* programs[^;]*", "", output
    )
    return masked.strip().splitlines()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder from which commands run as they do from the repository, and that takes what they write."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("scripts", "data", "conf", "docs", "rag"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment() -> dict[str, str]:
    return os.environ | {"QUESTION": QUESTION, "PYTHONPATH": str(ROOT)}
