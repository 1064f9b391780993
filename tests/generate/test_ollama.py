"""The Ollama client against a small server that speaks its protocol."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rag import pipeline
from rag.context import ContextOptions
from rag.embed.bag_of_words import BagOfWords
from rag.generate import Request, scorer_of
from rag.generate.ollama import OllamaGenerator
from rag.index.store import Index
from rag.ingest.chunk.whole import WholeChunker
from rag.ops.sampling import Sampling
from rag.pipeline import AnswerOptions, Reader
from rag.prompt import PromptTemplate
from rag.retrieve.collection import Collection
from rag.retrieve.search import Dense, Search
from rag.types import Message, Usage, UserError

MESSAGES = [Message("system", "Be brief."), Message("user", "What is attention? \u00e9\U0001f916")]
LAST = {
    "message": {"role": "assistant", "content": ""},
    "done": True,
    "load_duration": 500_000_000,
    "prompt_eval_count": 31,
    "prompt_eval_duration": 1_500_000_000,
    "eval_count": 5,
    "eval_duration": 250_000_000,
}
TAGS = {
    "models": [
        {"name": "llama3.2:latest", "model": "llama3.2:latest", "digest": "a80c4f17"},
        {"name": "llama3.2:1b", "model": "llama3.2:1b", "digest": "baf6a787"},
        {"name": "hf.co/some/model:latest", "model": "hf.co/some/model:latest", "digest": "c0ffee00"},
    ]
}


def line(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def said(text: str) -> bytes:
    return line({"model": "llama3.2", "message": {"role": "assistant", "content": text}, "done": False})


@contextmanager
def server(*writes: bytes, status: int = 200, finish: bool = True, pause: float = 0.0):
    """Answers each request with `writes`, one HTTP chunk each; remembers what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked.append((self.path, None))
            reply = line(TAGS)
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)
            self.close_connection = True

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, json.loads(body)))
            with suppress(ConnectionError):  # some clients here leave early
                self.answer()

        def answer(self):
            self.send_response(status)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in writes:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()
                time.sleep(pause)
            self.wfile.write(b"0\r\n\r\n" if finish else b"ff\r\n{")  # or promise 255 bytes, and leave
            self.close_connection = True

        def log_message(self, *_):
            pass

    asked: list = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = False  # so that closing waits for the last answer
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", asked
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def answer(url: str, **settings) -> list:
    return list(OllamaGenerator(url=url, **settings).stream(Request(MESSAGES, max_new_tokens=32)))


def test_streams_the_pieces_then_the_usage():
    with server(said("It "), said("weighs "), said("\u00e9\U0001f916"), line(LAST)) as (url, _):
        pieces = answer(url)
    assert pieces == [
        "It ",
        "weighs ",
        "\u00e9\U0001f916",
        Usage(31, 5, prefill_s=1.5, decode_s=0.25, prepare_s=0.5),
    ]


def test_asks_for_what_was_set():
    sampling = Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.2)
    with server(line(LAST)) as (url, asked):
        generator = OllamaGenerator(model="qwen3:0.6b", url=f"{url}/", context_length=2048)
        list(generator.stream(Request(MESSAGES, sampling, max_new_tokens=77, seed=5, stop=["\n\n"])))
        list(generator.stream(Request(MESSAGES)))
    path, body = asked[0]
    assert path == "/api/chat"
    assert body["model"] == "qwen3:0.6b"
    assert body["stream"] is True
    assert body["messages"] == [{"role": m.role, "content": m.content} for m in MESSAGES]
    assert body["options"] == {
        "num_ctx": 2048,
        "num_predict": 77,
        "seed": 5,
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repeat_penalty": 1.2,
        "repeat_last_n": -1,
    }
    assert asked[1][1]["options"]["temperature"] == 0.0


def stopped(url: str, **options) -> tuple[str, Usage]:
    *pieces, usage = OllamaGenerator(url=url).stream(Request(MESSAGES, max_new_tokens=32, **options))
    return "".join(pieces), usage


