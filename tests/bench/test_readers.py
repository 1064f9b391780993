"""docs/readers.md: the sizes in its table follow from the shapes that the models' config.json files state."""

from pathlib import Path

import jax
import pytest

from rag.models import hub
from rag.models.llama.configuration import config_from_huggingface
from rag.models.llama.model import abstract

DOCUMENT = Path(__file__).parents[2] / "docs" / "readers.md"

# repository: model type, vocabulary, width, FFN width, layers, heads, KV heads, head dim, tied embeddings
SHAPES = {
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("llama", 49152, 960, 2560, 32, 15, 5, 64, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("llama", 49152, 2048, 8192, 24, 32, 32, 64, True),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ("llama", 32000, 2048, 5632, 22, 32, 4, 64, False),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", 128256, 3072, 8192, 28, 24, 8, 128, True),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2", 151936, 2048, 11008, 36, 16, 2, 128, True),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    "Qwen/Qwen3-0.6B": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True),
    "Qwen/Qwen3-4B": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
    "Qwen/Qwen3-8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(repository: str):
    kind, vocabulary, width, ffn, layers, heads, kv_heads, head_dim, tied = SHAPES[repository]
    values = {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": LLAMA3 if "Llama-3.2" in repository else None,
    }
    return config_from_huggingface(values, repository)


def table() -> dict[str, list[str]]:
    """Return the lines of the document's table by their repository."""
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `hf:")]
    return {line[0].strip("`").removeprefix("hf:"): line for line in lines}


@pytest.mark.parametrize("repository", SHAPES)
def test_sizes_follow_from_the_shapes(repository):
    config = config_of(repository)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract(config)))
    int8 = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract(config, int8=True)))
    *_, parameters, download, memory = table()[repository]
    assert parameters == f"{count / 1e9:.2f}"
    assert download == f"{2 * count / 1e9:.1f} GB"
    assert memory == f"{4 * count / 1e9:.1f}, then {int8 / 1e9:.1f} GB"


def test_the_table_has_these_models_and_no_other():
    assert table().keys() == SHAPES.keys()


def test_every_name_of_ollama_is_a_uri():
    names = {line[1].strip("`") for line in table().values()}
    assert all(hub._OLLAMA.fullmatch(name) for name in names)
    assert len(names) == len(SHAPES)
