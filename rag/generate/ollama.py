"""Generate answers by a local Ollama server, streamed over its HTTP interface.

The protocol (Ollama's docs/api.md, "Generate a chat completion"): POST /api/chat answers with one JSON object
a line, pieces of text first; the last line says "done" and carries the counts, and times in nanoseconds.
GET /api/tags ("List local models") names each model's content by a digest.
"""

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, NoReturn, TypeVar
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Le

from rag.generate import Request, join_text
from rag.generate.stop_text import EndedText
from rag.runtime.cache.keys import content_key
from rag.runtime.options import Count, Filled, check_fields
from rag.runtime.records import OpenRecord, parse_json
from rag.runtime.shapes import ceil_div
from rag.types import Message, Usage, UserError

_MAX_LINE = 1 << 24  # bytes of one line of an answer; a line that is cut there is no JSON
_MAX_ERROR = 500  # characters shown of an error that the server reports
_Amount = Annotated[int, Ge(0), Le(2**63 - 1)]

S = TypeVar("S", bound=OpenRecord)


class _LineMessage(OpenRecord):
    content: str | None = None


class _ChatLine(OpenRecord):
    """A line of the answer to /api/chat; the last one has done=true and the counts."""

    message: _LineMessage = _LineMessage()
    done: bool = False
    done_reason: str = ""
    prompt_eval_count: _Amount = 0  # a server leaves out what it still had in its cache
    eval_count: _Amount = 0
    prompt_eval_duration: _Amount = 0  # nanoseconds, as the others
    eval_duration: _Amount = 0
    load_duration: _Amount = 0

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_eval_count,
            new_tokens=self.eval_count,
            prefill_s=self.prompt_eval_duration / 1e9,
            decode_s=self.eval_duration / 1e9,
            prepare_s=self.load_duration / 1e9,
            finish_reason="length" if self.done_reason == "length" else "stop",
        )


class _ListedModel(OpenRecord):
    name: str
    digest: str


class _ModelList(OpenRecord):
    """The answer to /api/tags."""

    models: list[_ListedModel]


