"""Tokenizers out of GGUF metadata: byte-level BPE, SentencePiece and WordPiece, as `tokenizers` objects.

A GGUF keeps a vocabulary (tokens, scores, types, merges) and the names of the rules; the rules themselves are
in llama.cpp (src/llama-vocab.cpp), whose ids these give, except where it departs from the tokenizer that the
model was trained with: Qwen2 text is NFC; WordPiece strips accents as BERT does (Hangul decomposed,
nonspacing marks dropped) and knows no word over 100 characters; DeepSeek LLM takes U+3000 for punctuation;
SentencePiece text cannot merge into a control token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pydantic import Field
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from rag.models.configuration import Configuration, configured
from rag.models.tokenizer.tokenizer import END_TEXTS, TokenizerSpec, unique_ids
from rag.runtime.records import reason
from rag.types import UserError

KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type

_LONGEST = 1024  # characters of a token: every way to cut it in two is tried
_MOST_CHARACTERS = 1 << 23  # of all tokens

PRE_TOKENIZERS = (
    "gpt-2", "smollm", "starcoder", "llama-bpe", "llama-v3", "llama3", "qwen2", "deepseek-r1-qwen",
    "deepseek-llm",
)  # fmt: skip

_WORDS = (  # Llama 3 and Qwen2: they differ in how many digits make a token
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# DeepSeek LLM lists cased letters range by range: those of Unicode, less some lower-case and all later ones.
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


class _Metadata(Configuration):
    """The metadata that a tokenizer is built from."""

    tokens: list[str] = Field(alias=f"{KEY}tokens")
    token_type: list[int] | None = Field(None, alias=f"{KEY}token_type")
    scores: list[float] | None = Field(None, alias=f"{KEY}scores")
    merges: list[str] | None = Field(None, alias=f"{KEY}merges")
    pre: str | None = Field(None, alias=f"{KEY}pre")
    template: str | None = Field(None, alias="tokenizer.chat_template")
    bos: int | None = Field(None, alias=f"{KEY}bos_token_id")
    eos: int | None = Field(None, alias=f"{KEY}eos_token_id")
    eot: int | None = Field(None, alias=f"{KEY}eot_token_id")
    eom: int | None = Field(None, alias=f"{KEY}eom_token_id")
    unknown: int | None = Field(None, alias=f"{KEY}unknown_token_id")
    padding: int | None = Field(None, alias=f"{KEY}padding_token_id")
    cls: int | None = Field(None, alias=f"{KEY}cls_token_id")
    seperator: int | None = Field(None, alias=f"{KEY}seperator_token_id")  # as llama.cpp spells it
    separator: int | None = Field(None, alias=f"{KEY}separator_token_id")
    add_bos: bool | None = Field(None, alias=f"{KEY}add_bos_token")
    add_eos: bool | None = Field(None, alias=f"{KEY}add_eos_token")
    add_space_prefix: bool | None = Field(None, alias=f"{KEY}add_space_prefix")
    lowercase: bool | None = Field(None, alias=f"{KEY}normalizer.lowercase")
    strip_accents: bool | None = Field(None, alias=f"{KEY}normalizer.strip_accents")


@dataclass(frozen=True)
class _Vocabulary:
    """The token table of a GGUF, checked."""

    metadata: Mapping[str, object]  # of the values that `_Metadata` declares
    tokens: list[str]
    types: list[int]

    @classmethod
    def read(cls, metadata: Mapping[str, object]) -> "_Vocabulary":
        if not metadata.get(f"{KEY}tokens"):
            raise UserError(
                "the GGUF holds no vocabulary (tokenizer.ggml.tokens); take a file with its tokenizer"
            )
        configured(_Metadata, metadata, "the GGUF's tokenizer")
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(metadata[f"{KEY}tokens"])]
        types = metadata.get(f"{KEY}token_type") or [NORMAL] * len(tokens)
        longest, size = max(map(len, tokens)), sum(map(len, tokens))
        if longest > _LONGEST or size > _MOST_CHARACTERS:
            raise UserError(
                f"the GGUF's vocabulary has a token of {longest:,} characters, and {size:,} in all; at most "
                f"{_LONGEST:,} and {_MOST_CHARACTERS:,} are read, take another file"
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

    def of_type(self, *types: int) -> list[int]:
        return [index for index, kind in enumerate(self.types) if kind in types]

    def id(self, *names: str, default: int | None = None) -> int | None:
        """The id under the first of the metadata keys tokenizer.ggml.<name>_token_id that is there."""
        found = (self.metadata.get(f"{KEY}{name}_token_id") for name in names)
        index = next((int(value) for value in found if value is not None), default)
        return index if index is not None and 0 <= index < len(self.tokens) else None

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.metadata.get(f"{KEY}{name}", default))


def build(metadata: Mapping[str, object]) -> tuple[Tokenizer, TokenizerSpec]:
    """The tokenizer that GGUF metadata describe. Raises UserError for what is missing or not supported."""
    model = metadata.get(f"{KEY}model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _wordpiece}
    if not isinstance(model, str) or model not in makers:
        raise UserError(
            f"the GGUF's tokenizer.ggml.model is {model!r:.80}; take a file with one of {', '.join(makers)}"
        )
    vocabulary = _Vocabulary.read(metadata)
    try:
        core, spec = makers[model](vocabulary)
        _add_special_tokens(core, vocabulary)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception, as when a merge gives no token
        raise UserError(
            f"the GGUF's tokenizer is damaged ({reason(error)}); convert or fetch the file again"
        ) from error
    return core, spec


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, TokenizerSpec]:
    """GPT-2's BPE over a byte alphabet; `tokenizer.ggml.pre` says how text is split into words first."""
    pre = vocabulary.metadata.get(f"{KEY}pre")
    llama3 = pre in ("llama-bpe", "llama-v3", "llama3")
    pairs = vocabulary.metadata.get(f"{KEY}merges")
    if pairs is None:
        raise UserError("the GGUF holds no merges (tokenizer.ggml.merges); convert or fetch the file again")
    core = Tokenizer(models.BPE(vocabulary.ids, [_pair(pair) for pair in pairs], ignore_merges=llama3))
    if pre in ("qwen2", "deepseek-r1-qwen"):
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = _pre_tokenizer(pre)
    core.decoder = decoders.ByteLevel()
    bos, eos = vocabulary.id("bos"), vocabulary.id("eos")
    core.post_processor = _around(
        bos if vocabulary.flag("add_bos_token", llama3) else None,
        eos if vocabulary.flag("add_eos_token", False) else None,
    )
    return core, _spec(vocabulary, "byte_level", bos, eos, vocabulary.id("unknown"))


