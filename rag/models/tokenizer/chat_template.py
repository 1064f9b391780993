"""Chat templates: a checkpoint's Jinja text, run in a sandbox with what such templates expect.

A template is a program that came with the weights. It runs in jinja2's immutable sandbox: no attributes that
start with an underscore, no changes to what it is given, no imports. The names it may call are those that
Hugging Face transformers offers: raise_exception, strftime_now, the tojson filter, break and continue, and
{% generation %} blocks (rendered as they are). What it writes depends on the messages and a given date alone: the clock
and what jinja2 draws at random are not there. What it may spend is bounded (rag.models.tokenizer.template_limits).
"""

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import date as day
from datetime import datetime, time
from functools import partial

import jinja2
from jinja2.ext import Extension

from rag.models.tokenizer.template_limits import Environment
from rag.runtime.records import reason
from rag.types import Message, UserError


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}, a mark for training: here its body alone."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. `special_tokens` are the texts it sees as bos_token, eos_token and so on.

    `date` at midnight is what strftime_now takes for now.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], date: day):
        self._environment = Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        self._environment.add_filter("tojson", _to_json)
        self._environment.globals |= {"raise_exception": _reject, "strftime_now": partial(_now, date)}
        self._special_tokens = dict(special_tokens)
        self._lock = threading.Lock()  # what a rendering may spend is counted in the environment
        try:
            self._template = self._environment.template(source)
        except UserError:
            raise
        except Exception as error:  # of any kind: jinja2, and Python's compiler, of a stranger's program
            raise UserError(
                f"the checkpoint's chat template is broken ({reason(error)}); take another"
            ) from error

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as one text, special tokens written out.

        Raises UserError when the template rejects the messages, fails, or spends more than it may.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        with self._lock:
            self._environment.allow(sum(len(message.content) for message in messages))
            try:
                return self._template.render(
                    messages=turns, add_generation_prompt=add_generation_prompt, **self._special_tokens
                )
            except UserError:
                raise
            except Exception as error:  # of any kind: it is a stranger's program
                raise UserError(
                    f"the checkpoint's chat template refuses these messages ({reason(error)}); change their "
                    "roles or order, or take another checkpoint"
                ) from error


def _reject(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(date: day, form: str) -> str:
    return datetime.combine(date, time()).strftime(form)


def _to_json(
    value: object, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False
) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