# Never through a proxy: the server is local, and a proxy could not reach it.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class OllamaGenerator:
    """Answers by a model that `ollama pull` has fetched.

    Its methods raise UserError when no server answers, the server lacks the model, the server reports an error, or its
    answer breaks off.
    """

    model: Filled = "llama3.2"
    url: Filled = "http://localhost:11434"
    context_length: Count = 4096  # tokens of prompt and answer; the server silently cuts longer prompts
    # seconds without any data; loading a model can take minutes
    timeout_s: Annotated[float, Gt(0), Le(1e6)] = 300.0

    def __post_init__(self):
        check_fields(self)
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number
            valid = False
        if not valid or any(map(str.isspace, self.url)):
            raise UserError(f"generator.url={self.url!r} is no web address: write it as http://host:port")

    @property
    def fingerprint(self) -> str:
        """Return 64 hex digits of the model's digest, which the server is asked for, and the context length."""
        return content_key("ollama", self._digest(), self.context_length)

    @property
    def description(self) -> str:
        """Return the model's name and the server's address."""
        return f"{self.model} at {self.url}"

    def count(self, text: str) -> int:
        """Return an estimate of a text's tokens: one for three UTF-8 bytes.

        The protocol has no tokenizer. English has four to five bytes a token and most scripts have three or
        more, so a budget that holds by this estimate nearly always holds in truth.
        """
        return ceil_div(len(text.encode()), 3)

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Return an estimate of a conversation's tokens: its texts', and eight a turn for the chat format."""
        return sum(self.count(message.content) + 8 for message in messages)

    def stream(self, request: Request) -> Iterator[str | Usage]:
        """Yield the answer's text piece by piece as it arrives, then its Usage.

        Stop strings are looked for here: given to the server, they would replace the model's own. An answer that ends
        at one closes the connection, so the server stops decoding; its Usage then has estimated numbers of tokens.
        """
        sampling = request.sampling
        options: dict[str, object] = {
            "num_ctx": self.context_length,
            "num_predict": request.max_new_tokens,
            "seed": request.seed,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": -1,  # all tokens so far, as our own sampler does
        }
        turns = [{"role": message.role, "content": message.content} for message in request.messages]
        body = {"model": self.model, "messages": turns, "stream": True, "options": options}
        text, times = EndedText(request), [time.perf_counter()]
        for line in self._lines("/api/chat", _ChatLine, body):
            if line.message.content:
                times.append(time.perf_counter())
                if piece := text.push(line.message.content):
                    yield piece
            if line.done or text.stopped:
                if piece := text.finish():
                    yield piece
                usage = line.usage() if line.done else self._estimated_usage(request, times)
                yield replace(usage, finish_reason="stop") if text.stopped else usage
                return
        raise UserError(f"The answer of Ollama at {self.url} broke off before its end; try again.")

    def _estimated_usage(self, request: Request, times: Sequence[float]) -> Usage:
        """Return the usage of an answer whose last line is not waited for, a piece of text counted as a token.

        Args:
            request: what was asked.
            times: when it was asked, and when each piece arrived.
        """
        prefill_s, decode_s = times[1] - times[0], times[-1] - times[1]
        return Usage(self.prompt_tokens(request.messages), len(times) - 1, prefill_s, decode_s)

    def generate(self, requests: Sequence[Request]) -> list[str]:
        """Return the answers to several requests, which the server gets one after another."""
        return [join_text(self.stream(request)) for request in requests]

    def _digest(self) -> str:
        """Return the server's digest of the model's content; a name without a tag has the tag `latest`."""
        listed = next(self._lines("/api/tags", _ModelList), _ModelList(models=[]))
        wanted = self.model if ":" in self.model.rpartition("/")[2] else f"{self.model}:latest"
        digests = {model.name: model.digest for model in listed.models}
        if wanted not in digests:
            raise UserError(self._absent())
        return digests[wanted]

    def _lines(self, path: str, schema: type[S], body: dict | None = None) -> Iterator[S]:
        """Yield the objects of the server's answer, each as soon as its line is complete."""
        headers = {"Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}{path}", data, headers)
        try:
            with _direct.open(request, timeout=self.timeout_s) as response:
                while line := response.readline(_MAX_LINE):
                    yield self._record(line, schema)
        except urllib.error.HTTPError as error:
            self._refused(error)
        except TimeoutError as error:
            raise UserError(self._silent()) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise UserError(self._silent()) from error
            raise UserError(
                f"No Ollama server answers at {self.url} ({error.reason}): start one with `ollama serve`, "
                "or set generator.url."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"The answer of Ollama at {self.url} broke off ({error!r}); try again."
            ) from error

    def _record(self, line: bytes, schema: type[S]) -> S:
        try:
            value = parse_json(line)
            if failed := _reported(value):
                raise UserError(f"Ollama at {self.url} reports: {failed}")
            return schema.model_validate(value)
        except ValueError as error:  # pydantic's among them
            raise UserError(
                f"What answers at {self.url} does not speak Ollama's protocol: {line[:80]!r}"
            ) from error

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        """Raise UserError for an HTTP status other than 200."""
        reason = None
        with error, contextlib.suppress(ValueError, OSError, http.client.HTTPException):
            reason = _reported(parse_json(error.read(_MAX_LINE)))
        if reason is None:
            raise UserError(
                f"{self.url} answers with HTTP status {error.code}: is it an Ollama server?"
            ) from error
        if error.code == 404:
            raise UserError(self._absent()) from error
        raise UserError(f"Ollama at {self.url} reports: {reason}") from error

    def _absent(self) -> str:
        return (
            f"Ollama at {self.url} has no model {self.model!r}: fetch it with `ollama pull "
            f"{self.model}`, or set generator.model to one that `ollama list` shows."
        )

    def _silent(self) -> str:
        return f"Ollama at {self.url} was silent for {self.timeout_s:g} s: set generator.timeout_s higher."


def _reported(value: object) -> str | None:
    """Return the error that a server's object reports, or None."""
    error = value.get("error") if isinstance(value, dict) else None
    return " ".join(error.split())[:_MAX_ERROR] if isinstance(error, str) else None
