"""Build tokenizers from GGUF metadata: byte-level BPE, SentencePiece and WordPiece, by the `tokenizers` library.

A GGUF file holds a vocabulary (tokens, scores, types, merges) and the names of the rules. The rules are those of
llama.cpp (src/llama-vocab.cpp), and so are the ids, except where llama.cpp differs from the tokenizer that the model
was trained with: Qwen2 text is normalised to NFC; WordPiece strips accents as BERT does (Hangul decomposed,
nonspacing marks removed) and knows no word over 100 characters; DeepSeek LLM takes U+3000 for punctuation;
SentencePiece text cannot merge into a control token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
from pydantic import ConfigDict, Field
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from rag.models import gguf_file
from rag.models.configuration import Configuration, validate
from rag.models.tokenizer.tokenizer import END_TEXTS, Kind, Tokenizer, TokenizerSpec, unique_ids
from rag.runtime.records import reason
from rag.types import UserError

KEY = "tokenizer.ggml."  # begins the keys of the metadata
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type

_MAX_TOKEN_LENGTH = 1024  # characters: a token is split in two at each of them
_MAX_CHARACTERS = 1 << 23  # of all tokens

PRE_TOKENIZERS = (
    "gpt-2", "smollm", "starcoder", "llama-bpe", "llama-v3", "llama3", "qwen2", "deepseek-r1-qwen",
    "deepseek-llm",
)  # fmt: skip

_WORDS = (  # Llama 3 and Qwen2, which differ in how many digits make a token
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# DeepSeek LLM lists cased letters by ranges: Unicode's, without some lower-case ones and all that were added later.
_CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{0560}-\x{0588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c8f}\x{2d00}-\x{2d2d}"
    r"\x{a790}-\x{a7ff}\x{ab30}-\x{ab68}\x{10500}-\x{105ff}\x{10d00}-\x{10dff}\x{16e00}-\x{16eff}"
    r"\x{1d400}-\x{1dfff}]]"
)
_DEEPSEEK = (
    r"[\r\n]",
    rf"\s?{_CASED}+",
    r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
    r"\s+$",
    r"[\x{0800}-\x{9fa5}\x{ac00}-\x{d7ff}]+",
)


class GgufTokenizerMetadata(Configuration):
    """The metadata of a tokenizer. A field's key is "tokenizer.ggml." and its name, unless an alias is given."""

    model_config = ConfigDict(alias_generator=lambda name: KEY + name)

    tokens: list[str]
    token_type: list[int] | None = None
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str | None = None
    chat_template: str | None = Field(None, alias="tokenizer.chat_template")
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    eot_token_id: int | None = None
    eom_token_id: int | None = None
    unknown_token_id: int | None = None
    padding_token_id: int | None = None
    cls_token_id: int | None = None
    seperator_token_id: int | None = None  # llama.cpp's spelling
    separator_token_id: int | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_space_prefix: bool | None = None
    lowercase: bool | None = Field(None, alias="tokenizer.ggml.normalizer.lowercase")
    strip_accents: bool | None = Field(None, alias="tokenizer.ggml.normalizer.strip_accents")


@dataclass(frozen=True)
class _Vocabulary:
    """The checked metadata, and the tokens with their types (NORMAL, UNKNOWN ...)."""

    metadata: GgufTokenizerMetadata
    tokens: list[str]
    types: list[int]

    @classmethod
    def check(cls, values: Mapping[str, object]) -> "_Vocabulary":
        """Check the metadata. Raises UserError if they are incomplete, contradictory or too large."""
        if not values.get(f"{KEY}tokens"):
            raise UserError(
                "the GGUF holds no vocabulary (tokenizer.ggml.tokens); take a file with its tokenizer"
            )
        metadata = validate(GgufTokenizerMetadata, values, "the GGUF's tokenizer")
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(metadata.tokens)]
        types = metadata.token_type or [NORMAL] * len(tokens)
        longest, size = max(map(len, tokens)), sum(map(len, tokens))
        if longest > _MAX_TOKEN_LENGTH or size > _MAX_CHARACTERS:
            raise UserError(
                f"the GGUF's vocabulary has a token of {longest:,} characters, and {size:,} in all; at most "
                f"{_MAX_TOKEN_LENGTH:,} and {_MAX_CHARACTERS:,} are read, take another file"
            )
        if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
            raise UserError(
                f"the GGUF's vocabulary is damaged ({len(tokens)} tokens, {len(set(tokens))} different ones, "
                f"{len(types)} types); convert or fetch the file again"
            )
        return cls(metadata, tokens, types)

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    @cached_property
    def end_ids(self) -> list[int]:
        """The ids of the tokens that end a turn or a text, whatever the file says of them."""
        return sorted(self.ids[text] for text in END_TEXTS if text in self.ids)

    def of_type(self, *types: int) -> list[int]:
        return [index for index, kind in enumerate(self.types) if kind in types]

    def first_id(self, *stated: int | None) -> int | None:
        """Return the first id that is not None; None if it is outside the vocabulary."""
        index = next((index for index in stated if index is not None), None)
        return index if index is not None and 0 <= index < len(self.tokens) else None