def test_an_answer_ends_here_and_the_models_own_stop_strings_stay():
    said_all = [said(piece) for piece in ("It is red", ". It", " is red. It is", " red. ", "EN", "D")]
    with server(*said_all, line(LAST | {"done_reason": "length"})) as (url, asked):
        assert stopped(url)[0] == "It is red. It is red. It is red. END"
        text, usage = stopped(url, stop=("END",))
        assert (text, usage.finish_reason) == ("It is red. It is red. It is red. ", "stop")
        assert OllamaGenerator(url=url).generate([Request(MESSAGES, stop=("is",))]) == ["It "]
        assert stopped(url)[1].finish_reason == "length"
    assert all("stop" not in body["options"] for _, body in asked)


def test_a_repetition_ends_the_answer_before_the_server_does():
    sentence = said("The hut is red. ")
    with server(said("A hut stands there. "), *[sentence] * 9, line(LAST)) as (url, _):
        text, usage = stopped(url, no_repeat=True)
    assert text == "A hut stands there. The hut is red. "
    assert usage.new_tokens == 4  # pieces: it ended when the sentence after the repetition began
    assert (usage.prompt_tokens, usage.finish_reason) == (OllamaGenerator().prompt_tokens(MESSAGES), "stop")
    with server(said("The hut is red. "), said("The hut is red."), line(LAST)) as (url, _):
        assert stopped(url, no_repeat=True)[0] == "The hut is red. "


def test_lines_split_and_joined_by_the_network():
    whole = said("\U0001f916 one") + said(" two") + line(LAST)
    with server(*[whole[i : i + 7] for i in range(0, len(whole), 7)]) as (url, _):
        assert answer(url)[:2] == ["\U0001f916 one", " two"]
    with server(whole) as (url, _):
        assert answer(url)[:2] == ["\U0001f916 one", " two"]


def test_a_piece_arrives_before_the_answer_is_complete():
    with server(said("first"), said("second"), line(LAST), pause=0.2) as (url, _):
        stream = OllamaGenerator(url=url).stream(Request(MESSAGES))
        assert next(stream) == "first"
        stream.close()  # as on Ctrl-C: the connection ends, the server notices


def test_counts_missing_from_the_last_line_are_zero():
    with server(line({"done": True})) as (url, _):
        assert answer(url) == [Usage(0, 0, 0.0, 0.0)]


@pytest.mark.parametrize(("reason", "expected"), [("stop", "stop"), ("length", "length"), ("load", "stop")])
def test_why_the_answer_ended(reason, expected):
    with server(line(LAST | {"done_reason": reason})) as (url, _):
        [usage] = answer(url)
    assert usage.finish_reason == expected


def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match=r"No Ollama server answers at http://127.*`ollama serve`"):
            answer(url)


def test_a_proxy_is_not_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with server(said("hi"), line(LAST)) as (url, _):
        assert answer(url)[0] == "hi"


def test_a_model_that_was_not_pulled():
    body = line({"error": "model 'nope' not found"})
    with (
        server(body, status=404) as (url, _),
        pytest.raises(UserError, match=r"no model 'nope'.*`ollama pull nope`"),
    ):
        answer(url, model="nope")


@pytest.mark.parametrize(
    ("writes", "options", "message"),
    [
        ([line({"error": "out of memory"})], {"status": 500}, "reports: out of memory"),
        ([b"<html>nginx</html>"], {"status": 404}, r"status 404: is it an Ollama server\?"),
        ([said("a"), line({"error": "unexpected EOF"})], {}, "reports: unexpected EOF"),
        ([said("a")], {}, "broke off"),
        ([said("a")], {"finish": False}, "broke off|protocol"),
        ([b"hello\n"], {}, "does not speak Ollama's protocol"),
        ([b"[1]\n"], {}, "does not speak Ollama's protocol"),
    ],
)
def test_what_goes_wrong_is_one_sentence(writes, options, message):
    with server(*writes, **options) as (url, _), pytest.raises(UserError, match=message) as caught:
        answer(url)
    assert "\n" not in str(caught.value)


