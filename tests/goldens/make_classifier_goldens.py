"""Write the logits of sequence classifiers by transformers to tests/goldens/tiny_classifiers.npz.

    python tests/goldens/make_classifier_goldens.py      (needs requirements-bench.txt)

A random model of each family with its head, its weights under the names that it is saved with, one padded batch of
pairs and the logits they get.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, RobertaConfig, XLMRobertaConfig

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 57, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 80, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "bert": BertConfig(**SIZES, num_labels=1),
    "bert_labels": BertConfig(**SIZES, num_labels=3),
    "roberta": RobertaConfig(**SIZES, num_labels=1, type_vocab_size=1, pad_token_id=1),
    "xlm_roberta": XLMRobertaConfig(**SIZES, num_labels=2, type_vocab_size=1, pad_token_id=1),
}


def main() -> None:
    arrays = {}
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
        for name, weight in model.named_parameters():
            if name.endswith((".bias", "LayerNorm.weight")):  # zeros and ones would hide a mistake
                torch.nn.init.normal_(weight, mean=1.0 if name.endswith("LayerNorm.weight") else 0.0, std=0.2)
        # no padding id among the tokens: RoBERTa counts positions by it
        tokens = torch.randint(2, config.vocab_size, (4, 21))
        lengths = torch.tensor([21, 13, 5, 8])
        mask = torch.arange(21) < lengths[:, None]
        types = (torch.arange(21) >= torch.tensor([9, 4, 2, 5])[:, None]).long() * (
            config.type_vocab_size - 1
        )
        tokens = torch.where(mask, tokens, config.pad_token_id)
        with torch.no_grad():
            arrays[f"{family}/logits"] = model(tokens, mask.long(), types).logits.numpy()
        for name, array in (("tokens", tokens), ("lengths", lengths), ("types", types)):
            arrays[f"{family}/{name}"] = array.numpy().astype(np.int32)
        arrays[f"{family}/config"] = np.array(json.dumps(config.to_dict()))
        for name, weight in model.state_dict().items():
            arrays[f"{family}/weights/{name}"] = weight.numpy()
    np.savez_compressed(HERE / "tiny_classifiers.npz", **arrays)


if __name__ == "__main__":
    main()