matches = gguf_file.is_gguf  # these three make a rag.models.tokenizer.TokenizerSource


def files(path: Path) -> list[Path]:
    """Return the GGUF file itself."""
    return [path]


def load(path: Path) -> Tokenizer:
    """Build the tokenizer of a GGUF file. Raises UserError if the file is damaged or its tokenizer is not known."""
    return from_metadata(gguf_file.read(path)[0])


def from_metadata(metadata: Mapping[str, object]) -> Tokenizer:
    """Build the tokenizer that GGUF metadata describe. Raises UserError for what is missing or not supported."""
    model = metadata.get(f"{KEY}model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _wordpiece}
    if not isinstance(model, str) or model not in builders:
        raise UserError(
            f"the GGUF's tokenizer.ggml.model is {model!r:.80}; take a file with one of {', '.join(builders)}"
        )
    vocabulary = _Vocabulary.check(metadata)
    try:
        core, spec = builders[model](vocabulary)
        _add_special_tokens(core, vocabulary)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception, as for a merge that gives no token
        raise UserError(
            f"the GGUF's tokenizer is damaged ({reason(error)}); convert or fetch the file again"
        ) from error
    return Tokenizer(core, spec)


def _byte_level(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, TokenizerSpec]:
    """Build GPT-2's BPE over a byte alphabet; `tokenizer.ggml.pre` says how text is first split into words."""
    metadata = vocabulary.metadata
    llama3 = metadata.pre in ("llama-bpe", "llama-v3", "llama3")
    if metadata.merges is None:
        raise UserError("the GGUF holds no merges (tokenizer.ggml.merges); convert or fetch the file again")
    merges = [_pair(merge) for merge in metadata.merges]
    core = tokenizers.Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=llama3))
    if metadata.pre in ("qwen2", "deepseek-r1-qwen"):
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizer(metadata.pre)
    core.decoder = decoders.ByteLevel()
    bos, eos = vocabulary.first_id(metadata.bos_token_id), vocabulary.first_id(metadata.eos_token_id)
    core.post_processor = _around(
        bos if _flag(metadata.add_bos_token, llama3) else None,
        eos if _flag(metadata.add_eos_token, False) else None,
    )
    unk = vocabulary.first_id(metadata.unknown_token_id)
    return core, _spec(vocabulary, "byte_level", bos, eos, unk)


def _pair(merge: str) -> tuple[str, str]:
    """Return the two sides of a merge, which are separated by a space; a side may itself be a space."""
    space = merge.index(" ", 1)
    return merge[:space], merge[space + 1 :]


def _flag(stated: bool | None, default: bool) -> bool:
    return default if stated is None else stated


