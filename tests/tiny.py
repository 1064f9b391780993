"""A tiny decoder with a tokenizer and a chat template, as a Hugging Face folder: everything real but the size."""

import json
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import tokenizers
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from rag.models.llama.model import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM_END = 257


def tiny_model(seed: int = 0, config: LlamaConfig = CONFIG) -> Llama:
    """Random weights, large enough that greedy tokens vary."""
    model = Llama(config, nnx.Rngs(seed))
    return jax.tree.map(lambda a: a * 3 if a.ndim == 2 else a, model)


def write_checkpoint(folder: Path) -> None:
    """config.json, model.safetensors and a byte-level tokenizer whose every byte is a token."""
    values = asdict(CONFIG) | {"model_type": "llama"}
    del values["rope_factors"], values["qkv_bias"], values["qk_norm"]
    (folder / "config.json").write_text(json.dumps(values))
    state = nnx.to_flat_state(nnx.state(tiny_model()))
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
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