def _pair(merge: str) -> tuple[str, str]:
    """The two sides of a merge, written with one space between; a side may itself be a space."""
    space = merge.index(" ", 1)
    return merge[:space], merge[space + 1 :]


def _pre_tokenizer(name: object) -> pre_tokenizers.PreTokenizer:
    """The word splitter that GGUF files name, ending in the byte alphabet."""
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


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, TokenizerSpec]:
    """SentencePiece BPE: a better score merges first, spaces are U+2581, unknown characters become bytes."""
    unk = vocabulary.id("unknown", default=0)
    core = Tokenizer(
        models.BPE(
            vocabulary.ids,
            _merges_by_score(vocabulary),
            unk_token=None if unk is None else vocabulary.tokens[unk],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = vocabulary.flag("add_space_prefix", True)
    to_mark = normalizers.Replace(" ", "\u2581")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), to_mark] if prefix else [to_mark])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    bos, eos = vocabulary.id("bos", default=1), vocabulary.id("eos", default=2)
    core.post_processor = _around(
        bos if vocabulary.flag("add_bos_token", True) else None,
        eos if vocabulary.flag("add_eos_token", False) else None,
    )
    return core, _spec(vocabulary, "sentencepiece", bos, eos, unk, strips_space=prefix)


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best-scored token first.

    Only ordinary and user-defined tokens take part: text must not merge into a control or an unused token.
    """
    scores = vocabulary.metadata.get(f"{KEY}scores")
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise UserError(
            "the GGUF's tokenizer.ggml.scores do not match its tokens; convert or fetch the file again"
        )
    ids = {vocabulary.tokens[index]: index for index in vocabulary.of_type(NORMAL, USER_DEFINED)}
    merges = []
    for token in sorted(ids, key=lambda token: (-float(scores[ids[token]]), ids[token])):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        ways = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(ways, key=lambda way: (ids[way[0]], ids[way[1]]))
    return merges


def _wordpiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, TokenizerSpec]:
    """BERT's WordPiece. GGUF writes "\u2581word" and "piece" for what BERT calls "word" and "##piece"."""
    unk = vocabulary.id("unknown", default=100)
    cls, sep = (
        vocabulary.id("cls", "bos", default=101),
        vocabulary.id("seperator", "separator", "eos", default=102),
    )
    if unk is None or cls is None or sep is None:
        raise UserError("the GGUF's vocabulary lacks [UNK], [CLS] or [SEP]; convert or fetch the file again")
    names = [_bert_name(token, kind) for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)]
    core = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token=names[unk]))
    lowercase = vocabulary.flag("normalizer.lowercase", True)
    core.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=vocabulary.flag("normalizer.strip_accents", lowercase)
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
    """The special tokens around a text, under names of our own: real ones may hold ':' or spaces."""
    names = {"before": before, "after": after}
    used = [(name, index) for name, index in names.items() if index is not None]
    single = [*(["before"] if before is not None else []), "$A", *(["after"] if after is not None else [])]
    return processors.TemplateProcessing(single=single, special_tokens=used)


def _special_ids(vocabulary: _Vocabulary) -> set[int]:
    """Control and unknown tokens, and tokens that end a turn even where the file calls them ordinary."""
    ends = {vocabulary.ids[text] for text in END_TEXTS if text in vocabulary.ids}
    return ends.union(vocabulary.of_type(CONTROL, UNKNOWN))


def _add_special_tokens(core: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Tokens found in a text before it is split: special ones if asked, user-defined ones always."""
    special = _special_ids(vocabulary)
    user = [index for index in vocabulary.of_type(USER_DEFINED) if index not in special]
    core.add_special_tokens([_added(vocabulary.tokens[index], special=True) for index in sorted(special)])
    core.add_tokens([_added(vocabulary.tokens[index], special=False) for index in user])


def _added(text: str, special: bool) -> AddedToken:
    return AddedToken(text, special=special, normalized=False)


def _spec(
    vocabulary: _Vocabulary,
    kind: str,
    bos: int | None,
    eos: int | None,
    unk: int | None,
    strips_space: bool = False,
) -> TokenizerSpec:
    ends = sorted(vocabulary.ids[text] for text in END_TEXTS if text in vocabulary.ids)
    template = vocabulary.metadata.get("tokenizer.chat_template")
    return TokenizerSpec(
        kind=kind,
        bos_id=bos,
        eos_ids=unique_ids([eos, vocabulary.id("eot"), vocabulary.id("eom"), *ends]),
        unk_id=unk,
        pad_id=vocabulary.id("padding"),
        unused_ids=tuple(vocabulary.of_type(UNUSED)),
        strips_space=strips_space,
        chat_template=template if isinstance(template, str) else None,
    )
