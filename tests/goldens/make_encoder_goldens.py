"""Write the outputs of encoders by transformers and sentence-transformers to tiny_encoders.npz and minilm.*

    python tests/goldens/make_encoder_goldens.py DIR           needs requirements-bench.txt; DIR holds MiniLM
    python tests/goldens/make_encoder_goldens.py DIR measure   writes nothing, compares ours on 200 texts

tiny_encoders: a random model of each family, its weights, one padded batch and its hidden states.
minilm: the first 40 of 200 varied texts, and their vectors by sentence-transformers in float32.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, BertConfig, RobertaConfig

HERE = Path(__file__).parent
DOCUMENTS = HERE.parents[1] / "data" / "sample" / "documents"
SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
FAMILIES = {
    "bert": BertConfig(**SIZES, hidden_act="gelu"),
    "bert_gelu_new": BertConfig(**SIZES, hidden_act="gelu_new"),
    "bert_relu": BertConfig(**SIZES, hidden_act="relu", layer_norm_eps=1e-5),
    "roberta": RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5),
}
SHORT = (
    "",
    " ",
    "a",
    "?",
    "\n\n\t",
    "Albatross",
    "What is attention mechanism?",
    "The quick brown fox jumps over the lazy dog.",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG!",
    "2 + 2 = 4; 3.14159, 1,000,000 and 6.02e23",
    "def f(x): return [y ** 2 for y in x if y % 2]",
    "<p>Some <b>bold</b> &amp; <i>italic</i> text</p>",
    "https://example.org/path?query=1&other=2#fragment",
    "naïve café, Ångström, Zürich, São Paulo, Kraków",
    "nai\u0308ve cafe\u0301 in decomposed letters",
    "Съешь же ещё этих мягких французских булок",
    "Η γρήγορη καφέ αλεπού πηδάει πάνω από το σκυλί",
    "敏捷的棕色狐狸跳过了懒狗。",
    "いろはにほへと ちりぬるを",
    "다람쥐 헌 쳇바퀴에 타고파",
    "الثعلب البني السريع يقفز فوق الكلب",
    "השועל החום המהיר קופץ מעל הכלב",
    "नमस्ते दुनिया",
    "🤖 emoji 👩‍👩‍👧 and flags 🇫🇷",
    "zero\u200bwidth, soft\u00adhyphen, no\u00a0break",
    "pneumonoultramicroscopicsilicovolcanoconiosis " * 3,
    "x" * 120,
    "x" * 90,
    "word " * 400,
    "... --- ... !!! ??? ;;; ::: ((( ))) [[[ ]]]",
)


def varied_texts(count: int) -> list[str]:
    """Return the short texts, then excerpts of the sample documents, of 1 to 400 words."""
    words = " ".join(path.read_text() for path in sorted(DOCUMENTS.iterdir())).split(" ")
    draw, texts = random.Random(0), list(SHORT)
    while len(texts) < count:
        size = min(400, 1 + int(draw.lognormvariate(4, 1)))
        start = draw.randrange(len(words) - size)
        texts.append(" ".join(words[start : start + size]))
    return texts


def tiny_encoders() -> None:
    arrays = {}
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModel.from_config(config, attn_implementation="eager").eval()
        for name, weight in model.named_parameters():
            if name.endswith((".bias", "LayerNorm.weight")):  # zeros and ones would hide a mistake
                torch.nn.init.normal_(weight, mean=1.0 if name.endswith("LayerNorm.weight") else 0.0, std=0.2)
        tokens = torch.randint(
            2, config.vocab_size, (3, 21)
        )  # no padding id among them: RoBERTa counts positions
        lengths = torch.tensor([21, 13, 1])
        mask = torch.arange(21) < lengths[:, None]
        types = torch.randint(0, config.type_vocab_size, tokens.shape)
        tokens = torch.where(mask, tokens, config.pad_token_id)
        with torch.no_grad():
            arrays[f"{family}/hidden"] = model(tokens, mask.long(), types).last_hidden_state.numpy()
        arrays[f"{family}/tokens"] = tokens.numpy().astype(np.int32)
        arrays[f"{family}/lengths"] = lengths.numpy().astype(np.int32)
        arrays[f"{family}/types"] = types.numpy().astype(np.int32)
        arrays[f"{family}/config"] = np.array(json.dumps(config.to_dict()))
        for name, weight in model.state_dict().items():
            arrays[f"{family}/weights/{name}"] = weight.numpy()
    np.savez_compressed(HERE / "tiny_encoders.npz", **arrays)


def sentence_transformers_vectors(folder: str, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    return model.encode(texts, batch_size=1, normalize_embeddings=True)  # 1: no padding at all


def measure(folder: str) -> None:
    from rag.embed.bert import BertEmbedder

    texts = varied_texts(200)
    ours, theirs = BertEmbedder(folder).encode(texts), sentence_transformers_vectors(folder, texts)
    worst = abs(ours - theirs).max()
    cosines = np.sum(ours.astype(np.float64) * theirs, axis=1)
    print(f"{len(texts)} texts: smallest cosine {cosines.min():.8f}, largest difference {worst:.1e}")


if __name__ == "__main__":
    if sys.argv[2:] == ["measure"]:
        measure(sys.argv[1])
    else:
        tiny_encoders()
        kept = varied_texts(40)
        (HERE / "minilm.json").write_text(json.dumps(kept, ensure_ascii=False, indent=0), encoding="utf-8")
        np.save(HERE / "minilm.npy", sentence_transformers_vectors(sys.argv[1], kept))
