"""README stays short, tables stay narrow, and every page of docs/ is found from the website's menu."""

import re
import tomllib

import pytest
import yaml

from tests.docs.documents import ROOT, documents, parse


def test_readme_is_for_the_first_ten_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_tables_are_narrow(path):
    rows = [line for line in parse(path)[0].splitlines() if line.startswith("|")]
    wide = [row for row in rows if len(row.strip("|").split(" | ")) > 6]
    assert wide == []


def test_every_page_is_in_the_menu():
    menu = [
        page for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for page in entry.values()
    ]
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in documents() if path.name != "README.md"]
    assert sorted({*pages, "CHANGELOG.md", "LOG.md"}) == sorted(menu)


def test_readme_shows_every_folder_of_the_library():
    [tree] = [b.text for b in parse(ROOT / "README.md")[1] if "rag/ " in b.text and "scripts/" in b.text]
    folders = [path.parent.name for path in (ROOT / "rag").glob("*/__init__.py")]
    assert [name for name in folders if f"\n  {name}/ " not in tree] == []


def test_the_layers_of_the_design_are_those_that_are_checked():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [contract] = [c for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    checked = [
        re.findall(r"\w+", layer) for layer in contract["layers"] if layer != "(train)"
    ]  # no such folder yet
    [shown] = [b.text for b in parse(ROOT / "docs" / "design.md")[1] if b.text.startswith("scripts →")]
    assert [re.findall(r"\w+", layer) for layer in shown.split("→")[1:]] == checked
