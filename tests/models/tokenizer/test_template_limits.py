"""Limits of chat templates: hostile ones are refused in one sentence, real ones are not slowed down."""

import json
import resource
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.models.tokenizer import template_limits, template_tree
from rag.models.tokenizer.chat_template import ChatTemplate
from rag.types import Message, UserError
from tests.hostile_templates import HOSTILE, outcome, rendered
from tests.one_sentence import is_one_sentence
from tests.trials import tries

BEYOND = "beyond what such templates may do"
MEMORY = 1 << 30  # bytes


def test_what_takes_long_or_much_is_refused():
    """In a process of its own, that has little memory and does not check every call's types."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_templates"], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[3], preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == HOSTILE.keys()
    for name, (sentence, seconds) in found.items():
        assert BEYOND in sentence and is_one_sentence(sentence), (name, sentence)
        assert seconds < 10, name


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "broken .too many statically nested"),
        ("{{ " + "9" * 9999 + " }}", "broken .Exceeds the limit"),
        ("{{ 'abc' | dictsort }}", "no attribute 'items'"),
        ("{{ raise_exception('a.\nb ' * 999) }}", "refuses these messages .a. b a. b"),
        ("{{ [1].nothing.more }}", "no attribute 'nothing'"),
        ("{{ 'a' | xmlattr }}", "broken .No filter named 'xmlattr'"),
        ("{{ strftime_now('\\ud800') }}", "can't encode"),
    ],
)
def test_other_failures_are_one_sentence(source, message):
    with pytest.raises(UserError, match=message) as caught:
        rendered(source)
    assert is_one_sentence(str(caught.value))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("{{ messages | map(attribute='role') | join('-') }}{{ messages | length }}", "user1"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% for k, group in messages | groupby('role') %}{{ k }}{{ group | length }}{% endfor %}", "user1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'b': [1]} | tojson(indent=1) }}",
         'a1{\n "b": [\n  1\n ]\n}'),
        ("{{ '{:>3}|{!r}'.format('a', 'b') }}{{ '%s-%03d' % ('a', 7) }}{{ '%s' | format('b') }}", "  a|'b'a-007b"),
        ("{{ [1] + [2] }}{{ 2**10 }}{{ 7 % 3 }}{{ 'ab' * 2 }}{{ 3 is odd }}{{ 2 ** -1 }}", "[1, 2]10241ababTrue0.5"),
        ("{% macro m(a) %}{{ a }}{{ varargs }}{{ caller() }}{% endmacro %}{% call m(1, 2) %}x{% endcall %}", "1(2,)x"),
        ("{% filter upper %}a{% endfilter %}{{ [3, 1] | sort | first }}{{ 'abc' | reverse }}{{ 'b' in 'abc' }}",
         "A1cbaTrue"),
        ("{% for x in [[1, [2]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}", "12"),
        ("{{ messages[0].content.split('l')[-1].strip('o') | trim }}{{ messages[-1:][0]['role'][::-1] }}", "resu"),
        ("{{ 'x'.replace('x', 'y') }}{{ ' a b ' | trim | replace('a', 'c') | indent(2) }}{{ 1.25 | round(1) }}",
         "yc b1.2"),
        ("{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner() %}{{ j() }}{{ j() }}", "ab, "),
    ],
)  # fmt: skip
def test_what_templates_use_is_there(source, want):
    assert rendered(source) == want


def test_long_conversations_fit():
    """A thousand messages, and one of a megabyte, with a template that looks at all of them in each step."""
    source = (
        "{% for m in messages %}{% if m['content'] is string and loop.index0 != messages | length - 1 %}"
        "{{ '<' + m['role'] + '>' + (m['content'] | trim) ~ m.content.replace('x', 'y') }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, {}, date(2026, 1, 1))
    assert len(template([Message("user", "hello")] * 1000, True)) == 999 * 16
    assert len(template([Message("user", "x" * 10**6), Message("user", "")], True)) == 2 * 10**6 + 6


def test_each_rendering_has_a_budget_of_its_own(monkeypatch):
    monkeypatch.setattr(template_limits, "UNITS", 3000)
    template = ChatTemplate("{% for i in range(100) %}{{ i }}{% endfor %}", {}, date(2026, 1, 1))
    assert len({template([Message("user", "hello")], True) for _ in range(30)}) == 1


FRAGMENTS = [
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{% if loop.first %}", "{% endif %}", "{% else %}",
    "{% set x = 'a' * 9999 %}", "{{ x ~ x }}", "{% macro m(a) %}", "{% endmacro %}", "{{ m(x) }}", "{{ x | join(x) }}",
    "{% set ns = namespace(x=x) %}", "{% set ns.x = [ns.x, ns.x] %}", "{{ ns.x }}", "{{ ns.x == x }}", "{{ m.x() }}",
    "{% for i in range(99999) %}", "{% break %}", "{{ x[::-1] | upper | list | tojson }}", "{% call m(1) %}",
    "{% endcall %}", "{{ caller() }}", "{%", "{{", "}}", "'", "(", "{#", "{% raw %}", "\ud800", "\0", "{{ loop(x) }}",
    "{% for y in x recursive %}", "{{ x.__class__ }}", "{{ x.format(x) }}", "{{ x % x }}", "{{ -x ** 9 }}",
]  # fmt: skip


@tries(150, 20_000)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=30))
def test_any_template_renders_or_is_refused(parts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            template_limits, "UNITS", 5000
        )  # every call's types are checked here, which takes its time
        sentence, _ = outcome("".join(parts))
    assert is_one_sentence(sentence)


def test_the_longest_template_that_is_read():
    longest = template_tree.MAX_LENGTH
    assert len(rendered("a" * longest)) == longest
