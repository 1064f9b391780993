"""Embed texts, tokenising included, with our encoder in each type of weights and with its peers, on all cores.

    sentence-transformers   torch, float32
    ONNX Runtime int8       the same weights: torch's export, quantised dynamically, with texts batched by length

The texts are excerpts of the sample documents, their lengths drawn from a log-normal distribution.

Letters: N texts, E embedding dim.
"""

import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le, MinLen

from rag import native
from rag.bench.peers import print_left_out
from rag.bench.timing import Row, alternate, ratio
from rag.embed.bert import BertEmbedder
from rag.models import hub
from rag.models.bert.checkpoint import LayerDtype
from rag.ops.linear import product_type
from rag.runtime.machine.hardware import cores
from rag.runtime.machine.measurement import Timing, Work
from rag.runtime.options import Count, Filled, check_fields

Encode = Callable[[list[str]], np.ndarray]  # texts -> unit vectors, N x E

_TORCH, _ONNX = "sentence-transformers", "ONNX Runtime int8"
_DOCUMENTS = Path(__file__).parents[2] / "data" / "sample" / "documents"


@dataclass(frozen=True)
class EmbedBenchmark:
    """Measure texts and tokens per second of each type of weights; conf/bench/embed.yaml has the defaults.

    "min cosine" is the smallest cosine with our float32 vectors. Operations are those of the texts' own tokens, without
    padding.
    """

    weights: Filled
    dtypes: Annotated[Sequence[LayerDtype], MinLen(1)]
    tokens_per_batch: Count
    texts: Count
    median_words: Count
    spread: Annotated[float, Ge(0), Le(10)]
    batch_size: Count
    repeats: Count

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        """Return a row for each of our types of weights; all are timed in turns with the peers."""
        texts = mixed_texts(self.texts, self.median_words, self.spread)
        ours = {
            name: BertEmbedder(self.weights, tokens_per_batch=self.tokens_per_batch, dtype=name)
            for name in dict.fromkeys(("float32", *self.dtypes))
        }
        spec, folder = ours["float32"].spec, str(hub.local_path(self.weights))
        opened = {
            _TORCH: _sentence_transformers(folder, self.batch_size),
            _ONNX: _onnx(folder, self.batch_size, spec["pooling"]),
        }
        peers = {name: encode for name, encode in opened.items() if encode is not None}
        calls: dict[str, Encode] = {name: embedder.encode for name, embedder in ours.items()}
        calls |= peers
        vectors: dict[str, np.ndarray] = {}

        def call(name: str) -> None:
            vectors[name] = calls[name](texts)

        timings = alternate({name: partial(call, name) for name in calls}, repeats=self.repeats)
        limit = spec["pooling"]["max_length"]
        lengths = [min(2 + len(ours["float32"].token_spans(text)), limit) for text in texts]
        figures = {
            name: _figures(timing, lengths)
            | {"min cosine": float(np.sum(vectors["float32"] * vectors[name], axis=1).min())}
            for name, timing in timings.items()
        }
        return [
            Row(
                f"{name}, {len(texts)} texts, {sum(lengths)} tokens",
                figures[name] | self._work(spec["config"], name, lengths).rates(timings[name]),
                {peer: figures[peer] for peer in peers},
                {peer: ratio(timings[name], timings[peer]) for peer in peers},
            )
            for name in self.dtypes
        ]

    def _work(self, config: dict[str, Any], dtype: str, lengths: list[int]) -> Work:
        """Count products with weights in the type that they are multiplied in, those of attention in float32."""
        projections, attention = operations(lengths, config)
        rows, width = self.tokens_per_batch, config["hidden_size"]
        kind, times = dtype, 1
        if dtype == "int8":
            kind = product_type(rows, width, by_native=native.has_tiles(width))
            times = 2 if kind == "int8" else 1  # two digits
        return Work(float32=attention) + Work(**{kind: times * projections})


