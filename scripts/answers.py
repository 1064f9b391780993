"""Ask one question, and print the answer with its sources and its times, or return it as JSON."""

from __future__ import annotations  # the types below are imported in functions: a typo must not wait for JAX

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rag.types import Answer, Source

if TYPE_CHECKING:
    from rag.generate import Generator
    from rag.pipeline import Reader
    from rag.retrieve.search import Search

_PATIENCE = 0.5  # seconds of compiling after which it is mentioned
_HEADING = 100  # characters of a heading that are shown


def ask(
    question: str, search: Search, reader: Reader, search_text: str | None = None, echo: bool = True
) -> Answer:
    """Return the answer; with `echo` its text is streamed to the terminal.

    Args:
        question: As the user asks it.
        search: Finds passages.
        reader: Makes an answer of them.
        search_text: What passages are searched for; None: the question.
        echo: Whether the text is printed while it is decoded.
    """
    from rag import pipeline

    with _CompilingNotice() as notice:
        for piece in pipeline.answer(question, search, reader, search_text=search_text):
            if isinstance(piece, Answer):
                return piece
            if echo:
                notice.stop()  # it would be in the middle of the answer
                print(piece, end="", flush=True)
    raise RuntimeError("the pipeline ended without an Answer")


class _CompilingNotice:
    """Print "compiling ..." on stderr, once, when JAX needs more than half a second to make programs."""

    def __enter__(self) -> _CompilingNotice:
        import jax

        self._left, self._timer = _PATIENCE, threading.Timer(0.0, self._print)
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        import jax

        self.stop()
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def stop(self) -> None:
        """Print nothing from now on."""
        self._left = float("inf")
        self._timer.cancel()

    def _hear(self, event: str, seconds: float, **_: object) -> None:
        """Start the timer when a program was lowered; stop it when that was compiled, or loaded from the cache."""
        if self._left == float("inf"):
            return
        if event.endswith("/jaxpr_to_mlir_module_duration"):
            self._timer.cancel()
            self._timer = threading.Timer(max(0.0, self._left), self._print)
            self._timer.daemon = True
            self._timer.start()
        elif event.endswith("/backend_compile_duration"):
            self._timer.cancel()
            self._left -= seconds

    def _print(self) -> None:
        self.stop()
        print("compiling ... (only now: the programs are cached)", file=sys.stderr, flush=True)


def show(answer: Answer, reader: Reader) -> None:
    """Print what follows the streamed text: notices, sources, seconds, and the generator."""
    from rag.generate import describe

    if answer.finish_reason == "length":
        print(f" (cut at answer.max_new_tokens={reader.options.max_new_tokens})", end="")
    print("\n")
    for notice in answer.notices:
        print(notice)
    show_sources(answer.sources)
    t = answer.timings
    parts = [f"retrieval {t.retrieve_s:.2f} s"]
    if t.prompt_tokens:  # else no model was asked
        parts += [
            f"prefill {t.prompt_tokens} tokens in {t.prefill_s:.2f} s ({_rate(t.prompt_tokens, t.prefill_s)})",
            f"decode {t.new_tokens} tokens in {t.decode_s:.2f} s ({_rate(t.new_tokens - 1, t.decode_s)})",
        ]
    if t.prepare_s:
        parts.append(f"and {t.prepare_s:.2f} s to make or load programs, counted in none of these")
    if t.prompt_tokens:  # else no model was asked
        parts.append(describe(reader.generator))
    print("; ".join(parts))


def _rate(tokens: int, seconds: float) -> str:
    """Return tokens per second, or "no rate" where nothing was measured."""
    return f"{tokens / seconds:.0f} tokens/s" if tokens > 0 and seconds > 0 else "no rate"


def show_sources(sources: Sequence[Source], in_full: bool = False) -> None:
    """Print each source in the order of the prompt: where it is, its score, and an excerpt or all of its text."""
    from rag.citations import excerpt

    if not sources:
        print("No sources.")
        return
    best = _best(sources)
    if len(sources) > 1:
        last = ", the last, next to the question" if best == sources[-1] else ""
        print(f"{len(sources)} sources in the order of the prompt; the best is [{best.n}]{last}:")
    for source in sources:
        title = source.heading
        title = title if len(title) <= _HEADING else title[: _HEADING - 1] + "\N{HORIZONTAL ELLIPSIS}"
        heading = f", {title}" if title else ""
        print(f"[{source.n}] {source.path}:{_lines(source)}{heading}  score {source.score:.3f}")
        print(f"{source.text}\n" if in_full else f"    {excerpt(source)}")


def _best(sources: Sequence[Source]) -> Source:
    """Return the source of the highest score; of equal scores the last: by default (context=reverse) it is the best."""
    return max(reversed(sources), key=lambda source: source.score)


def _lines(source: Source) -> str:
    one = source.first_line == source.last_line
    return str(source.first_line) if one else f"{source.first_line}-{source.last_line}"


def as_json(answer: Answer, generator: Generator) -> str:
    """Return the JSON object of output=json: the fields of Answer, and what `show_sources` prints of each source."""
    from rag.citations import excerpt
    from rag.generate import describe
    from rag.runtime.machine.hardware import environment

    sources = [
        asdict(source)
        | {
            "last_line": source.last_line,
            "excerpt": excerpt(source),
            "best": source == _best(answer.sources),
        }
        for source in answer.sources
    ]
    more = {"sources": sources, "generator": describe(generator), "environment": environment()}
    return json.dumps(asdict(answer) | more)
