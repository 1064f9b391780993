"""Cache keys are equal exactly when the values are."""

import dataclasses
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.runtime.cache.keys import content_key

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@dataclasses.dataclass(frozen=True)
class Options:
    size: int = 1
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class OtherOptions:
    size: int = 1
    name: str = "a"


def typed(value: object) -> object:
    """Return the value with the type of every leaf, so that == distinguishes 1 from True and -0.0 from 0.0."""
    if isinstance(value, list):
        return [typed(item) for item in value]
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    return type(value).__name__, repr(value)


@given(PLAIN, PLAIN)
def test_keys_are_equal_exactly_when_the_values_are(a, b):
    assert (content_key(a) == content_key(b)) == (typed(a) == typed(b))


def test_every_type_has_its_own_key():
    values = [
        None,
        False,
        True,
        0,
        1,
        1.0,
        0.0,
        -0.0,
        "1",
        b"1",
        "",
        b"",
        [],
        {},
        [1],
        ["1"],
        {"1": 1},
        {1: 1},
    ]
    values += [
        math.inf,
        math.nan,
        [[]],
        [[], []],
        Options(),
        OtherOptions(),
        Options(size=2),
        {"size": 1, "name": "a"},
    ]
    keys = {content_key(value) for value in values}
    assert len(keys) == len(values)
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys)


def test_parts_do_not_run_together():
    keys = {
        content_key(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), ("ab", "c", ""), (["ab", "c"],)]
    }
    assert len(keys) == 5


def test_what_must_not_change_a_key():
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key((1, (2,))) == content_key([1, [2]])
    assert content_key(float("nan")) == content_key(-float("nan"))
    assert content_key("\udcff")  # a file name that is no UTF-8


def test_a_key_is_the_same_in_every_process_and_version():
    expected = "a34fdf727eb528456613fdec701671693e6144ef"
    assert content_key("passage", 1, 2.5, None, [True, b"x"], {"k": "v"})[:40] == expected


def test_unknown_types_are_refused():
    for value in (object(), {1, 2}, Options, os.curdir.__class__):
        with pytest.raises(TypeError, match="content_key"):
            content_key(value)
