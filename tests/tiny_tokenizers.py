"""Vocabularies of a few tokens, as GGUF metadata and as tokenizers, for the tests."""

from tokenizers import pre_tokenizers

from rag.models.tokenizer.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CHATML = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}<|im_end|>\n"
    "{% endfor %}\n{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)


def gguf(family: str, typed: list[tuple[str, int]], **values) -> dict[str, object]:
    """GGUF metadata of a tiny tokenizer; keys are given without their tokenizer.ggml prefix."""
    entries = {
        "model": family,
        "tokens": [text for text, _ in typed],
        "token_type": [kind for _, kind in typed],
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (entries | values).items()}


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [
    "h e", "l l", "he ll", "hell o", "\u0120 w", "o r", "\u0120w or", "1 2", "\u0120 \u0120", "i n",
]  # fmt: skip
BPE_TOKENS = [
    *((text, CONTROL) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    *((text, NORMAL) for text in BYTES),
    *((merge.replace(" ", ""), NORMAL) for merge in MERGES),
    ("<tool>", USER_DEFINED),
    ("[PAD7]", UNUSED),
]


def byte_level(**values) -> Tokenizer:
    defaults = {"pre": "gpt-2", "merges": MERGES, "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2}
    metadata = gguf("gpt2", BPE_TOKENS, **(defaults | values))
    return Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": CHATML})


SPM_WORDS = {
    "\u2581": -9, "a": -1, "b": -2, "c": -3, "\u2581a": -4, "ab": -5, "bc": -6, "abc": -7, "\u2581ab": -8,
    "ca": -10, "<": -11, "/": -12, "s": -13, ">": -14, "</": -15, "s>": -16, "\u2581\u2581": -17,
    "aa": -18, "aaa": -19,
}  # fmt: skip
SPM_TOKENS = [
    *(("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
    *((text, NORMAL) for text in SPM_WORDS),
    ("[x]", USER_DEFINED),
]


def sentencepiece(**values) -> Tokenizer:
    scores = [float(SPM_WORDS.get(text, 0)) for text, _ in SPM_TOKENS]
    return Tokenizer.from_gguf(gguf("llama", SPM_TOKENS, scores=scores, **values))


WORD_TOKENS = [
    *((text, CONTROL) for text in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")),
    ("[unused0]", NORMAL),
    *(
        (f"\u2581{text}", NORMAL)
        for text in ("un", "able", "a", "cafe", ",", "[", "]", "hello", "w", "\u4f60")
    ),
    *((text, NORMAL) for text in ("able", "aff", "s", "a", "b", "w")),
]


def wordpiece(**values) -> Tokenizer:
    ids = {"unknown_token_id": 1, "cls_token_id": 2, "seperator_token_id": 3, "padding_token_id": 0}
    return Tokenizer.from_gguf(gguf("bert", WORD_TOKENS, **(ids | values)))


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer._core.id_to_token(index) for index in ids]
