"""An installed package counts by its version in code versions."""

import shutil
import sys
from pathlib import Path

import pytest

from rag.runtime.code import packages
from rag.runtime.code.import_closure import CodeReader


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


def version(folder: Path, name: str = "mine") -> str:
    return CodeReader([str(folder)]).version(name)


def reached(folder: Path, name: str = "mine") -> set[str]:
    return set(CodeReader([str(folder)]).closure(name)[0])


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Return a folder of sys.path with a package `words` of the distribution Better-Words, which requires `stems`."""
    folder = tmp_path / "site"
    installed = {"words": "", "stems": "", "tests_only": ""}
    for name, text in installed.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    install(
        folder,
        "Better_Words",
        "1.0",
        ["Stems>=1", 'tests-only ; extra == "test"', "gone ; python_version<'3'"],
    )
    (folder / "Better_Words-1.0.dist-info" / "RECORD").write_text("words/__init__.py,,\n")
    install(folder, "stems", "1.0")
    install(folder, "tests_only", "1.0")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for cached in (packages._installed, packages.distributions_of, packages.with_required):
        cached.cache_clear()


def install(folder: Path, name: str, version: str, requires: list[str] = ()) -> None:
    for cached in (packages._installed, packages.distributions_of, packages.with_required):
        cached.cache_clear()
    for old in folder.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    metadata = "".join(f"Requires-Dist: {one}\n" for one in requires)
    (info / "METADATA").write_text(f"Name: {name}\n{metadata}\nRequires-Dist: this is the description\n")
    (info / "RECORD").write_text(f"{name.lower()}/__init__.py,,\n")


def test_an_installed_package_counts_by_its_version_and_what_it_requires(tree, site):
    folder = tree({"mine.py": "import words.inner\n"})
    modules, others = CodeReader([str(folder)]).closure("mine")
    python = f"python {sys.version_info.major}.{sys.version_info.minor}"
    assert (set(modules), others) == ({"mine"}, {python, "better-words 1.0", "stems 1.0"})
    before = version(folder)
    (site / "words" / "__init__.py").write_text("x = 1\n")
    assert version(folder) == before
    install(site, "tests_only", "1.1")
    assert version(folder) == before
    install(site, "stems", "1.1")
    assert version(folder) != before


def test_a_package_that_was_installed_from_a_folder_is_read(tree, site):
    folder = tree({"mine.py": "import words\n"})
    (site / "Better_Words-1.0.dist-info" / "direct_url.json").write_text("{}")
    assert reached(folder) == {"mine", "words"}
    before = version(folder)
    (site / "words" / "__init__.py").write_text("x = 1\n")
    assert version(folder) != before


def test_the_versions_are_those_that_importlib_finds():
    from importlib import metadata

    _, others = CodeReader().closure("rag.generate.local")
    found = dict(other.rsplit(" ", 1) for other in others)
    assert {"jax", "jaxlib", "flax", "numpy", "tokenizers", "jinja2"} <= found.keys()
    for name in found.keys() - {"python"}:
        assert found[name] == metadata.version(name), name