def mixed_texts(count: int, median_words: int, spread: float) -> list[str]:
    """Return random excerpts of the sample documents, the same ones every time."""
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted(_DOCUMENTS.iterdir())).split()
    draw, texts = random.Random(0), []
    for _ in range(count):
        size = min(len(words) - 1, max(1, round(median_words * draw.lognormvariate(0, spread))))
        start = draw.randrange(len(words) - size)
        texts.append(" ".join(words[start : start + size]))
    return texts


def operations(lengths: list[int], config: dict[str, Any]) -> tuple[int, int]:
    """Count the operations of the encoder, two for each multiply-add.

    Args:
        lengths: The tokens of each text.
        config: The encoder's sizes, by their Hugging Face names.

    Returns:
        Operations of the six projections of each token, and of the two products of each pair of tokens.
    """
    width, inner, layers = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    projections = sum(lengths) * (4 * width * width + 2 * width * inner)
    return 2 * layers * projections, 2 * layers * 2 * width * sum(n * n for n in lengths)


def _figures(timing: Timing, lengths: list[int]) -> dict[str, float]:
    return {"texts/s": len(lengths) / timing.median, "tokens/s": sum(lengths) / timing.median}


def _sentence_transformers(folder: str, batch_size: int) -> Encode | None:
    try:
        import torch
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        print_left_out(_TORCH, f"{error} (make bench-setup)")
        return None
    torch.set_num_threads(cores())
    model = SentenceTransformer(folder, device="cpu")
    options = {"batch_size": batch_size, "normalize_embeddings": True, "show_progress_bar": False}
    return lambda texts: model.encode(texts, **options)


def _onnx(folder: str, batch_size: int, pooling: dict[str, Any]) -> Encode | None:
    try:
        import onnxruntime
        from transformers import AutoTokenizer

        model = _quantised(folder)
    except ImportError as error:
        print_left_out(_ONNX, f"{error} (make bench-setup)")
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(texts: list[str]) -> np.ndarray:
        ids = tokenizer(texts, truncation=True, max_length=pooling["max_length"])["input_ids"]
        order = np.argsort([-len(row) for row in ids], kind="stable")
        vectors: Any = [None] * len(texts)
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            tokens = np.zeros((len(some), len(ids[some[0]])), np.int64)
            mask = np.zeros_like(tokens)
            for b, i in enumerate(some):
                tokens[b, : len(ids[i])], mask[b, : len(ids[i])] = ids[i], 1
            [hidden] = session.run(None, {"input_ids": tokens, "attention_mask": mask})
            for b, i in enumerate(some):
                inside = hidden[b, : len(ids[i])]
                vector = inside[0] if pooling["mode"] == "cls" else inside.mean(axis=0)
                vectors[i] = vector / np.linalg.norm(vector)
        return np.stack(vectors)

    return encode


def _quantised(folder: str) -> bytes:
    """Return the encoder as int8 ONNX: weights with a scale for each output, activations scaled at run time."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel

    class TokenStates(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

        def forward(self, input_ids, attention_mask):
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    inputs = (torch.tensor([[1, 2, 3, 4], [1, 2, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    free = {0: "batch", 1: "tokens"}
    with tempfile.TemporaryDirectory() as folder_name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's advice on its other forms
        exported, quantised = Path(folder_name, "model.onnx"), Path(folder_name, "int8.onnx")
        torch.onnx.export(
            TokenStates(),
            inputs,
            str(exported),
            input_names=["input_ids", "attention_mask"],
            output_names=["states"],
            dynamic_axes={"input_ids": free, "attention_mask": free, "states": free},
            dynamo=False,
        )
        logging.disable(logging.WARNING)  # it reports every product that it does not quantise
        try:
            quantize_dynamic(exported, quantised, per_channel=True, weight_type=QuantType.QInt8)
        finally:
            logging.disable(logging.NOTSET)
        return quantised.read_bytes()