def test_a_silent_server():
    slow = server(said("a"), line(LAST), pause=0.6)
    with slow as (url, _), pytest.raises(UserError, match=r"silent for 0\.2 s"):
        answer(url, timeout_s=0.2)


@pytest.mark.parametrize(
    "url", ["localhost:11434", "file:///etc/passwd", "http://", "http://a:b", "http://a b"]
)
def test_only_web_addresses(url):
    with pytest.raises(UserError, match="no web address"):
        OllamaGenerator(url=url)


@pytest.mark.parametrize(("text", "count"), [("", 0), ("abc", 1), ("abcd", 2), ("\u6ce8\u610f", 2)])
def test_count_is_a_third_of_the_bytes(text, count):
    assert OllamaGenerator().count(text) == count


def test_the_fingerprint_is_of_the_models_content():
    with server() as (url, asked):
        prints = {
            name: OllamaGenerator(model=name, url=url).fingerprint
            for name in ("llama3.2", "llama3.2:latest", "llama3.2:1b", "hf.co/some/model")
        }
        shorter = OllamaGenerator(url=url, context_length=512).fingerprint
        with pytest.raises(UserError, match=r"no model 'nope'.*`ollama pull nope`"):
            _ = OllamaGenerator(model="nope", url=url).fingerprint
    assert {path for path, _ in asked} == {"/api/tags"}
    assert prints["llama3.2"] == prints["llama3.2:latest"]
    assert len({*prints.values(), shorter}) == 4
    assert all(len(value) == 64 for value in prints.values())


def test_a_batch_is_asked_one_after_the_other():
    with server(said("one "), said("two"), line(LAST)) as (url, asked):
        generator = OllamaGenerator(url=url)
        asked_for = [Request(MESSAGES, max_new_tokens=9, seed=4, stop=["\n"])]
        asked_for.append(replace(asked_for[0], messages=MESSAGES[1:], seed=5))
        answers = generator.generate(asked_for)
        assert generator.generate([]) == []
    assert answers == ["one two", "one two"]
    assert [len(body["messages"]) for _, body in asked] == [2, 1]
    assert [body["options"]["seed"] for _, body in asked] == [4, 5]
    assert {body["options"]["num_predict"] for _, body in asked} == {9}


def test_no_likelihood_of_a_given_text():
    sentence = r"llama3\.2 at http.* no likelihood .*generator=local.*weights=ollama:"
    with server() as (url, _), pytest.raises(UserError, match=sentence):
        scorer_of(OllamaGenerator(url=url))


def test_the_pipeline_answers_through_it(tmp_path):
    (tmp_path / "seal.txt").write_text("A seal eats fish.")
    pipeline.ingest(tmp_path / "seal.txt", tmp_path / "index", WholeChunker(), BagOfWords())
    index = Index.open(tmp_path / "index")
    retriever = Search(Collection(index, index.restore(BagOfWords())), Dense(), k=1)
    template = PromptTemplate(user="{context} {question}")
    with server(said("Fish"), said(" [1]"), line(LAST)) as (url, asked):
        reader = Reader(
            OllamaGenerator(url=url), template, ContextOptions(), options=AnswerOptions(max_new_tokens=16)
        )
        *pieces, answer = pipeline.answer("what does a seal eat", retriever, reader)
    assert pieces == ["Fish", " [1]"]
    assert answer.answer == "Fish [1]"
    assert answer.timings.prompt_tokens == 31
    [body] = [body for path, body in asked if path == "/api/chat"]
    assert body["messages"] == [{"role": "user", "content": "[1] A seal eats fish. what does a seal eat"}]
