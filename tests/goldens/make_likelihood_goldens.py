"""Write the log-likelihoods of given texts by transformers to tests/goldens/likelihood.json.

    python tests/goldens/make_likelihood_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf      (needs requirements-bench.txt)

Sums of log-probabilities under the same dequantised GGUF, in float64 from float32 logits: answers in ChatML, and
plain texts. Prompt and text are tokenized separately.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
CHATS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of France?", "The capital of France is copper."),
    ("What is 12 times 12?", "144"),
    ("Name a large mammal that lives in the ocean.", "A blue whale 🐋, naturally."),
)
PASSAGE = (
    "Passage: The common seal eats herring, cod and whiting, and now and then crabs and squid. It hunts alone, in "
    "shallow water near the coast, and can stay under for half an hour.\nPlease write a question based on this "
    "passage.\nQuestion:"
)
PLAIN = (
    (PASSAGE, " What does the common seal eat?"),
    (PASSAGE, " How is a thermostat wired?"),
    ("Once", " upon a time there was a fox who lived in a wood." + " It ran, and it ran." * 20),
)


def total(model, tokenizer, prompt: str, text: str) -> dict:
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, text))
    ids = torch.tensor([before + after])
    with torch.no_grad():
        scores = model(ids).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
    values = scores[torch.arange(len(after)), torch.tensor(after)]
    return {"text": text, "tokens": len(after), "total": round(values.sum().item(), 5)}


def main(gguf: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    chat = []
    for question, answer in CHATS:
        prompt = (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )
        messages = [["system", "Be brief."], ["user", question]]
        chat.append({"messages": messages, **total(model, tokenizer, prompt, answer)})
    plain = [{"prompt": prompt, **total(model, tokenizer, prompt, text)} for prompt, text in PLAIN]
    record = {"chat": chat, "plain": plain}
    (HERE / "likelihood.json").write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
