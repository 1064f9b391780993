"""Find the commands of documents, configurations and scripts, and check them without doing their work.

A command of scripts/ is composed by Hydra, every combination of a sweep's values that is new, and its settings are
checked as the script does. Of `make` a dry run is done. Any other command must be one of OTHERS.
"""

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from launch import CONF, quote_overrides
from omegaconf import OmegaConf
from settings import check

from tests.docs.documents import ROOT, Block, documents, parse
from tests.run_script import settings_class

OTHERS = (  # what no check can do, as patterns
    "source .venv/bin/activate",
    "git clone .*",
    "cd .*",
    "ollama (pull|serve).*",
    r"pip install '?[\w\[\]_-]+'?",
    r"\.venv/bin/pip install '?[\w\[\]_-]+'?",
)
LANGUAGES = {"bash", "console", "python", "yaml", "json", "text", "mermaid"}
_COMMAND = r"(?:[A-Z_]+=\S+ )*(?:(?:\.venv/bin/)?python scripts/|make )"


def in_blocks(blocks: Sequence[Block]) -> Iterator[str]:
    """Yield the commands of fenced blocks: every line of "bash", and what follows a $ in "console"."""
    for block in blocks:
        text = re.sub(r"\\\n\s*", " ", block.text)
        if block.language == "bash":
            yield from (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
        elif block.language == "console":
            yield from re.findall(r"^\$ (.+)$", text, re.M)


def of_document(path: Path) -> list[str]:
    """Return the commands of a document, those in code spans of its text too."""
    prose, blocks = parse(path)
    spans = re.findall(rf"`({_COMMAND}[^`]+)`", prose)
    return list(dict.fromkeys(command for line in [*in_blocks(blocks), *spans] for command in parts(line)))


def of_source(path: Path) -> list[str]:
    """Return the commands in the comments of a YAML file, or in the docstring at the top of a script."""
    text = path.read_text()
    if path.suffix == ".py":
        lines = re.findall(rf"^ *({_COMMAND}.*)$", ast.get_docstring(ast.parse(text)) or "", re.M)
    else:
        lines = re.findall(rf"^#\s+({_COMMAND}.*)$", text, re.M)
    return list(dict.fromkeys(command for line in lines for command in parts(re.sub(r"\s+-> .*", "", line))))


def parts(line: str) -> list[str]:
    """Return the commands of a line without its comment; they are joined by && or a pipe."""
    line = re.sub(r"\s+#\s.*", "", line).strip()
    words: list[list[str]] = [[]]
    for word in re.findall(r"(?:'[^']*'|\"[^\"]*\"|[^\s'\"])+", line):
        if word in ("&&", "|"):
            words.append([])
        else:
            words[-1].append(word)
    return [
        " ".join(some) for some in words if some != ["python", "-m", "json.tool"] and some[:1] != ["tail"]
    ]


def check_command(command: str) -> None:
    """Raise an error for a command that would not start."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    match words:
        case ["python" | ".venv/bin/python", script, *arguments] if script.startswith("scripts/"):
            assert (ROOT / script).is_file(), f"there is no {script}"
            name = Path(script).stem
            if (CONF / f"{name}.yaml").is_file():
                for overrides in combinations(arguments):
                    check_settings(name, overrides)
            else:
                assert not arguments, f"{script} takes no arguments"
        case ["make", *targets]:
            make(tuple(word for word in targets if "=" not in word))
        case _:
            assert any(re.fullmatch(other, command) for other in OTHERS), "no check knows this command"


def combinations(arguments: Sequence[str]) -> list[list[str]]:
    """Return the overrides of a run, or of as many jobs of a sweep as it takes to have each value once."""
    given = [
        text for text in quote_overrides(arguments) if not text.startswith("-") and text != "job"
    ]  # --cfg job
    if not {"-m", "--multirun"} & set(arguments):
        return [given]
    parsed = OverridesParser.create().parse_overrides(given)
    columns = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in parsed
    ]
    rows = zip_longest(*columns)
    return [[value or column[0] for value, column in zip(row, columns, strict=True)] for row in rows]


def check_settings(name: str, overrides: Sequence[str]) -> None:
    """Compose and check a script's settings. Raises an error for one that is missing, unknown or of a wrong type."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(name, list(overrides))
    missing = sorted(OmegaConf.missing_keys(config))
    assert not missing, f"it lacks {' '.join(missing)}"
    check(config, settings_class(name))


@cache
def make(targets: tuple[str, ...]) -> None:
    """Do a dry run of the Makefile's targets."""
    done = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def all_commands() -> list[tuple[str, str]]:
    """Return (file, command) of all documents, configurations and scripts."""
    sources = [*sorted(CONF.rglob("*.yaml")), *sorted((ROOT / "scripts").glob("*.py"))]
    found = [(path, command) for path in documents() for command in of_document(path)]
    found += [(path, command) for path in sources for command in of_source(path)]
    return [(path.relative_to(ROOT).as_posix(), command) for path, command in found]
