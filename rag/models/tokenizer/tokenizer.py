"""Text to token ids and back, whatever the checkpoint: one class over the `tokenizers` library.

A tokenizer comes from a Hugging Face folder (`from_folder`, in tokenizer_folder.py), from GGUF metadata
(`from_gguf`, in tokenizer_gguf.py), or from a folder that `save` wrote (`load`).

Two kinds of special token are kept apart. Those that a model's format adds around a text (BOS, [CLS], [SEP])
come with `special=True`. Those that are written inside a text, such as "<|im_end|>", are plain characters
unless `parse_special=True`: a retrieved passage cannot end the turn or start one.
"""

import codecs
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date as day
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from jaxtyping import Int

from rag.runtime.records import parse_json, reason
from rag.types import Message, UserError

TOKENIZER_FILE = "tokenizer.json"
SPEC_FILE = "tokenizer_spec.json"
_MOST_JSON = 1 << 26  # bytes of the files beside a tokenizer
_UNLIKELY = "a \U000f0000 \U0001f916\n"  # a text of which most vocabularies lack a part
_HALF = "\\ud"  # how JSON's escapes of the halves of characters begin
DEFAULT_DATE = day(2026, 1, 1)  # that chat templates are told: the same prompts every day

# Tokens that end a turn or a text in the checkpoints of the Llama family, whatever their metadata says.
END_TEXTS = frozenset({
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
    "</s>", "<eos>", "<｜end▁of▁sentence｜>",  # DeepSeek writes full-width bars
})  # fmt: skip

# Marks in a conversation that is being written, taken out again before it becomes tokens. They are halves of
# surrogate pairs, which `_valid` leaves in no text: whatever the messages hold, no mark can be taken for theirs.
_MASK, _END_FIXED, _BEGIN, _END = "\ud800", "\ud801", "\ud802", "\ud803"
_CUTS = re.compile(f"([{_END_FIXED}{_BEGIN}{_END}])")

Kind = Literal["byte_level", "sentencepiece", "wordpiece", "other"]


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """What tokenizer.json does not say. Ids are None where the model has no such token."""

    kind: Kind  # how a token's text stands for bytes
    bos_id: int | None = None  # [CLS] for encoders
    eos_ids: tuple[int, ...] = ()  # every id that ends generation, the model's own EOS first
    unk_id: int | None = None
    pad_id: int | None = None
    unused_ids: tuple[int, ...] = ()  # fill the vocabulary up; no text has them and they have no text
    strips_space: bool = False  # SentencePiece puts a space before a text, decoding takes it away
    chat_template: str | None = None


