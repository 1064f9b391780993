"""Fuzz the loading of models: change tiny models, and check that each loads or is refused in one sentence.

    python -m tests.fuzz_models SEED CASES [numbers]    prints one JSON line a case: kind, outcome, seconds, sentence

A case changes one file at a few positions (bytes, or values of JSON, GGUF metadata or a template), and then uses it
like a user's model: configuration, tensors, tokenizer, a conversation, and with `numbers` logits or vectors.
It may take DEADLINE seconds and MEMORY bytes.
"""

import hashlib
import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from rag.models import conversion_cache, hub, wheel_file
from rag.models.bert import checkpoint as bert_checkpoint
from rag.models.bert import model as bert
from rag.models.llama import checkpoint as llama_checkpoint
from rag.models.llama.model import abstract, forward, logits
from rag.models.tokenizer.gguf import from_metadata
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.types import Message, UserError
from tests import tiny_models
from tests.hostile_templates import HOSTILE
from tests.one_sentence import is_one_sentence
from tests.tiny_models import CHATML, decoder_gguf, tokenizer_metadata, write_gguf

DEADLINE = 5  # seconds of a case
MEMORY = 3 << 30  # bytes more than before the first case

NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 65536, 1_000_000, 2**31 - 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1, -(2**31), -(2**63),
    10**30, 0.0, -0.0, 0.5, 1e-300, 1e300, 1e38, -1e9, 1e999,
)  # fmt: skip
TEXTS = (
    "", " ", "a", "\0", "\ud800", "\ufdd0", "x" * 5000, "../../etc/passwd", "/dev/zero", "null", "\x1b[31m", "<s>",
    "\U0001f916", "e\u0301", "{{ 'a' * 10**10 }}", "(a+)+$", "nan",
)  # fmt: skip
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 3000 + "]" * 3000,
    '{"a":1,"a":2}',
    "",
    "}",
    '"\\ud800"',
)


class Slow(BaseException):
    """A case did not end in time."""


# --- changes


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with some flipped, removed, inserted or overwritten by numbers, mostly near the beginning."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1) if rng.random() < 0.4 else rng.randrange(min(len(out), 400) + 1)
        match rng.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:]
            case 2:
                out[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))
            case 3:
                del out[at : at + rng.choice((1, 4, 8, 100))]
            case 4:
                number = rng.choice((0, 1, 9, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1))
                out[at : at + 8] = struct.pack("<Q", number)
            case 5:
                out[at : at + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xc3\x28\xa0\xa1", b"\0\0\xc0\x7f")
                )
    return bytes(out)


def another(value: object, rng: random.Random) -> object:
    """Return a value to replace another one, often of another type."""
    if isinstance(value, int | float) and rng.random() < 0.6:  # a value of the same type gets further
        return rng.choice(NUMBERS)
    if isinstance(value, str) and rng.random() < 0.6:
        return value[: rng.randrange(len(value) + 1)] + rng.choice(TEXTS)
    match rng.randrange(7):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.choice(TEXTS)
        case 2:
            return rng.choice((None, True, False, [], {}, [[]], [None], {"a": {}}))
        case 3:
            return [value]
        case 4:
            return {"content": value}
        case 5 if isinstance(value, int | float):
            return rng.choice((-value, value * 2, value + 1, str(value)))
        case 6 if isinstance(value, str):
            return value[: rng.randrange(len(value) + 1)] + rng.choice(TEXTS)
    return rng.choice(NUMBERS)


