"""An interactive session: answer one question after another, and obey its commands."""

from __future__ import annotations  # the types below are imported in functions: a typo must not wait for JAX

import sys
from typing import TYPE_CHECKING

import process
from answers import ask, show, show_sources

from rag.types import Answer, UserError

if TYPE_CHECKING:
    from rag.pipeline import Reader
    from rag.retrieve.search import Search

EARLIER = 2  # questions that are searched for together with a new one
HELP = f"""\
Type a question. Passages are searched for it and for the {EARLIER} questions before it, so "And when?" finds what it is
about. The model is shown the passages and the new question, but no earlier questions and no earlier answers.
/sources  where the passages of the last answer come from    /context  the same with their full text
/new      forget the earlier questions                       /help     this text
/quit     leave"""


def converse(search: Search, reader: Reader) -> None:
    """Answer questions from the terminal until /quit, the end of input, or Ctrl-C at the prompt."""
    index = search.collection.index
    print(
        f"Ask about {len(index)} chunks of {index.path}. /help explains how, /quit leaves.", file=sys.stderr
    )
    earlier: list[str] = []
    last: Answer | None = None
    while (line := _read_line()) is not None:
        match line:
            case "":
                continue
            case "/quit":
                return
            case "/help":
                print(HELP)
            case "/new":
                earlier.clear()
                print("A new conversation.")
            case "/sources" | "/context":
                show_sources(last.sources if last else (), in_full=line == "/context")
            case _ if line.startswith("/"):
                print(f"There is no command {line!r}: /help shows all.")
            case "help" | "quit" | "exit":
                print("Commands begin with a slash: /help, /quit.")
            case question:
                if answer := _answer(question, earlier, search, reader):
                    last = answer
                    earlier.append(question)


def _answer(question: str, earlier: list[str], search: Search, reader: Reader) -> Answer | None:
    """Answer one question and print the answer; where that fails or Ctrl-C ends it, print why and return None."""
    # The new question comes first: an embedder that cuts long texts cuts the end.
    search_text = " ".join([question, *earlier[: -EARLIER - 1 : -1]])
    try:
        answer = ask(question, search, reader, search_text)
        show(answer, reader)
        return answer
    except (Exception, KeyboardInterrupt) as error:
        if process.interrupted() or isinstance(error, KeyboardInterrupt):  # libraries convert it
            process.prepare_ctrl_c()
            print("\nInterrupted.")
        elif isinstance(error, UserError):
            print(error)
        else:
            raise
    return None


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
