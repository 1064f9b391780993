"""Run chat templates, the Jinja text of a checkpoint, in a sandbox with the names that such templates use.

A template is a program that comes with the weights. It runs in jinja2's immutable sandbox: no attributes that
start with an underscore, no changes to its arguments, no imports. It may use the names that Hugging Face
transformers offers: raise_exception, strftime_now, the tojson filter, break and continue, and {% generation %} blocks
(rendered as they are). Its output depends only on the messages and a given date: the clock and jinja2's random
functions are removed. Its time and memory are limited (rag.models.tokenizer.template_limits).
"""

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import date as day
from datetime import datetime, time
from functools import partial

import jinja2
from jinja2.ext import Extension

from rag.models.tokenizer.template_limits import MeteredEnvironment
from rag.runtime.records import reason
from rag.types import Message, UserError


class _GenerationBlock(Extension):
    """Renders the body of {% generation %} ... {% endgeneration %}, a block that marks text for training."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template, which renders conversations. Safe in threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str | None], date: day):
        """Compile a template.

        Args:
            source: its Jinja text.
            special_tokens: the texts of bos_token, eos_token and so on.
            date: strftime_now gives midnight of this day.

        Raises:
            UserError: the template is broken or beyond the limits.
        """
        self._environment = MeteredEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        self._environment.add_filter("tojson", _to_json)
        self._environment.globals |= {"raise_exception": _reject, "strftime_now": partial(_now, date)}
        self._special_tokens = dict(special_tokens)
        self._lock = threading.Lock()  # the environment counts the units of one rendering at a time
        try:
            self._template = self._environment.template(source)
        except UserError:
            raise
        except Exception as error:  # of any kind: from jinja2 or Python's compiler, of an unknown program
            raise UserError(
                f"the checkpoint's chat template is broken ({reason(error)}); take another"
            ) from error

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Return the conversation as one text, with the texts of special tokens.

        Raises UserError if the template rejects the messages, fails, or exceeds its limits.
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
            except Exception as error:  # of any kind: it is an unknown program
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
    """Return plain JSON; jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