def pre_tokenizer(name: str | None) -> pre_tokenizers.PreTokenizer:
    """Return the word splitter of that name in GGUF files, followed by the step to the byte alphabet."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    match name:
        case "gpt-2":
            return gpt2
        case "smollm" | "starcoder":
            steps = [digits, gpt2]
        case "llama-bpe" | "llama-v3" | "llama3":
            steps = [_split(_WORDS % r"\p{N}{1,3}"), to_bytes]
        case "qwen2" | "deepseek-r1-qwen":
            steps = [_split(_WORDS % r"\p{N}"), to_bytes]
        case "deepseek-llm":
            steps = [*map(_split, _DEEPSEEK), digits, to_bytes]
        case _:
            raise UserError(
                f"the GGUF's pre-tokenizer (tokenizer.ggml.pre) is {name!r:.80}; "
                f"take a file with one of {', '.join(PRE_TOKENIZERS)}"
            )
    return pre_tokenizers.Sequence(steps)


def _split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, TokenizerSpec]:
    """Build SentencePiece BPE: the best score merges first, spaces are U+2581, unknown characters become bytes."""
    metadata = vocabulary.metadata
    unk = vocabulary.first_id(metadata.unknown_token_id, 0)
    core = tokenizers.Tokenizer(
        models.BPE(
            vocabulary.ids,
            _merges_by_score(vocabulary),
            unk_token=None if unk is None else vocabulary.tokens[unk],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _flag(metadata.add_space_prefix, True)
    to_mark = normalizers.Replace(" ", "\u2581")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), to_mark] if prefix else [to_mark])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    bos, eos = vocabulary.first_id(metadata.bos_token_id, 1), vocabulary.first_id(metadata.eos_token_id, 2)
    core.post_processor = _around(
        bos if _flag(metadata.add_bos_token, True) else None,
        eos if _flag(metadata.add_eos_token, False) else None,
    )
    return core, _spec(vocabulary, "sentencepiece", bos, eos, unk, strips_space=prefix)


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return every pair of tokens that makes another token, the token with the best score first.

    Only ordinary and user-defined tokens take part: text must not merge into a control or an unused token.
    """
    scores = vocabulary.metadata.scores
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise UserError(
            "the GGUF's tokenizer.ggml.scores do not match its tokens; convert or fetch the file again"
        )
    ids = {vocabulary.tokens[index]: index for index in vocabulary.of_type(NORMAL, USER_DEFINED)}
    merges = []
    for token in sorted(ids, key=lambda token: (-scores[ids[token]], ids[token])):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _wordpiece(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, TokenizerSpec]:
    """Build BERT's WordPiece. GGUF writes "\u2581word" and "piece" for what BERT calls "word" and "##piece"."""
    metadata = vocabulary.metadata
    unk = vocabulary.first_id(metadata.unknown_token_id, 100)
    cls = vocabulary.first_id(metadata.cls_token_id, metadata.bos_token_id, 101)
    sep = vocabulary.first_id(
        metadata.seperator_token_id, metadata.separator_token_id, metadata.eos_token_id, 102
    )
    if unk is None or cls is None or sep is None:
        raise UserError("the GGUF's vocabulary lacks [UNK], [CLS] or [SEP]; convert or fetch the file again")
    names = [_bert_name(token, kind) for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)]
    core = tokenizers.Tokenizer(
        models.WordPiece({name: i for i, name in enumerate(names)}, unk_token=names[unk])
    )
    lowercase = _flag(metadata.lowercase, True)
    core.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=_flag(metadata.strip_accents, lowercase)
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    core.post_processor = _around(cls, sep)
    return core, _spec(vocabulary, "wordpiece", cls, None, unk)


def _bert_name(token: str, kind: int) -> str:
    if kind == CONTROL or (token.startswith("[") and token.endswith("]") and len(token) > 2):
        return token
    return token[1:] if token.startswith("\u2581") else f"##{token}"


def _around(before: int | None, after: int | None) -> processors.TemplateProcessing:
    """Put special tokens around a text, under names of our own: real names may hold ':' or spaces."""
    names = {"before": before, "after": after}
    used = [(name, index) for name, index in names.items() if index is not None]
    single = [*(["before"] if before is not None else []), "$A", *(["after"] if after is not None else [])]
    return processors.TemplateProcessing(single=single, special_tokens=used)


def _add_special_tokens(core: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Add the tokens that are found in a text before it is split: special ones if asked, user-defined ones always.

    Special are control and unknown tokens, and those that end a turn even if the file calls them ordinary.
    """
    special = {*vocabulary.end_ids, *vocabulary.of_type(CONTROL, UNKNOWN)}
    user = [index for index in vocabulary.of_type(USER_DEFINED) if index not in special]
    core.add_special_tokens([_added(vocabulary.tokens[index], special=True) for index in sorted(special)])
    core.add_tokens([_added(vocabulary.tokens[index], special=False) for index in user])


def _added(text: str, special: bool) -> AddedToken:
    return AddedToken(text, special=special, normalized=False)


def _spec(
    vocabulary: _Vocabulary,
    kind: Kind,
    bos: int | None,
    eos: int | None,
    unk: int | None,
    strips_space: bool = False,
) -> TokenizerSpec:
    metadata = vocabulary.metadata
    eot, eom = vocabulary.first_id(metadata.eot_token_id), vocabulary.first_id(metadata.eom_token_id)
    return TokenizerSpec(
        kind=kind,
        bos_id=bos,
        eos_ids=unique_ids([eos, eot, eom, *vocabulary.end_ids]),
        unk_id=unk,
        pad_id=vocabulary.first_id(metadata.padding_token_id),
        unused_ids=tuple(vocabulary.of_type(UNUSED)),
        strips_space=strips_space,
        chat_template=metadata.chat_template,
    )