def changed_values(value: object, rng: random.Random) -> object:
    """Return a JSON value with a few of its inner values changed, removed or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder, spot = SimpleNamespace(value=value), None
        at: object = value
        while isinstance(at, dict | list) and at and (spot is None or rng.random() < 0.8):
            keys = list(at) if isinstance(at, dict) else range(len(at))
            parent, spot = at, rng.choice(keys)
            at = at[spot]
        if spot is None:
            return another(value, rng)
        if rng.random() < 0.2:
            del parent[spot]
        elif isinstance(parent, list) and rng.random() < 0.3:
            parent.insert(spot, parent[spot])
        else:
            parent[spot] = another(at, rng)
        value = holder.value
    return value


def changed_json(text: str, rng: random.Random) -> bytes:
    """Return a JSON text with changed characters or changed values."""
    match rng.randrange(4):
        case 0:
            return changed_bytes(text.encode(), rng)
        case 1:
            places = [i for i, c in enumerate(text) if c in ":,["]
            place = rng.choice(places) + 1 if places else 0
            return (text[:place] + rng.choice(RAW) + text[place + rng.randrange(3) :]).encode()
    return json.dumps(changed_values(json.loads(text), rng)).encode("utf-8", "surrogatepass")


# --- models


class Models:
    """Tiny models in a folder, and one method for each kind of case, which changes and loads a model."""

    def __init__(self, folder: Path, numbers: bool):
        self.folder, self.numbers = folder, numbers
        tiny_models.write_decoder(folder / "decoder")
        (folder / "decoder" / "generation_config.json").write_text('{"eos_token_id": [257]}')
        tiny_models.write_encoder(folder / "encoder")
        tiny_models.write_sentence_files(folder / "encoder", {"pooling_mode": "cls"})
        self.metadata, self.tensors = decoder_gguf()
        write_gguf(folder / "decoder.gguf", self.metadata, self.tensors)
        tiny_models.write_encoder_gguf(folder / "encoder.gguf", tiny_models.encoder_tensors())
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("m/model.safetensors", b"weights" * 1000)
            archive.writestr("m/config.json", b"{}")
        self.wheel = buffer.getvalue()
        digest = "sha256:" + "ab" * 32
        self.manifest = json.dumps(
            {"layers": [{"mediaType": hub._OLLAMA_MODEL, "digest": digest, "size": 9}]}
        )
        self.out = folder / "out"
        self.out.mkdir()

    def check(self) -> None:
        """Load the models unchanged, so that imports, allocations and compilations are not counted in a case."""
        for name in ("decoder", "encoder"):
            self.converted(name, self.folder / name)
            self.converted(name, self.folder / f"{name}.gguf")
        for family in ("gpt2", "llama", "bert"):
            self.used(from_metadata({**tokenizer_metadata(family), "tokenizer.chat_template": CHATML}))
        hub._model_digest(self.write("manifest", self.manifest.encode()))

    def write(self, name: str, data: bytes) -> Path:
        (self.folder / name).write_bytes(data)
        return self.folder / name

    def kinds(self) -> dict[str, Callable[[random.Random], object]]:
        return {
            "gguf bytes": self.gguf_bytes, "gguf metadata": self.gguf_metadata, "safetensors": self.safetensors,
            "config json": self.config_json, "tokenizer json": self.tokenizer_json, "manifest": self.manifests,
            "template": self.template, "wheel": self.wheels, "gguf tokenizer": self.gguf_tokenizer,
        }  # fmt: skip

    def gguf_bytes(self, rng: random.Random) -> object:
        name = rng.choice(("decoder", "encoder"))
        path = self.write("changed.gguf", changed_bytes((self.folder / f"{name}.gguf").read_bytes(), rng))
        return self.converted(name, path)

    def gguf_metadata(self, rng: random.Random) -> object:
        path = self.folder / "changed.gguf"
        path.unlink(missing_ok=True)
        metadata = dict(self.metadata)
        for key in rng.sample(
            [key for key in metadata if key.startswith("llama.")], rng.choice((1, 1, 2, 3))
        ):
            metadata[key] = another(metadata[key], rng)
        write_gguf(path, metadata, self.tensors)
        return self.converted("decoder", path)

    def gguf_tokenizer(self, rng: random.Random) -> object:
        metadata: dict = dict(tokenizer_metadata(rng.choice(("gpt2", "llama", "bert"))))
        for key in rng.sample(sorted(metadata), rng.choice((1, 1, 2, 3))):
            value = metadata[key]
            if isinstance(value, list) and rng.random() < 0.7:
                value = list(value)
                value[rng.randrange(len(value))] = another(rng.choice(value), rng)
                metadata[key] = value[: rng.choice((len(value), len(value), 3))]
            else:
                metadata[key] = another(value, rng)
        return self.used(from_metadata(metadata))

    def safetensors(self, rng: random.Random) -> object:
        name = rng.choice(("decoder", "encoder"))
        data = (self.folder / name / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        if rng.random() < 0.5:
            header = changed_json(data[8 : 8 + length].decode(), rng)
            changed = struct.pack("<Q", len(header)) + header + data[8 + length :]
        else:
            changed = changed_bytes(data, rng)
        return self.in_folder(name, "model.safetensors", changed)

    def config_json(self, rng: random.Random) -> object:
        name = rng.choice(("decoder", "encoder"))
        files = [path for path in (self.folder / name).rglob("*.json") if path.name != "tokenizer.json"]
        file = rng.choice(sorted(files))
        return self.in_folder(
            name, str(file.relative_to(self.folder / name)), changed_json(file.read_text(), rng)
        )

    def tokenizer_json(self, rng: random.Random) -> object:
        name = rng.choice(("decoder", "encoder"))
        text = (self.folder / name / "tokenizer.json").read_text()
        return self.in_folder(name, "tokenizer.json", changed_json(text, rng))

    def manifests(self, rng: random.Random) -> object:
        return hub._model_digest(self.write("manifest", changed_json(self.manifest, rng)))

    def template(self, rng: random.Random) -> object:
        source = rng.choice((CHATML, *HOSTILE.values()))[:5000]
        changed = changed_bytes(source.encode(), rng).decode(
            "utf-8", rng.choice(("replace", "surrogateescape"))
        )
        core_metadata = tokenizer_metadata("gpt2") | {"tokenizer.chat_template": changed}
        return self.used(from_metadata(core_metadata))

    def wheels(self, rng: random.Random) -> object:
        path = self.write("x.whl", changed_bytes(self.wheel, rng))
        target = self.folder / "unpacked" / str(rng.random())
        target.parent.mkdir(exist_ok=True)
        digest = hashlib.sha256(b"weights" * 1000).hexdigest()
        return wheel_file._unpack(path, rng.choice(("m", "m/config.json")), digest, target)

    def in_folder(self, name: str, file: str, data: bytes) -> object:
        """Load a model's folder with one of its files changed."""
        path = self.folder / name / file
        before = path.read_bytes()
        path.write_bytes(data)
        try:
            return self.converted(name, self.folder / name)
        finally:
            path.write_bytes(before)

    def converted(self, name: str, path: Path) -> object:
        """Convert a model as at its first start, and compute its logits or vectors."""
        module = llama_checkpoint if name == "decoder" else bert_checkpoint
        module.source_files(path)
        module._convert(path, self.out)
        weights = [np.load(file) for file in self.out.glob("*.npy")]
        assert all(np.isfinite(array).all() for array in weights)
        self.used(Tokenizer.load(self.out))
        if not self.numbers:
            return None
        with jax.disable_jit():  # what is jitted would be compiled for each case
            return self.logits() if name == "decoder" else self.vectors()

    def logits(self) -> None:
        config = llama_checkpoint.read_converted_config(self.out)
        model = conversion_cache.load_module(abstract(config), self.out)
        model = jax.tree.map(jax.numpy.asarray, model)
        hidden, _ = forward(model, jax.numpy.array([[1, 2, 0]]), jax.numpy.zeros(1, int))
        assert np.isfinite(logits(model, hidden[:, -1])).all()

    def vectors(self) -> None:
        settings = bert_checkpoint.read_converted_settings(self.out)
        model = conversion_cache.load_module(bert.abstract(settings.config), self.out)
        model = jax.tree.map(jax.numpy.asarray, model)
        tokens, lengths = jax.numpy.array([[1, 2, 0]]), jax.numpy.array([[3]])
        assert np.isfinite(bert.embed(model, tokens, lengths, pooling=settings.pooling)).all()

    def used(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("Hello, wor\u0301ld \U0001f916 <|im_end|> 1234")
        assert all(isinstance(index, int) and index >= 0 for index in ids)
        tokenizer.decode(ids)
        if tokenizer.spec.chat_template is not None:
            tokenizer.chat([Message("system", "Be brief."), Message("user", "he")])


def outcome(case: Callable[[random.Random], object], rng: random.Random) -> tuple[str, str]:
    """Run a case; return "loaded", "refused" or what is wrong, and the error message or traceback."""
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        case(rng)
        return "loaded", ""
    except UserError as error:
        return ("refused" if is_one_sentence(str(error)) else "no sentence"), str(error)
    except Slow:
        return "hang", traceback.format_exc()
    except BaseException:  # of any kind, including panics of the tokenizers library
        return "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def stop(*_) -> None:
    raise Slow


def main(seed: int, cases: int, numbers: bool) -> None:
    signal.signal(signal.SIGALRM, stop)
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder), numbers)
        models.check()
        kinds = models.kinds()
        limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MEMORY
        for number in range(cases):
            name = list(kinds)[number % len(kinds)]
            start = time.monotonic()
            found, message = outcome(kinds[name], random.Random(f"{seed} {number}"))
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > limit:
                found = "memory"
            line = {
                "case": number,
                "kind": name,
                "outcome": found,
                "seconds": time.monotonic() - start,
                "message": message,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["numbers"])
