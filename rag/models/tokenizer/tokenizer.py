"""Turn text into token ids and back, for every kind of checkpoint: one class over the `tokenizers` library.

A tokenizer is built from a checkpoint (rag.models.tokenizer.load_tokenizer), or loaded from a folder that `save` wrote.

There are two kinds of special tokens. Those that a model's format adds around a text (BOS, [CLS], [SEP]) come with
`special=True`. Those inside a text, such as "<|im_end|>", are tokenized as plain characters unless
`parse_special=True`: a retrieved passage cannot end the turn or start one.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date as day
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from jaxtyping import Int

from rag.models.configuration import read_settings, write_settings
from rag.models.tokenizer.chat_marks import ChatMarks, cut, is_masked, replace_surrogates
from rag.models.tokenizer.text_stream import PIECE_BYTES, TextStream
from rag.runtime.records import reason
from rag.types import Message, UserError

TOKENIZER_FILE = "tokenizer.json"
SPEC_FILE = "tokenizer_spec.json"
DEFAULT_DATE = day(2026, 1, 1)  # given to chat templates, so that prompts are the same every day
_PROBE = "a \U000f0000 \U0001f916\n"  # a text of which most vocabularies lack a part

# Tokens that end a turn or a text in the checkpoints of the Llama family, whatever their metadata say.
END_TEXTS = frozenset({
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
    "</s>", "<eos>", "<｜end▁of▁sentence｜>",  # DeepSeek writes full-width bars
})  # fmt: skip

Kind = Literal["byte_level", "sentencepiece", "wordpiece", "other"]


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """The properties of a tokenizer that tokenizer.json does not hold. Ids are None where there is no such token."""

    kind: Kind  # how a token's text stands for bytes
    bos_id: int | None = None  # [CLS] for encoders
    eos_ids: tuple[int, ...] = ()  # every id that ends generation, the model's own EOS first
    unk_id: int | None = None
    pad_id: int | None = None
    unused_ids: tuple[int, ...] = ()  # ids without text that only pad the vocabulary
    strips_space: bool = False  # SentencePiece puts a space before a text, and decoding removes it
    chat_template: str | None = None


class Tokenizer:
    """A model's vocabulary, rules and special tokens. Immutable to its users, safe in threads.

    The class is long because its methods are short and share one lock and one core.
    """

    def __init__(self, core: tokenizers.Tokenizer, spec: TokenizerSpec, date: day = DEFAULT_DATE):
        """Wrap a tokenizer of the library; `date` is given to a chat template that asks for today's date."""
        core.no_truncation()  # sentence-transformers checkpoints pad every text to 128 tokens
        core.no_padding()
        self._core = core
        self._lock = threading.Lock()  # `encode_special_tokens` is a switch on the shared core
        self._added = core.get_added_tokens_decoder()
        self._unused = frozenset(spec.unused_ids)
        self.spec = spec
        self._date = date

    @classmethod
    def load(cls, folder: str | Path, date: day = DEFAULT_DATE) -> "Tokenizer":
        """Load the tokenizer from the files of `save`. Raises UserError if they are missing."""
        spec = read_settings(Path(folder, SPEC_FILE), TokenizerSpec)
        return cls(read_core(Path(folder)), spec, date)

    def to_json(self) -> str:
        """Return the content of tokenizer.json: the vocabulary and the rules, without the properties in `spec`."""
        return self._core.to_str()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_spec.json into an existing folder."""
        self._core.save(str(Path(folder, TOKENIZER_FILE)), pretty=False)
        write_settings(Path(folder, SPEC_FILE), self.spec)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens, added ones included; a model's embedding may have more rows."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """Return the largest id of a token, added ones included; -1 if there is none."""
        return max(self._core.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def bos_id(self) -> int | None:
        """Return the id that begins a text ([CLS] for encoders), or None."""
        return self.spec.bos_id

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Return every id that ends generation: end of text, end of turn."""
        return frozenset(self.spec.eos_ids)

    @property
    def special_texts(self) -> dict[str, str | None]:
        """Return the texts of "bos_token", "eos_token", "unk_token" and "pad_token", without those that are missing."""
        ids = {
            "bos_token": self.spec.bos_id,
            "eos_token": next(iter(self.spec.eos_ids), None),
            "unk_token": self.spec.unk_id,
            "pad_token": self.spec.pad_id,
        }
        return {name: self._core.id_to_token(index) for name, index in ids.items() if index is not None}

    def encode(self, text: str, *, special: bool = True, parse_special: bool = False) -> list[int]:
        """Return the ids of a text; `special` adds the tokens that the model's format puts around it."""
        ids = self._encodings([text], parse_special)[0].ids
        before, after = self._around if special else ([], [])
        return [*before, *ids, *after]

    def encode_batch(
        self, texts: Sequence[str], *, special: bool = True, max_length: int | None = None
    ) -> list[list[int]]:
        """Return the ids of several texts, in parallel; a text is cut so that all fits `max_length` tokens."""
        before, after = self._around if special else ([], [])
        room = None if max_length is None else max_length - len(before) - len(after)
        if room is not None and room < 1:
            raise UserError(
                f"max_length={max_length} leaves no room for text beside the special tokens; raise it"
            )
        return [[*before, *encoding.ids[:room], *after] for encoding in self._encodings(list(texts))]

    def token_spans(self, text: str) -> Int[np.ndarray, "n 2"]:
        """Return the character offsets (start, end) of the text's tokens, without special ones.

        Starts never decrease. Tokens that are parts of one character share its span; white space may belong
        to no token (WordPiece) or to the token after it (byte-level BPE).
        """
        with self._lock:
            self._core.encode_special_tokens = True
            offsets = self._core.encode(replace_surrogates(text), add_special_tokens=False).offsets
        return np.array(offsets, dtype=np.int64).reshape(-1, 2)

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, without special ones."""
        return len(self._encodings([text])[0])

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids, equal to that of a text stream; bytes that are not UTF-8 become U+FFFD."""
        if self.spec.kind not in PIECE_BYTES:
            return self._core.decode(list(ids), skip_special_tokens=skip_special)
        stream = self.text_stream(skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.finish()])

    def text_stream(self, *, skip_special: bool = True) -> TextStream:
        """Begin a text that is decoded token by token.

        Raises:
            UserError: the tokenizer is neither byte-level BPE nor SentencePiece, as those of decoders are.
        """
        if self.spec.kind not in PIECE_BYTES:
            raise UserError(f"a {self.spec.kind} tokenizer cannot stream text; choose a decoder's checkpoint")
        token_bytes = partial(self.token_bytes, skip_special=skip_special)
        return TextStream(token_bytes, strip_space=self.spec.strips_space)

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """Return the bytes that a token adds to the text: perhaps none, perhaps part of a character.

        An id outside the vocabulary has none: models may have more output rows than tokens.
        """
        if added := self._added.get(token_id):
            return b"" if added.special and skip_special else added.content.encode()
        piece = None if token_id in self._unused else self._core.id_to_token(token_id)
        return b"" if piece is None else PIECE_BYTES[self.spec.kind](piece)

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a conversation in the checkpoint's own chat format.

        Only the template's special tokens are special: the same characters inside a message remain characters.
        Raises UserError if the checkpoint has no template, or if its template rejects the messages.
        """
        masked = [self._marks.mask(message) for message in messages]
        return self._chat_ids(self._template(masked, add_generation_prompt))

    def chat_pieces(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[tuple[list[int], bool]]:
        """Return a conversation as in `chat`, in pieces that are tokenized separately: (ids, whether it is a passage).

        It is cut around the messages' `reusable` spans, and at the end of the fixed text, in the first message that is
        not `fixed` to its end. The ids of a passage are the same in every conversation, and special tokens come only
        from the template. Raises UserError as `chat` does.
        """
        pieces: list[tuple[list[int], bool]] = []
        for part, is_passage in cut(self._template(self._marks.mark(messages), add_generation_prompt)):
            # SentencePiece adds a space before every text that it tokenizes.
            own = part.removeprefix(" ") if pieces and self.spec.strips_space else part
            pieces.append((self._chat_ids(own), is_passage))
        return pieces

    def _chat_ids(self, text: str) -> list[int]:
        """Return the ids of a part of a rendered conversation; a mask precedes what is not a special token."""
        if not is_masked(text):
            return self.encode(text, special=False, parse_special=True)
        ids: list[int] = []
        for fragment, is_special in self._marks.fragments(text):
            ids += [self._special_ids[fragment]] if is_special else self.encode(fragment, special=False)
        return ids

    def _encodings(self, texts: list[str], parse_special: bool = False) -> list[tokenizers.Encoding]:
        with self._lock:
            self._core.encode_special_tokens = not parse_special
            return self._core.encode_batch_fast(
                [replace_surrogates(text) for text in texts], add_special_tokens=False
            )

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before and after a text."""
        probe = self._core.encode("a", add_special_tokens=True)
        inside = [i for i, is_special in enumerate(probe.special_tokens_mask) if not is_special]
        return (probe.ids[: inside[0]], probe.ids[inside[-1] + 1 :]) if inside else (probe.ids, [])

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return {token.content: index for index, token in self._added.items() if token.special}

    @cached_property
    def _marks(self) -> ChatMarks:
        return ChatMarks(self._special_ids)

    @cached_property
    def _template(self) -> Callable[[Sequence[Message], bool], str]:
        from rag.models.tokenizer.chat_template import ChatTemplate  # here: jinja2 is needed only for chats

        spec = self.spec
        if spec.chat_template is None:
            raise UserError("the checkpoint has no chat template; choose an instruction-tuned one")
        return ChatTemplate(spec.chat_template, self.special_texts, self._date)


def unique_ids(ids: Iterable[int | None]) -> tuple[int, ...]:
    """Return the ids in order, each once, without None."""
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def read_core(folder: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer in a folder's tokenizer.json. Raises UserError if it is missing or damaged."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {TOKENIZER_FILE}; add the checkpoint's, or convert its tokenizer to one"
        )
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
        core.encode(_PROBE)  # some files fail only at the first unknown word
        return core
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise UserError(f"cannot read {path} ({reason(error)}); fetch the file again") from error
