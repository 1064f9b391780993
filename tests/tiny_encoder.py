"""A tiny encoder whose WordPiece vocabulary is the letters, as a Hugging Face folder and as a GGUF file."""

import json
from pathlib import Path
from string import ascii_lowercase

import gguf
import jax
import numpy as np
import tokenizers
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from rag.models.bert.checkpoint import NAMES
from rag.models.bert.model import Bert, BertConfig

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = (*SPECIAL, *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase))
CONFIG = BertConfig(
    vocab_size=len(LETTERS),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=80,
)


def tiny_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by Hugging Face's names, large enough that vectors vary."""
    model = jax.tree.map(lambda a: a * 10 if a.ndim == 2 else a + 0.1, Bert(CONFIG, nnx.Rngs(seed)))
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in flat}


def write_checkpoint(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config) -> Path:
    """The least a Hugging Face folder holds; `config` overrides config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [field for field in CONFIG.__dataclass_fields__ if field != "position_offset"]
    values = {"model_type": "bert", "pad_token_id": 0} | {name: getattr(CONFIG, name) for name in names}
    (folder / "config.json").write_text(json.dumps(values | config))
    save_file(tiny_tensors() if tensors is None else tensors, folder / "model.safetensors")
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


def write_sentence_files(folder: Path, pooling: dict, *, normalize: bool = True, modules: tuple = ()) -> None:
    """What sentence-transformers adds: the list of modules, the pooling, the length, the prompts."""
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


def write_gguf(path: Path, tensors: dict[str, np.ndarray], pooling_type: int = 1) -> Path:
    """The same model as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(70)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_layer_norm_eps(CONFIG.layer_norm_eps)
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
        for i in range(CONFIG.num_hidden_layers if "{i}" in name else 1):
            for kind in (
                ("weight",) if other in ("token_embd", "position_embd", "token_types") else ("weight", "bias")
            ):
                pairs[f"{name}.{kind}".replace("{i}", str(i))] = f"{other}.{kind}".replace("{i}", str(i))
    return pairs
