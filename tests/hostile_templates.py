"""Chat templates that would take unlimited time or memory. Run as a program, it prints each outcome and its seconds."""

import json
import time
from datetime import date

from rag.models.tokenizer.chat_template import ChatTemplate
from rag.types import Message, UserError

GROWING = "{% set ns = namespace(x=START) %}{% for i in range(100) %}{% set ns.x = NEXT %}{% endfor %}"


def growing(start: str, step: str, use: str) -> str:
    """Return a template that makes a value from itself a hundred times, and then uses it."""
    return GROWING.replace("START", start).replace("NEXT", step) + use


HOSTILE = {
    "text repeated": "{{ 'a' * 10**10 }}",
    "text repeated by a literal": "{{ 10000000000 * 'a' }}",
    "list repeated": "{{ [1] * 10**10 }}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "nested ranges of nothing": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro of many": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(38) }}",
    "loop without end": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "loop of many": "{% for x in range(999) recursive %}{{ loop(range(999)) }}{% endfor %}",
    "power": "{{ (9**9) ** (9**9) }}",
    "squares": growing("2", "ns.x * ns.x", "{{ ns.x }}"),
    "filter's width": "{{ 'a' | center(10000000000) }}",
    "method's width": "{{ 'a'.ljust(10000000000) }}",
    "marked text": "{{ ('a' | safe).center(10000000000) }}",
    "printf": "{{ '%1000000000d' % 1 }}",
    "printf's star": "{{ '%*d' % (1000000000, 1) }}",
    "printf by filter": "{{ '%1000000000d' | format(1) }}",
    "printf by test": "{{ '%1000000000d' is divisibleby(5) }}",
    "one value many times": "{{ ('%(a)s' * 10000) % {'a': 'x' * 100000} }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format within format": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "one field many times": "{{ ('{0}' * 10000).format('x' * 100000) }}",
    "text doubled": growing("'aaaa'", "ns.x ~ ns.x", ""),
    "text added": growing("'aaaa'", "ns.x + ns.x", ""),
    "list of itself printed": growing("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "list of itself compared": growing("[1]", "[ns.x, ns.x]", "{{ ns.x == ns.x[:] }}"),
    "tuple of itself hashed": growing("(1,)", "(ns.x, ns.x)", "{{ {ns.x: 1} }}"),
    "tuple of itself looked up": growing("(1,)", "(ns.x, ns.x)", "{{ {}[ns.x] }}"),
    "namespace in itself": "{% set ns = namespace() %}{% set ns.x = [ns, ns] %}{{ ns }}",
    "JSON": "{{ [[1]] | tojson(indent=1000000000) }}",
    "JSON indented by text": "{{ [[1]] | tojson(indent='x' * 99999) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace by filter": "{{ ('a' * 99999) | replace(new='b' * 99999, old='a') }}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
    "join of characters": "{{ ('x' * 99999).join('a' * 99999) }}",
    "indent": "{{ ('\n' * 99999) | indent('x' * 99999) }}",
    "batch": "{{ [1] | batch(10**10, 'x') }}",
    "slice": "{{ [1] | slice(10000000000) | list }}",
    "round": "{% for i in range(9999) %}{{ 1 | round(99999, 'ceil') }}{% endfor %}",
    "find": "{{ ('a' * 999999).rfind('b' ~ 'a' * 99999) }}",
    "strip": "{{ ('a' * 999999).strip('bc' * 99999) }}",
    "sum of lists": "{{ ([[1]] * 9999) | sum(start=[]) }}",
    "long comparisons": "{% set s = 'a' * 999999 %}{% for i in range(9999) %}{{ s + 'b' == s + 'c' }}{% endfor %}",
    "much of little": "{% for i in range(99999) %}" + "{% if i %}{% endif %}" * 500 + "{% endfor %}",
    "long text in a loop": "{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}",
    "other methods": "{{ (5).to_bytes(99999, 'big') }}",
    "files": "{% include 'x' %}",
    "10 MB": "a" * 10_000_000,
    "parentheses": "{{ " + "(" * 99_000 + "1" + ")" * 99_000 + " }}",
    "brackets": "{{ " + "[" * 99_000 + "]" * 99_000 + " }}",
    "ifs": "{% if 1 %}" * 9000 + "{% endif %}" * 9000,
    "operators": "{{ " + " + ".join(["a"] * 20_000) + " }}",
    "calls": "{{ a" + "()" * 50_000 + " }}",
    "branches": "".join(f"{{% if a{i} %}}{{% set b{i} = 1 %}}{{% endif %}}" for i in range(4000)),
    "parts": "{{ a }}" * 28_000,
}  # fmt: skip


def rendered(source: str, content: str = "hello") -> str:
    return ChatTemplate(source, {}, date(2026, 1, 1))([Message("user", content)], True)


def outcome(source: str) -> tuple[str, float]:
    """Return the error message for a template, or the length of its output, and the seconds that it took."""
    start = time.monotonic()
    try:
        sentence = f"It was rendered to {len(rendered(source))} characters."
    except UserError as error:
        sentence = str(error)
    return sentence, time.monotonic() - start


if __name__ == "__main__":
    print(json.dumps({name: outcome(source) for name, source in HOSTILE.items()}))
