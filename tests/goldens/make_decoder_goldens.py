"""Write the logits and greedy answers of decoders by transformers to tests/goldens/tiny_decoders.npz and smollm2.json.

    python tests/goldens/make_decoder_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf      (needs requirements-bench.txt)

tiny_decoders: a random model of each family, its weights, one batch of tokens and the logits they get.
smollm2: prompts in ChatML, the logits of their last token and 64 greedy tokens, from the same dequantised GGUF.
Prompts whose two best logits come closer than 0.01 anywhere are left out: there rounding would decide.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "initializer_range": 0.3,
}  # fmt: skip
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False, rope_theta=500000.0, rope_scaling=SCALING),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True, rope_theta=1000000.0),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True, head_dim=8, rope_theta=1000000.0),
}
QUESTIONS = (
    "What is the capital of France?",
    "Explain why the sky is blue in two sentences.",
    "List three uses of copper.",
    "Who wrote Hamlet, and when?",
    "What is 12 times 12?",
    "Name a large mammal that lives in the ocean.",
    "Write a haiku about rain.",
    "What does a thermostat do?",
    "How do I boil an egg?",
    "Give one reason to learn to swim.",
)
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def tiny_decoders() -> None:
    arrays = {}
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for name, weight in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):  # zeros and ones would hide a mistake
                torch.nn.init.normal_(weight, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.2)
        tokens = torch.randint(0, config.vocab_size, (2, 33))
        with torch.no_grad():
            arrays[f"{family}/logits"] = model(tokens).logits.numpy()
        arrays[f"{family}/tokens"] = tokens.numpy().astype(np.int32)
        arrays[f"{family}/config"] = np.array(json.dumps(config.to_dict()))
        for name, weight in model.state_dict().items():
            if not (config.tie_word_embeddings and name == "lm_head.weight"):
                arrays[f"{family}/weights/{name}"] = weight.numpy()
    np.savez_compressed(HERE / "tiny_decoders.npz", **arrays)


def smollm2(gguf: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    cases = []
    for question in QUESTIONS:
        turns = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        chat = f"{turns}<|im_start|>assistant\n"
        prompt = tokenizer(chat, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=64, eos_token_id=2,
                pad_token_id=2, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        best = torch.stack([step[0].topk(2).values for step in out.logits])
        gap = (best[:, 0] - best[:, 1]).min().item()
        print(f"{gap:.4f} {question}")
        if gap > 0.01:
            cases.append({
                "question": question,
                "prompt": prompt[0].tolist(),
                "greedy": out.sequences[0, prompt.shape[1] :].tolist(),
                "last_logits": [round(x, 5) for x in out.logits[0][0, ::64].tolist()],  # every 64th of 49,152
            })  # fmt: skip
    record = {"system": SYSTEM, "every": 64, "cases": cases}
    (HERE / "smollm2.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    tiny_decoders()
    smollm2(Path(sys.argv[1]))
