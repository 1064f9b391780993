"""A code version contains exactly the modules that are imported; tested on small trees and on rag."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grimp
import pytest

import rag
from rag.runtime.code import import_closure, source_code
from rag.runtime.code.import_closure import CodeReader, code_version
from rag.runtime.code.source_code import parse_source
from rag.types import UserError
from tests import trials
from tests.damage import WAYS

ROOT = Path(rag.__file__).parent
CONF = ROOT.parent / "conf"
TARGETS = sorted({
    target
    for path in CONF.rglob("*.yaml")
    for target in re.findall(r"_target_: (rag\.[\w.]+)\.\w+", path.read_text(encoding="utf-8"))
})  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


def version(folder: Path, name: str = "mine") -> str:
    return CodeReader([str(folder)]).version(name)


def reached(folder: Path, name: str = "mine") -> set[str]:
    return set(CodeReader([str(folder)]).closure(name)[0])


# --- one source


PLAIN = "async def f(x):\n    return x + 1\nclass A:\n    pass\n"
DRESSED = '"""Doc."""\nasync def f(x):\n    """More."""\n    # why\n    return (x\n        + 1)\nclass A:\n    "Doc."\n'


def hashed(text: str) -> str:
    return parse_source(text.encode(), "x.py").code


def test_comments_docstrings_and_layout_are_not_what_code_does():
    assert hashed(PLAIN) == hashed(DRESSED)
    assert (
        parse_source(PLAIN.encode(), "x.py").documented != parse_source(DRESSED.encode(), "x.py").documented
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(x):\n    return x + 1\n", "def f(x):\n    return x + 2\n"),
        ("x = 'a'\n", "x = 'b'\n"),
        ("def f():\n    'doc'\n    return 'a'\n", "def f():\n    'doc'\n    return 'doc'\n"),
        ("def f():\n    x = 'doc'\n", "def f():\n    'doc'\n"),
        ("def f():\n    f'{g()}'\n", "def f():\n    pass\n"),  # no docstring: it runs
        ("async def f(): pass\n", "def f(): pass\n"),
        ("x = 1\n", "x = 1.0\n"),
        ("x: int\n", "x: str\n"),
    ],
)
def test_all_else_is(one, other):
    assert hashed(one) != hashed(other)


def test_docstrings_count_where_code_reads_them(tree):
    folder = tree({"mine.py": "from other import f\n", "other.py": "def f():\n    'one'\n"})
    before = version(folder)
    tree({"other.py": "def f():\n    'two'\n"})
    assert version(folder) == before
    tree({"mine.py": "from other import f\nprompt = f.__doc__\n"})
    before = version(folder)
    tree({"other.py": "def f():\n    'one'\n"})
    assert version(folder) != before


def test_an_expression_too_deep_for_python_to_walk_counts_as_it_is_written():
    deep = "x = " + " + ".join(["y"] * 700)
    assert hashed(deep) == hashed(deep) != hashed(deep + " + y")


# --- imports


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"mine.py": "import other\n", "other.py": "", "foreign.py": ""}, {"other"}),
        ({"mine.py": "def f():\n    from other import x\n", "other.py": ""}, {"other"}),
        ({"mine.py": "if TYPE_CHECKING:\n    import other\n", "other.py": ""}, {"other"}),
        ({"mine.py": "import pack.a.b\n", "pack/__init__.py": "", "pack/a/__init__.py": "", "pack/a/b.py": ""},
         {"pack", "pack.a", "pack.a.b"}),
        ({"mine.py": "from pack import a, x\n", "pack/__init__.py": "x = 1", "pack/a.py": "", "pack/b.py": ""},
         {"pack", "pack.a"}),
        ({"mine.py": "from pack import *\n", "pack/__init__.py": "", "pack/a.py": "", "pack/b/__init__.py": ""},
         {"pack", "pack.a", "pack.b"}),
        ({"mine.py": "from space import a\n", "space/a.py": "from . import b\n", "space/b.py": ""},
         {"space", "space.a", "space.b"}),  # a namespace package
        ({"mine.py": "import one\n", "one.py": "import two\n", "two.py": "import one, mine\n"}, {"one", "two"}),
        ({"mine.py": "import importlib\nimportlib.import_module('other')\n", "other.py": ""}, {"other"}),
        ({"mine.py": "x = __import__('other')\n", "other.py": ""}, {"other"}),
        ({"mine.py": "from importlib import import_module\nimport_module('pack.a')\n", "pack/__init__.py": "",
          "pack/a.py": "import_module('.b', __package__)", "pack/b.py": ""}, {"pack", "pack.a", "pack.b"}),
        ({"mine.py": "import pack.sub.a\n", "pack/__init__.py": "from .top import x\n", "pack/top.py": "",
          "pack/sub/__init__.py": "", "pack/sub/a.py": "from ..low import x\nfrom ...beyond import y\n",
          "pack/low.py": "from . import top\n"}, {"pack", "pack.top", "pack.sub", "pack.sub.a", "pack.low"}),
        ({"mine.py": "import sys, time, math, numpy.linalg\nimport nowhere\n"}, set()),
        ({"mine.py": "import code\n", "code.py": ""}, {"code"}),  # instead of the standard library's
    ],
)  # fmt: skip
def test_what_a_module_imports_is_reached(tree, files, wanted):
    folder = tree(files)
    assert reached(folder) == {"mine", *wanted}
    before = version(folder)
    for path in folder.rglob("*.py"):
        text = path.read_text()
        path.write_text(text + "\nedited = 1\n")
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        assert (version(folder) != before) == (name in reached(folder)), name
        path.write_text(text)
    assert version(folder) == before


def test_a_module_that_arrives_is_noticed(tree):
    folder = tree({"mine.py": "try:\n    import fast_words\nexcept ImportError:\n    pass\n"})
    before = version(folder)
    tree({"fast_words.py": ""})
    assert version(folder) != before


def test_files_and_variables_that_a_module_names_count(tree, monkeypatch):
    named = "RAG_SOURCES = ('kernels/*.cc', 'words.txt')\nRAG_ENVIRONMENT: tuple = ('MY_SWITCH',)\n"
    files = {
        "mine.py": "import other\n",
        "other.py": named,
        "kernels/a.cc": "1",
        "words.txt": "a",
        "b.txt": "b",
    }
    folder = tree(files)
    seen = [version(folder)]
    for change in ({"kernels/a.cc": "2"}, {"kernels/b.cc": "1"}, {"words.txt": "b"}):
        tree(change)
        seen.append(version(folder))
    monkeypatch.setenv("MY_SWITCH", "0")
    seen.append(version(folder))
    assert len(set(seen)) == len(seen)
    tree({"b.txt": "not named", "kernels/a.txt": ""})
    assert version(folder) == seen[-1]


def test_a_compiled_module_is_its_bytes(tree):
    name = f"fast{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    folder = tree({"mine.py": "import fast\n", name: "one"})
    before = version(folder)
    tree({name: "two"})
    assert version(folder) != before


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"mine.py": "def f(:\n"}, r"mine\.py cannot be read as Python \(.*line 1.*correct it"),
        ({"mine.py": "import other\n", "other.py": "\0"}, r"other\.py cannot be read as Python"),
        (
            {"mine.py": "RAG_SOURCES = [name for name in 'ab']\n"},
            r"mine\.py makes RAG_SOURCES of something else",
        ),
        ({"mine.py": "RAG_ENVIRONMENT = 'HOME'\n"}, r"mine\.py makes RAG_ENVIRONMENT of something else"),
        (
            {"mine.py": "RAG_SOURCES = ('gone.txt',)\n"},
            r"names 'gone\.txt' in RAG_SOURCES, and there is no such file",
        ),
    ],
)
def test_code_that_cannot_be_read_gives_one_sentence(tree, files, sentence):
    folder = tree(files)
    with pytest.raises(UserError, match=sentence) as error:
        version(folder)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_that_may_not_be_read_is_refused(tree, monkeypatch):
    folder = tree({"mine.py": ""})

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"Cannot read the code in .*mine\.py \(Permission denied\)"):
        version(folder)


# --- from values to modules


def test_the_code_of_a_value_is_that_of_all_inside_it(tree, monkeypatch):
    folder = tree({
        "outer.py": "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Outer:\n    parts: object\n",
        "inner.py": "import dataclasses, base\n@dataclasses.dataclass(frozen=True)\nclass Inner(base.Base):\n"
        "    n: int = 1\n",
        "base.py": "class Base:\n    pass\ndef f():\n    pass\n",
    })  # fmt: skip
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(import_closure, "_READER", CodeReader())
    outer, inner, base = map(importlib.import_module, ("outer", "inner", "base"))
    for value in (outer.Outer([{"a": inner.Inner()}]), partial(print, inner.Inner()), inner.Inner, base.f):
        before = code_version(value)
        tree({"base.py": f"class Base:\n    n = {before!r}\ndef f():\n    pass\n"})
        assert code_version(value) == before  # what is loaded runs, not what the file says since
        importlib.reload(base)
        assert code_version(value) != before
    for name in ("outer", "inner", "base"):
        monkeypatch.delitem(sys.modules, name)


def test_a_class_of_a_notebook_has_no_version(monkeypatch):
    @dataclass(frozen=True)
    class Cell:
        n: int = 1

    Cell.__module__ = "__main__"
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    with pytest.raises(UserError, match=r"The code of '__main__' is in no file.*into a \.py file") as error:
        code_version(Cell())
    assert len(str(error.value).splitlines()) == 1


def test_a_script_that_is_run_is_read_from_its_file(tree):
    text = """
        import sys
        sys.path.insert(0, {root!r})
        from rag.runtime.code.import_closure import code_version
        import helper
        class Own: pass
        print(code_version(Own))
    """
    files = {"script.py": text.format(root=str(ROOT.parent)), "helper.py": "x = 1\n"}

    def run():
        return subprocess.run(
            [sys.executable, tree(files) / "script.py"], capture_output=True, text=True, check=True
        ).stdout

    first = run()
    assert run() == first
    files["helper.py"] = "x = 2\n"
    assert run() != first


def test_parsed_sources_are_cached_and_none_is_parsed_twice(tree, monkeypatch):
    folder = tree({"mine.py": "import other\n", "other.py": "x = 1\n"})
    first = version(folder)
    with monkeypatch.context() as patch:
        patch.setattr(source_code, "parse_source", lambda data, file: pytest.fail(f"{file} is parsed again"))
        assert version(folder) == first
    tree({"other.py": "x = 2\n"})
    assert version(folder) != first


# --- rag itself


def upstream(graph: grimp.ImportGraph, module: str) -> set[str]:
    """Return what a module imports according to grimp: importing a module runs the packages that contain it, too."""
    found: set[str] = set()
    new = {module}
    while new:
        name = new.pop()
        found.add(name)
        parents = {name.rpartition(".")[0]} - {""}
        new |= (graph.find_modules_directly_imported_by(name) | parents) - found
    return found


def test_an_edit_of_a_module_changes_the_stages_that_reach_it_and_no_other(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy / "rag", ignore=shutil.ignore_patterns("__pycache__"))
    graph = grimp.build_graph("rag", cache_dir=None)
    wanted = {stage: upstream(graph, stage) for stage in TARGETS}
    assert {
        "rag.retrieve.search",
        "rag.embed.bert",
        "rag.generate.local",
        "rag.ingest.chunk.semantic",
    } <= wanted.keys()

    code = CodeReader([str(copy)])

    def changed(module: str) -> set[str]:
        """Return the stages whose version changes when this module is read again."""
        code._modules.pop(module)
        return {stage for stage in TARGETS if code.version(stage) != before[stage]}

    before = {stage: code.version(stage) for stage in TARGETS}
    assert before == {stage: CodeReader().version(stage) for stage in TARGETS}  # no path is in it
    edited = {
        ".".join(path.relative_to(copy).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(copy.rglob("*.py"))
    }
    assert set(edited) == graph.modules
    code.version(*edited)  # those too that no stage reaches
    for module, path in list(edited.items())[:: 1 if trials.LONG else 6]:
        text = path.read_text()
        path.write_text(text + "\n_edited = 1\n")
        assert changed(module) == {stage for stage in TARGETS if module in wanted[stage]}, module
        path.write_text(text)
        code._modules.pop(module, None)
    assert not changed("rag")
    for source in sorted((copy / "rag" / "native" / "cpp").iterdir()):
        text = source.read_text()
        source.write_text(text + "// edited\n")
        reaching = {stage for stage in TARGETS if "rag.native.build" in wanted[stage]}
        assert changed("rag.native.build") == reaching, source
        source.write_text(text)
    assert not changed("rag.native.build")


def test_what_python_loads_for_a_stage_is_in_its_closure():
    """One process imports one stage after another, and unloads the modules of the earlier ones."""
    script = textwrap.dedent("""
        import importlib, json, sys
        loaded = {}
        for stage in sys.argv[1:]:
            for name in [name for name in sys.modules if name.partition(".")[0] == "rag"]:
                del sys.modules[name]
            importlib.import_module(stage)
            loaded[stage] = [name for name in sys.modules if name.partition(".")[0] == "rag"]
        print(json.dumps(loaded))
    """)
    light = [
        stage for stage in TARGETS if stage != "rag.generate.local"
    ]  # registers with JAX, which it may once
    found = {}
    for stages in (light, ["rag.generate.local"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *stages],
            capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT.parent)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found |= json.loads(done.stdout)
    code = CodeReader()
    assert found.keys() == set(TARGETS)
    for stage, loaded in found.items():
        assert len(loaded) > 1
        assert set(loaded) <= code.closure(stage)[0].keys(), stage


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_cache_of_sources_is_written_again(tree, way, capsys):
    folder = tree({"mine.py": "import other", "other.py": "x = 1"})
    before = version(folder)
    file = source_code._cache_file()
    intact = file.read_bytes()
    WAYS[way](file)
    assert version(folder) == before
    printed = capsys.readouterr().err
    assert printed.count(file.name) == printed.count("\n") == (way != "gone")
    assert file.read_bytes() == intact
    assert version(folder) == before and capsys.readouterr().err == ""
