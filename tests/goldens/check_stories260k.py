"""Check that our decoder continues as llama2.c's 260K-parameter model does: every greedy id must be the same.

    python tests/goldens/check_stories260k.py FOLDER      (stories260K.bin, stories260K_golden.json)
    -> 256 of 256 greedy ids are the same

The file is llama2.c's legacy checkpoint: seven int32, then float32 tensors, all layers of a kind together.
"""

import json
import sys
from pathlib import Path

import numpy as np

from rag.generate.engine import Engine
from rag.generate.prefill_batches import TokenRequest
from rag.models import checkpoint, placement
from rag.models.llama.checkpoint import huggingface_table, unpermute
from rag.models.llama.model import Llama, LlamaConfig, abstract


def read(path: Path) -> Llama:
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = np.frombuffer(raw, np.int32, 7).tolist()
    config = LlamaConfig(vocab, dim, hidden, layers, heads, kv_heads, dim // heads, length)
    values, place = np.frombuffer(raw, np.float32, offset=28), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal place
        place += (size := int(np.prod(shape)))
        return values[place - size : place].reshape(shape)

    kv = dim // heads * kv_heads
    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    for name, *shape in (
        ("input_layernorm", dim),
        ("self_attn.q_proj", dim, dim),
        ("self_attn.k_proj", kv, dim),
        ("self_attn.v_proj", kv, dim),
        ("self_attn.o_proj", dim, dim),
        ("post_attention_layernorm", dim),
        ("mlp.gate_proj", hidden, dim),
        ("mlp.down_proj", dim, hidden),
        ("mlp.up_proj", hidden, dim),
    ):
        for layer, weight in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):  # it rotates adjacent pairs, as llama.cpp does
                weight = unpermute(weight, heads if name.endswith("q_proj") else kv_heads)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight
    tensors["model.norm.weight"] = take(dim)
    model = checkpoint.fill(abstract(config), tensors, huggingface_table(config), str(path))
    return placement.to_device(model, np.dtype("float32"))


def main() -> None:
    folder = Path(sys.argv[1])
    golden = json.loads((folder / "stories260K_golden.json").read_text())
    bos, *expected = golden["greedy_ids_from_bos"]
    engine = Engine(read(folder / "stories260K.bin"), ())
    made = [
        token
        for tokens in engine.stream(engine.prefill(TokenRequest((bos,), len(expected))))
        for token in tokens
    ]
    same = sum(a == b for a, b in zip(made, expected, strict=True))
    print(f"{same} of {len(expected)} greedy ids are the same")
    sys.exit(same != len(expected))


if __name__ == "__main__":
    main()
