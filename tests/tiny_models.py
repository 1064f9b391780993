"""Tiny decoders, encoders and tokenizers with random weights, and a stand-in generator; all but the size is real."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from string import ascii_lowercase

import gguf
import jax
import numpy as np
import tokenizers
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from rag.generate import Request
from rag.models.bert.checkpoint import NAMES
from rag.models.bert.model import Bert, BertConfig
from rag.models.llama.model import Llama, LlamaConfig
from rag.models.tokenizer.gguf import from_metadata
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.types import Message, Usage

CHATML = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}<|im_end|>\n"
    "{% endfor %}\n{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)

# --- a decoder

DECODER = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
IM_END = 257


def tiny_decoder(seed: int = 0, config: LlamaConfig = DECODER) -> Llama:
    """Return a decoder with random weights, large enough that greedy tokens vary."""
    model = Llama(config, nnx.Rngs(seed))
    return jax.tree.map(lambda a: a * 3 if a.ndim == 2 else a, model)


def write_decoder(folder: Path) -> Path:
    """Write a Hugging Face folder: config.json, model.safetensors and a byte-level tokenizer of one token a byte."""
    folder.mkdir(parents=True, exist_ok=True)
    values = asdict(DECODER) | {"model_type": "llama"}
    del values["rope_factors"], values["qkv_bias"], values["qk_norm"]
    (folder / "config.json").write_text(json.dumps(values))
    state = nnx.to_flat_state(nnx.state(tiny_decoder()))
    save_file(
        {f"model.{'.'.join(map(str, path))}": np.asarray(leaf.get_value()) for path, leaf in state},
        folder / "model.safetensors",
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    core.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


# --- an encoder whose WordPiece vocabulary is the letters

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLASSIFIERS = Path(__file__).parent / "goldens" / "tiny_classifiers.npz"
LETTERS = (*SPECIAL, *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase))
ENCODER = BertConfig(
    vocab_size=len(LETTERS),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=80,
)


def encoder_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Return random weights by Hugging Face's names, large enough that vectors vary."""
    model = jax.tree.map(lambda a: a * 10 if a.ndim == 2 else a + 0.1, Bert(ENCODER, nnx.Rngs(seed)))
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in flat}


def write_encoder(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config) -> Path:
    """Write the smallest Hugging Face folder of an encoder whose tokens are letters; `config` overrides config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [field for field in ENCODER.__dataclass_fields__ if field != "position_offset"]
    values = {"model_type": "bert", "pad_token_id": 0} | {name: getattr(ENCODER, name) for name in names}
    (folder / "config.json").write_text(json.dumps(values | config))
    save_file(encoder_tensors() if tensors is None else tensors, folder / "model.safetensors")
    core = tokenizers.Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(LETTERS)}, unk_token="[UNK]")
    )
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL])
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    core.save(str(folder / "tokenizer.json"))
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"model_max_length": 70}))
    return folder


def classifier_arrays(family: str) -> dict[str, np.ndarray]:
    """Return the arrays of a golden classifier: its weights, config and inputs, and the logits of transformers."""
    with np.load(CLASSIFIERS) as file:
        names = [name for name in file.files if name.startswith(f"{family}/")]
        return {name.removeprefix(f"{family}/"): file[name] for name in names}


def write_classifier(folder: Path, family: str, **config) -> Path:
    """Write a golden classifier as transformers saves it; `config` overrides config.json."""
    arrays = classifier_arrays(family)
    tensors = {name.removeprefix("weights/"): a for name, a in arrays.items() if name.startswith("weights/")}
    return write_encoder(folder, tensors, **(json.loads(str(arrays["config"])) | config))


def write_sentence_files(folder: Path, pooling: dict, *, normalize: bool = True, modules: tuple = ()) -> None:
    """Add the files of sentence-transformers: the list of modules, the pooling, the length, the prompts."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else []), *modules]
    listed = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 50}))
    prompts = {"query": "question ", "document": ""}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))