class Tokenizer:
    """A model's vocabulary, rules and special tokens. Immutable to its users, safe in threads."""

    def __init__(self, core: tokenizers.Tokenizer, spec: TokenizerSpec, date: day = DEFAULT_DATE):
        """`date` is what a chat template that asks for today's is told."""
        core.no_truncation()  # sentence-transformers checkpoints pad every text to 128 tokens
        core.no_padding()
        self._core = core
        self._lock = threading.Lock()  # `encode_special_tokens` is a switch on the shared core
        self._added = core.get_added_tokens_decoder()
        self._unused = frozenset(spec.unused_ids)
        self.spec = spec
        self._date = date

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder: tokenizer.json and the small JSON files beside it."""
        from rag.models.tokenizer.huggingface import build

        return cls(*build(Path(folder)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> "Tokenizer":
        """The tokenizer in a GGUF file's metadata, given as a dict of key to Python value or list."""
        from rag.models.tokenizer.gguf import build

        return cls(*build(metadata))

    @classmethod
    def load(cls, folder: str | Path, date: day = DEFAULT_DATE) -> "Tokenizer":
        """The tokenizer that `save` wrote, and the date that its chat template is told."""
        folder = Path(folder)
        if not (folder / SPEC_FILE).is_file():
            raise UserError(f"{folder} lacks {SPEC_FILE}; convert the checkpoint again")
        fields = read_json(folder / SPEC_FILE)
        fields |= {name: tuple(fields[name]) for name in ("eos_ids", "unused_ids")}
        return cls(read_core(folder), TokenizerSpec(**fields), date)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_spec.json into an existing folder."""
        self._core.save(str(Path(folder, TOKENIZER_FILE)), pretty=False)
        Path(folder, SPEC_FILE).write_text(
            json.dumps(asdict(self.spec), ensure_ascii=False), encoding="utf-8"
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """The largest id of a token, added ones included; -1 if there is none."""
        return max(self._core.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def bos_id(self) -> int | None:
        return self.spec.bos_id

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends generation: end of text, end of turn."""
        return frozenset(self.spec.eos_ids)

    def encode(self, text: str, *, special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of a text; `special` adds what the model's format puts around it."""
        ids = self._encodings([text], parse_special)[0].ids
        return [*self._prefix, *ids, *self._suffix] if special else ids

    def encode_batch(
        self, texts: Sequence[str], *, special: bool = True, max_length: int | None = None
    ) -> list[list[int]]:
        """Ids of several texts, in parallel; the text is cut so that all fits `max_length` tokens."""
        prefix, suffix = (self._prefix, self._suffix) if special else ([], [])
        room = None if max_length is None else max_length - len(prefix) - len(suffix)
        if room is not None and room < 1:
            raise UserError(
                f"max_length={max_length} leaves no room for text beside the special tokens; raise it"
            )
        return [[*prefix, *encoding.ids[:room], *suffix] for encoding in self._encodings(list(texts))]

    def token_spans(self, text: str) -> Int[np.ndarray, "n 2"]:
        """Character offsets (start, end) of the text's tokens, without special ones.

        Starts never decrease. Tokens that are parts of one character share its span; white space may belong
        to no token (WordPiece) or to the token after it (byte-level BPE).
        """
        with self._lock:
            self._core.encode_special_tokens = True
            offsets = self._core.encode(_valid(text), add_special_tokens=False).offsets
        return np.array(offsets, dtype=np.int64).reshape(-1, 2)

    def count(self, text: str) -> int:
        """Number of tokens of a text, without special ones."""
        return len(self._encodings([text])[0])

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. Equal to what a TextStream gives."""
        if self.spec.kind in ("wordpiece", "other"):
            return self._core.decode(list(ids), skip_special_tokens=skip_special)
        stream = TextStream(self, skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.finish()])

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """The bytes that a token adds to the text: perhaps none, perhaps part of a character.

        An id outside the vocabulary has none: models may have more output rows than tokens.
        """
        if added := self._added.get(token_id):
            return b"" if added.special and skip_special else added.content.encode()
        piece = None if token_id in self._unused else self._core.id_to_token(token_id)
        if piece is None:
            return b""
        return _BYTES_OF[self.spec.kind](piece)

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation in the checkpoint's own chat format.

        Only the template's special tokens are special: the same characters inside a message stay characters.
        Raises UserError when the checkpoint has no template, or its template rejects the messages.
        """
        masked = [replace(message, content=self._masked(message.content)) for message in messages]
        return self._chat_ids(self._rendered(masked, add_generation_prompt))

    def chat_pieces(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[tuple[list[int], bool]]:
        """A conversation as `chat` writes it, in pieces that become tokens by themselves: (ids, is it a passage?).

        It is cut around the messages' `reusable` spans, and where the first message that is not `fixed` to its end
        stops being so. The ids of a passage are the same in every conversation, and special tokens arise nowhere
        but from the template. Raises UserError as `chat` does.
        """
        marked, open_ended = [], False
        for message in messages:
            spans = [(start, stop) for start, stop in message.reusable if start < stop]
            places = [(stop, _END) for _, stop in spans] + [(start, _BEGIN) for start, _ in spans]
            if not open_ended and message.fixed < len(message.content):
                open_ended = True
                places.insert(0, (message.fixed, _END_FIXED))
            marked.append(replace(message, content=self._marked(message.content, places)))
        pieces: list[tuple[list[int], bool]] = []
        inside = False
        for part in _CUTS.split(self._rendered(marked, add_generation_prompt)):
            if _CUTS.fullmatch(part):
                inside = part == _BEGIN
            elif part:
                own = part.removeprefix(" ") if pieces and self.spec.strips_space else part  # it adds one
                pieces.append((self._chat_ids(own), inside))
        return pieces

    def _marked(self, content: str, places: list[tuple[int, str]]) -> str:
        """The message with the marks at their places, and what lies between them masked."""
        parts, last = [], 0
        for place, mark in sorted(places, key=lambda item: item[0]):  # stable: an end before a beginning
            parts += [self._masked(content[last:place]), mark]
            last = place
        return "".join([*parts, self._masked(content[last:])])

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if self.spec.chat_template is None:
            raise UserError("the checkpoint has no chat template; choose an instruction-tuned one")
        return self._template(messages, add_generation_prompt)

    def _chat_ids(self, text: str) -> list[int]:
        """Ids of a part of a rendered conversation, where a mask stands before what is no special token."""
        if _MASK not in text:
            return self.encode(text, special=False, parse_special=True)
        ids: list[int] = []
        fragments = re.split(f"(?<!{_MASK})({self._special_texts})", text)
        for place, fragment in enumerate(fragments):  # every second one is a special token
            plain = fragment.replace(_MASK, "")
            ids += [self._special_ids[fragment]] if place % 2 else self.encode(plain, special=False)
        return ids

    def _encodings(self, texts: list[str], parse_special: bool = False) -> list[tokenizers.Encoding]:
        with self._lock:
            self._core.encode_special_tokens = not parse_special
            return self._core.encode_batch_fast([_valid(text) for text in texts], add_special_tokens=False)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before and after a text, seen on a probe."""
        probe = self._core.encode("a", add_special_tokens=True)
        inside = [place for place, is_special in enumerate(probe.special_tokens_mask) if not is_special]
        return (probe.ids[: inside[0]], probe.ids[inside[-1] + 1 :]) if inside else (probe.ids, [])

    @property
    def _prefix(self) -> list[int]:
        return self._around[0]

    @property
    def _suffix(self) -> list[int]:
        return self._around[1]

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return {token.content: index for index, token in self._added.items() if token.special}

    @cached_property
    def _special_texts(self) -> str:
        """A regular expression of the special tokens' texts, the longest first."""
        return "|".join(map(re.escape, sorted(self._special_ids, key=len, reverse=True))) or "(?!)"

    def _masked(self, content: str) -> str:
        """The message with a mask wherever a special token's text begins, so that it is no special token."""
        return re.sub(f"(?={self._special_texts})", _MASK, _valid(content))

    @cached_property
    def _template(self):
        from rag.models.tokenizer.chat_template import ChatTemplate  # here: jinja2 only when there is a chat

        spec = self.spec
        ids = {
            "bos": spec.bos_id,
            "eos": next(iter(spec.eos_ids), None),
            "unk": spec.unk_id,
            "pad": spec.pad_id,
        }
        names = {f"{name}_token": self._core.id_to_token(i) for name, i in ids.items() if i is not None}
        return ChatTemplate(spec.chat_template, names, self._date)


class TextStream:
    """Incremental detokenisation: text as soon as it is certain, never part of a character, in linear time.

    The pushed texts and `finish()`, joined, are `tokenizer.decode` of the ids. For tokenizers of decoders:
    byte-level BPE and SentencePiece; raises UserError for others.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        if tokenizer.spec.kind not in _BYTES_OF:
            raise UserError(
                f"a {tokenizer.spec.kind} tokenizer cannot stream text; choose a decoder's checkpoint"
            )
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip = tokenizer.spec.strips_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        data = self._tokenizer.token_bytes(token_id, skip_special=self._skip_special)
        return self._first_stripped(self._decoder.decode(data))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was begun and not completed."""
        return self._first_stripped(self._decoder.decode(b"", final=True))

    def _first_stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def unique_ids(ids: Iterable[int | None]) -> tuple[int, ...]:
    """The ids in order, each once, without the Nones."""
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the rest for U+0100 and up."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in piece])
    except KeyError:  # a piece that is not written in the alphabet stands for itself
        return piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    if found := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(found[1], 16)])
    return piece.replace("\u2581", " ").encode()


_BYTES_OF = {"byte_level": _byte_level_bytes, "sentencepiece": _sentencepiece_bytes}


def _valid(text: str) -> str:
    """The text with lone surrogates, which are no Unicode text, as U+FFFD; as many characters as before."""
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)


def read_core(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a folder's tokenizer.json. Raises UserError for a file that is missing or damaged."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {TOKENIZER_FILE}; add the checkpoint's, or convert its tokenizer to one"
        )
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
        core.encode(_UNLIKELY)  # some files fail at the first unknown word alone
        return core
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise UserError(f"cannot read {path} ({reason(error)}); fetch the file again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} for a file that is not there. Raises UserError for anything else."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"it has more than {_MOST_JSON:,} bytes")
        text = path.read_text(encoding="utf-8")
        value = parse_json(text)
        if _HALF in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a character is no text
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); fetch the file again") from error
    except ValueError as error:  # UnicodeDecodeError among them
        raise UserError(f"{path} is not valid JSON ({reason(error)}); fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; fetch the file again")
    return value
