"""The settings of a stage of a user's own: values are checked against its annotations, where it has some."""

import importlib

import pytest
from omegaconf import OmegaConf
from settings import build, check

from rag.types import UserError
from tests.scripts.test_setting_errors import Options

OPTIONS = "tests.scripts.test_setting_errors.Options"

USERS = """
from __future__ import annotations
import collections.abc, decimal, enum, typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Optional, Protocol, TypeVar
from rag.embed import Embedder
from rag.runtime.options import check_fields
from tests.scripts.test_setting_errors import Options
if TYPE_CHECKING:
    from numpy import ndarray

T = TypeVar("T")
class Colour(enum.Enum):
    RED = "red"
class Sizes(typing.TypedDict):
    a: int
class Own: ...
class Looks(Protocol):
    def look(self, at): ...
class Stage:
    def __init__(self, {declared}, **others: Any): self.x, self.others = x, others
class Pair:
    def __init__(self, first: int, second: float, third: str = ""): self.all = first, second, third
@dataclass(frozen=True)
class More(Options):
    w: ndarray | None = None
    def __post_init__(self): check_fields(self)
"""


@pytest.fixture
def users(tmp_path, monkeypatch, request):
    """Write a user's module whose Stage declares x in the given way; return its name."""

    def write(declared: str = "x=None", text: str = USERS) -> str:
        name = f"users_{abs(hash((request.node.name, declared)))}"
        (tmp_path / f"{name}.py").write_text(text.replace("{declared}", declared))
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return write


def stage(name: str, **values: object):
    return build(OmegaConf.create({"p": {"_target_": f"{name}.Stage", **values}}).p)


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        *((f"x: {hint}", {"a": 1}) for hint in ("dict[str, float]", "dict", "typing.Dict[str, int]", "typing.Dict")),
        *((f"x: {hint}", {"a": 1}) for hint in ("Mapping", "Mapping[str, Any]", "Sizes", "dict[str, float] | None")),
        *((f"x: {hint}", {"a": 1}) for hint in ("Any", "object", "T", "str | dict[str, Any]", "dict[str, T]")),
        *((f"x: {hint}", ["a", "b"]) for hint in ("list", "set[str] | None", "Iterable[str]", "typing.List", "tuple")),
        *((f"x: {hint}", ["a", "b"]) for hint in ("tuple[str, ...]", "tuple[str, str]", "frozenset[str]", "Sequence")),
        *((f"x: {hint}", ["a", "b"]) for hint in ("list[Any]", "collections.abc.Collection[str]", "Any", "object")),
        ("x: tuple[float, float]", [0.1, 0.2]),
        ("x: tuple[float, str]", [1, "a"]),
        ("x: list[tuple[int, float]] | None", [[1, 0.5]]),
        ("x: dict[str, tuple[int, int]]", {"a": [1, 2]}),
        ("x: tuple[T, int]", ["a", 1]),
        *((declared, value) for declared in ("x", "x=None", "x: Any", "x: 'no type'", "x: Gone | None")
          for value in (3, "a", [1], {"a": 1}, None)),
        *((f"x: {hint}", 3) for hint in ("Any", "object", "T", "Own | int", "decimal.Decimal", "complex")),
        *((f"x: {hint}", "red") for hint in ("Colour", "Iterable", "Annotated[Any, 'colour']", "bytes")),
        ("x: int = None", None),
        ("x: Own = None", None),
        ("x: ndarray = None", None),
        ("x: ndarray = None", [1, 2]),
        ("x: Optional[Own]", None),
    ],
)  # fmt: skip
def test_values_that_fit_the_annotations_of_a_users_stage_are_accepted(users, declared, value):
    assert stage(users(declared), x=value).x == value
    config = OmegaConf.create({"p": {"f": {"_target_": f"{users(declared)}.Stage", "x": value, "more": 3}}})
    check(config.p.f)
    assert build(config.p.f).others == {"more": 3}


@pytest.mark.parametrize(
    ("hint", "value", "asked"),
    [
        ("Own", 3, "settings with a _target_"),
        ("Own | None", "a", "settings with a _target_ or null"),
        ("Own | float", "a", "settings with a _target_ or a number"),
        ("Looks", [1], "settings with a _target_"),
        ("Embedder", {"a": 1}, "settings with a _target_"),
        ("Own", None, "settings with a _target_"),
        ("Callable[[int], int]", 3, "settings with a _target_"),
        ("list[Own]", [3], "a list of which each is settings with a _target_"),
        ("dict[str, Any]", 3, "settings"),
        ("dict", [1], "settings"),
        ("set[str]", 3, "a list of which each is text"),
        ("set[str]", [3], "a list of which each is text"),
        ("tuple[float, float]", [1], "a list of 2: a number, a number"),
        ("tuple[float, float]", [1, "2"], "a list of 2: a number, a number"),
        ("tuple[int, ...]", [1.5], "a list, as in x=[10,100], of which each is a whole number"),
    ],
)
def test_values_that_do_not_fit_the_annotations_of_a_users_stage_are_errors(users, hint, value, asked):
    with pytest.raises(UserError) as error:
        stage(users(f"x: {hint}"), x=value)
    assert str(error.value).replace("p.x", "x").endswith(f" is not valid: it must be {asked}.")


