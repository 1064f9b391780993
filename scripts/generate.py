"""Answer a question with a streamed, cited answer; without a question, start an interactive session.

python scripts/generate.py index.path=.demo/index question="Why was Halden Island closed in 2023?"
python scripts/generate.py index.path=.demo/index question="..." output=json | python -m json.tool
"""

from __future__ import annotations  # the types below are imported in main: a typo should not wait for JAX

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import DocInfo
from launch import launch
from settings import IndexFolder, build
from system import SystemSettings, build_method

from rag.runtime.options import Count, Question
from rag.types import Answer, Message, Source, UserError

if TYPE_CHECKING:
    from rag.generate import Generator
    from rag.pipeline import Reader
    from rag.retrieve.search import Search

COMMANDS = "/sources  what the last answer was shown, /context  its passages in full, /quit  leave"


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(SystemSettings):
    """The settings of conf/generate.yaml."""

    index: IndexFolder
    k: Count
    question: Annotated[
        Question | None, DocInfo("a question that is not empty; leave it out for an interactive session")
    ]
    output: Literal["text", "json"]


def main(config) -> None:
    if config.question is None and config.output == "json":
        raise UserError('output=json answers one question: give it as question="..."')
    if config.question is None and sys.stdin is None:
        raise UserError('Stdin is closed, so nobody can ask: give question="..."')
    from rag.index.store import Index
    from rag.pipeline import Reader
    from rag.retrieve.collection import Collection
    from rag.retrieve.search import Search

    index = Index.open(Path(config.index.path).expanduser())
    stages = (build(config[name]) for name in ("generator", "prompt", "context", "sampling", "answer"))
    reader = Reader(*stages)
    collection = Collection(index, index.restore(build(config.embedder)), lambda: reader.generator)
    search = Search(collection, build_method(config), config.k)
    if config.question is None:
        converse(search, reader)
    elif config.output == "json":
        print(as_json(ask(config.question, search, reader, echo=False), reader.generator))
    else:
        show(ask(config.question, search, reader), reader.generator)


def ask(
    question: str,
    search: Search,
    reader: Reader,
    history: Sequence[Message] = (),
    echo: bool = True,
) -> Answer:
    """Return the answer; with `echo` its text is streamed to the terminal."""
    from rag import pipeline

    for piece in pipeline.answer(question, search, reader, history):
        if isinstance(piece, Answer):
            return piece
        if echo:
            print(piece, end="", flush=True)
    raise RuntimeError("the pipeline ended without an Answer")


def show(answer: Answer, generator: Generator) -> None:
    """Print what follows the streamed text: notices, sources, seconds, and the generator."""
    from rag.generate import describe

    print("\n")
    for notice in answer.notices:
        print(notice)
    show_sources(answer.sources)
    t = answer.timings
    parts = [f"retrieval {t.retrieve_s:.2f} s"]
    if not answer.abstained:
        parts += [
            f"prefill {t.prompt_tokens} tokens in {t.prefill_s:.2f} s ({_rate(t.prompt_tokens, t.prefill_s)})",
            f"decode {t.new_tokens} tokens in {t.decode_s:.2f} s ({_rate(t.new_tokens - 1, t.decode_s)})",
        ]
    if t.prepare_s:
        parts.append(f"and {t.prepare_s:.2f} s to make or load programs, counted in none of these")
    if not answer.abstained:
        parts.append(describe(generator))
    print("; ".join(parts))


def _rate(tokens: int, seconds: float) -> str:
    """Return tokens per second, or "no rate" where nothing was measured."""
    return f"{tokens / seconds:.0f} tokens/s" if tokens > 0 and seconds > 0 else "no rate"


def show_sources(sources: Sequence[Source]) -> None:
    """Print a line for each source."""
    for source in sources:
        print(f"[{source.n}] {source.path}:{source.start}-{source.end}  score {source.score:.3f}")


def as_json(answer: Answer, generator: Generator) -> str:
    """Return the one JSON object of output=json."""
    from rag.generate import describe
    from rag.runtime.machine import environment

    return json.dumps(asdict(answer) | {"generator": describe(generator), "environment": environment()})


def converse(search: Search, reader: Reader) -> None:
    """Answer questions from the terminal until /quit or the end of input; earlier turns stay in the prompt."""
    index = search.collection.index
    print(f"Ask about {len(index)} chunks of {index.path}. {COMMANDS}", file=sys.stderr)
    history: list[Message] = []
    last: Answer | None = None
    while (line := _read_line()) is not None:
        match line:
            case "":
                continue
            case "/quit":
                return
            case "/sources":
                show_sources(last.sources if last else ())
            case "/context":
                for source in last.sources if last else ():
                    print(f"[{source.n}] {source.path}:{source.start}-{source.end}\n{source.text}\n")
            case _ if line.startswith("/"):
                print(f"There is no command {line}. {COMMANDS}")
            case question:
                last = _turn(question, search, reader, history) or last


def _turn(question: str, search: Search, reader: Reader, history: list[Message]) -> Answer | None:
    """Answer one question of a session; None, and a printed sentence, where that fails."""
    try:
        answer = ask(question, search, reader, history)
    except UserError as error:
        print(error)
        return None
    show(answer, reader.generator)
    history += [Message("user", question), Message("assistant", answer.answer)]
    return answer


def _read_line() -> str | None:
    """Return the next line of stdin, stripped; None at its end. Raises UserError where stdin cannot be read."""
    try:
        return input("\n> ").strip()
    except EOFError:
        return None
    except OSError as error:
        raise UserError(
            f'Cannot read questions from stdin ({error.strerror}): give question="..."'
        ) from error


if __name__ == "__main__":
    launch(main, "generate", GenerateSettings)
