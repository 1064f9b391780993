"""Answers from a local Ollama server, streamed over its HTTP interface.

The protocol (Ollama's docs/api.md, "Generate a chat completion"): POST /api/chat answers with one JSON object
a line, pieces of text first; the last line says "done" and carries the counts, and times in nanoseconds.
GET /api/tags ("List local models") names each model's content by a digest.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NoReturn
from urllib.parse import urlsplit

from annotated_types import Gt, Le

from rag.cache import content_key
from rag.generate import LogLikelihood
from rag.ops.sampling import Sampling
from rag.types import Message, Usage, UserError
from rag.values import Count, Filled, check_fields

# Never through a proxy: the server is local, and a proxy could not reach it.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class OllamaGenerator:
    """A model that `ollama pull` has fetched, behind the same interface as our engine.

    Raises UserError when no server answers, the model is not there, the server reports an error, or its
    answer breaks off.
    """

    model: Filled = "llama3.2"
    url: Filled = "http://localhost:11434"
    context_length: Count = 4096  # tokens of prompt and answer; the server cuts longer prompts without a word
    # without a sign of life; loading a model can take minutes
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
        """64 hex digits of the model's digest and the context length; asks the server, which must answer."""
        return content_key("ollama", self._digest(), self.context_length)

    @property
    def description(self) -> str:
        """The model's name, and where it is."""
        return f"{self.model} at {self.url}"

    def count(self, text: str) -> int:
        """An estimate of the tokens of `text`: one for three UTF-8 bytes.

        The protocol has no tokenizer. English has four to five bytes a token and most scripts have three or
        more, so a budget that holds by this estimate nearly always holds in truth.
        """
        return -(-len(text.encode()) // 3)

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """An estimate of a conversation's tokens: its texts', and eight a turn for the chat format."""
        return sum(self.count(message.content) + 8 for message in messages)

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 256,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str | Usage]:
        """Yield the answer's text piece by piece as it is written, then its Usage."""
        options = {
            "num_ctx": self.context_length,
            "num_predict": max_new_tokens,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": -1,  # all tokens so far, as our own sampler does
        }
        if stop:  # an empty list would take away the model's own
            options["stop"] = list(stop)
        turns = [{"role": message.role, "content": message.content} for message in messages]
        body = {"model": self.model, "messages": turns, "stream": True, "options": options}
        for line in self._lines("/api/chat", body):
            if text := line.get("message", {}).get("content"):
                yield text
            if line.get("done"):
                yield _usage(line)
                return
        raise UserError(f"The answer of Ollama at {self.url} broke off before its end; try again.")

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 256,
        seeds: Sequence[int] | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """The answers to several conversations, asked for one after the other."""
        each = [0] * len(conversations) if seeds is None else seeds
        return [
            "".join(
                piece
                for piece in self.stream(messages, sampling, max_new_tokens, seed, stop)
                if isinstance(piece, str)
            )
            for messages, seed in zip(conversations, each, strict=True)
        ]

    def log_likelihood(self, pairs: Sequence[tuple[Sequence[Message], str]]) -> list[LogLikelihood]:
        """Raises UserError: the protocol gives the likelihood of no text that it is handed."""
        self._no_likelihood()

    def text_log_likelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """Raises UserError, as `log_likelihood` does."""
        self._no_likelihood()

    def _no_likelihood(self) -> NoReturn:
        raise UserError(
            "Ollama tells no likelihood of a given text: set generator=local, which can read the same file as "
            f"generator.weights=ollama:{self.model}"
        )

    def _digest(self) -> str:
        """What the server names the model's content by; a name without a tag means its tag `latest`."""
        [listed] = self._lines("/api/tags")
        wanted = self.model if ":" in self.model.rpartition("/")[2] else f"{self.model}:latest"
        try:
            digests = {model["name"]: model["digest"] for model in listed["models"]}
        except (KeyError, TypeError) as error:
            raise UserError(
                f"What answers at {self.url} does not speak Ollama's protocol: {str(listed)[:80]}"
            ) from error
        if wanted not in digests:
            raise UserError(self._absent())
        return digests[wanted]

    def _lines(self, path: str, body: dict | None = None) -> Iterator[dict]:
        """The objects of the server's answer, each as soon as its line is complete."""
        headers = {"Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}{path}", data, headers)
        try:
            with _direct.open(request, timeout=self.timeout_s) as response:
                for line in response:
                    yield self._object(line)
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

    def _object(self, line: bytes) -> dict:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"What answers at {self.url} does not speak Ollama's protocol: {line[:80]!r}"
            ) from error
        if not isinstance(value, dict):
            raise UserError(f"What answers at {self.url} does not speak Ollama's protocol: {line[:80]!r}")
        if "error" in value:
            raise UserError(f"Ollama at {self.url} reports: {value['error']}")
        return value

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        """Tell what a status other than 200 means."""
        with error:
            body = error.read().decode(errors="replace")
        try:
            reason = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError):
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


def _usage(last: dict) -> Usage:
    """The counts of the last line; a server leaves out those of a prompt that it still had in its cache."""
    return Usage(
        prompt_tokens=last.get("prompt_eval_count", 0),
        new_tokens=last.get("eval_count", 0),
        prefill_s=last.get("prompt_eval_duration", 0) / 1e9,
        decode_s=last.get("eval_duration", 0) / 1e9,
        prepare_s=last.get("load_duration", 0) / 1e9,
    )