def test_entries_of_a_users_mapping_are_checked(users):
    with pytest.raises(UserError, match=r"^p\.x\.a=b is not valid: it must be a number\.$"):
        stage(users("x: dict[str, float]"), x={"a": "b"})


@pytest.mark.parametrize("hint", ["list", "Sequence[Own]", "list[Looks] | None", "tuple[Own, ...]", "Any"])
def test_a_list_of_parts_is_built_and_what_is_in_it_checked(users, hint):
    name = users(f"x: {hint}")
    part = {"_target_": OPTIONS, "size": 4}
    assert stage(name, x=[part, part]).x == [Options(4)] * 2
    with pytest.raises(UserError, match=r"^p\.x\[1\]\.size=0 is not valid"):
        stage(name, x=[part, part | {"size": 0}])
    with pytest.raises(UserError, match=r"no setting 'p\.x\[0\]\.sise'"):
        stage(name, x=[part | {"sise": 1}])


def test_a_target_written_in_c_takes_any_argument(users):
    array = {"_target_": "numpy.array", "object": [1, 2]}
    assert stage(users("x: ndarray"), x=array).x.tolist() == [1, 2]


def test_a_subclass_of_options_checks_what_can_be_evaluated(users):
    more = importlib.import_module(users()).More
    assert more(size=2, w=[1]).w == [1]
    with pytest.raises(UserError, match=r"^More\.size=0 is not valid"):
        more(size=0)


def test_positional_and_partial_arguments_are_not_required(users):
    name = users()
    pair = {"_target_": f"{name}.Pair"}
    assert stage(name, x=pair | {"_partial_": True}).x(1, 2.0).all == (1, 2.0, "")
    assert stage(name, x=pair | {"_partial_": True, "second": 2}).x(1).all == (1, 2, "")
    assert stage(name, x=pair | {"_args_": [1, 2.0]}).x.all == (1, 2.0, "")
    assert stage(name, x=pair | {"_args_": [1], "second": 2.0, "third": "c"}).x.all == (1, 2.0, "c")
    made = build(OmegaConf.create({"p": pair | {"_partial_": True}}).p, first=1)
    assert made(second=3).all == (1, 3, "")
    for wrong, message in [
        ({"_args_": [1]}, r"p\.x\.second=null is not valid"),
        ({"_args_": [1], "first": 1, "second": 2}, r"no setting 'p\.x\.first'"),
        ({"_args_": 3}, r"p\.x\._args_=3 is not valid: it must be a list"),
        ({"_partial_": "yes"}, r"p\.x\._partial_=yes is not valid: it must be true or false"),
        ({"_partial_": True, "first": "a"}, r"p\.x\.first=a is not valid"),
        ({"_partial_": True, "_args_": [{"_target_": OPTIONS, "size": 0}]},
         r"p\.x\._args_\[0\]\.size=0 is not valid"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            stage(name, x=pair | wrong)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("\ndef Stage(:", r"SyntaxError in .*{name}\.py, line 2: "),
        ("\n\nclass Stage: x = 1 / 0", r"ZeroDivisionError in .*{name}\.py, line 3: division by zero"),
        ("\nraise RuntimeError('two\\nlines.')", r"RuntimeError in .*{name}\.py, line 2: two lines\)"),
        ("import nowhere_at_all", r"ModuleNotFoundError in .*{name}\.py, line 1: No module named"),
        ("def stage(): ...", r"\(.*{name}\.py has no 'Stage'\)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_sentence(users, lines, reason):
    name = users(lines, "{declared}")
    with pytest.raises(UserError, match=reason.replace("{name}", name)) as error:
        stage(name)
    assert str(error.value).startswith(f"p._target_={name}.Stage is nothing that can be built (")
    assert len(str(error.value).splitlines()) == 1


def test_a_module_of_a_package_that_cannot_be_imported_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_package").mkdir()
    (tmp_path / "users_package" / "__init__.py").touch()
    (tmp_path / "users_package" / "mine.py").write_text("import nowhere_at_all")
    for name, reason in [
        ("mine", r"ModuleNotFoundError in .*mine\.py, line 1: No module named 'nowhere_at_all'"),
        ("gone", r"__init__\.py has no 'gone'"),
    ]:
        with pytest.raises(UserError, match=rf"^p\._target_=users_package\.{name}\.Stage is .*{reason}"):
            stage(f"users_package.{name}")