def write_encoder_gguf(path: Path, tensors: dict[str, np.ndarray], pooling_type: int = 1) -> Path:
    """Write the same encoder as one GGUF file, as llama.cpp's converter does."""
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(70)
    writer.add_embedding_length(ENCODER.hidden_size)
    writer.add_feed_forward_length(ENCODER.intermediate_size)
    writer.add_block_count(ENCODER.num_hidden_layers)
    writer.add_head_count(ENCODER.num_attention_heads)
    writer.add_layer_norm_eps(ENCODER.layer_norm_eps)
    writer.add_uint32("bert.pooling_type", pooling_type)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(
        [t if t in SPECIAL else t[2:] if t.startswith("##") else f"\u2581{t}" for t in LETTERS]
    )
    writer.add_token_types([3 if token in SPECIAL else 1 for token in LETTERS])
    for name, index in (("unknown", 1), ("cls", 2), ("seperator", 3), ("padding", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    for name, other in _gguf_names().items():
        writer.add_tensor(other, tensors[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_names() -> dict[str, str]:
    pairs = {}
    for name, other in NAMES:
        for i in range(ENCODER.num_hidden_layers if "{i}" in name else 1):
            for kind in (
                ("weight",) if other in ("token_embd", "position_embd", "token_types") else ("weight", "bias")
            ):
                pairs[f"{name}.{kind}".replace("{i}", str(i))] = f"{other}.{kind}".replace("{i}", str(i))
    return pairs


# --- tokenizers of a few tokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def gguf_metadata(family: str, typed: list[tuple[str, int]], **values) -> dict[str, object]:
    """Return the GGUF metadata of a tiny tokenizer; keys are given without their tokenizer.ggml prefix."""
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
    metadata = gguf_metadata("gpt2", BPE_TOKENS, **(defaults | values))
    return from_metadata(metadata | {"tokenizer.chat_template": CHATML})


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
    return from_metadata(gguf_metadata("llama", SPM_TOKENS, scores=scores, **values))


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
    return from_metadata(gguf_metadata("bert", WORD_TOKENS, **(ids | values)))


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer._core.id_to_token(index) for index in ids]


# --- GGUF files


def tokenizer_metadata(family: str) -> dict[str, object]:
    """Return the metadata of a tiny tokenizer with every value that any family has."""
    typed = {"gpt2": BPE_TOKENS, "llama": SPM_TOKENS, "bert": WORD_TOKENS}[family]
    values: dict[str, object] = {
        "model": family, "pre": "gpt-2", "tokens": [text for text, _ in typed],
        "token_type": [kind for _, kind in typed], "merges": MERGES, "bos_token_id": 1, "eos_token_id": 2,
        "scores": [float(SPM_WORDS.get(text, 0)) for text, _ in typed], "unknown_token_id": 1, "cls_token_id": 2,
        "seperator_token_id": 3, "padding_token_id": 0, "add_bos_token": True, "add_space_prefix": True,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()} | {
        "tokenizer.chat_template": CHATML
    }


def write_gguf(path: Path, metadata: dict[str, object], tensors: dict[str, np.ndarray]) -> None:
    """Write a GGUF file with the gguf library; values that it cannot write are left out."""
    writer = gguf.GGUFWriter(path, str(metadata.get("general.architecture", "llama")))
    for key, value in metadata.items():
        if key != "general.architecture":
            _write_value(writer, key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int() if -(2**63) <= value < 2**64:
            (writer.add_uint64 if value >= 0 else writer.add_int64)(key, value)
        case float():
            writer.add_float64(key, value)
        case str() if value and value.isprintable():
            writer.add_string(key, value)
        case [first, *rest] if all(type(item) is type(first) for item in rest) and isinstance(
            first, str | float
        ):
            if not any("\ud800" in str(item) for item in value):
                writer.add_array(key, value)
        case [int(), *rest] if all(type(item) is int and -(2**31) <= item < 2**31 for item in value):
            writer.add_array(key, value)


def decoder_gguf() -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Return the metadata and the tensors of a tiny decoder, by llama.cpp's names."""
    typed = tokenizer_metadata("gpt2")
    rows = len(typed["tokenizer.ggml.tokens"])
    values = {"embedding_length": 16, "feed_forward_length": 24, "block_count": 2, "attention.head_count": 4,
              "attention.head_count_kv": 2, "context_length": 64, "attention.layer_norm_rms_epsilon": 1e-5,
              "rope.freq_base": 10000.0, "rope.dimension_count": 4}  # fmt: skip
    shapes = {"token_embd": (rows, 16), "output_norm": (16,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_norm": (16,), "attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16),
            "ffn_norm": (16,), "ffn_gate": (24, 16), "ffn_up": (24, 16), "ffn_down": (16, 24)}.items()}  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    metadata = {"general.architecture": "llama"} | {f"llama.{name}": value for name, value in values.items()}
    return metadata | typed, tensors


# --- a stand-in generator


class GenerateOnly:
    """A stand-in generator that lacks `generate` and `context_length`, which the test adds; a token is a word."""

    @property
    def fingerprint(self) -> str:
        return "0" * 64

    @property
    def description(self) -> str:
        return "a stand-in"

    def count(self, text: str) -> int:
        return len(text.split())

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        return sum(self.count(message.content) for message in messages)

    def stream(self, request: Request) -> Iterator[str | Usage]:
        raise NotImplementedError
