"""Low-rank adapters of a decoder's linear layers (LoRA, Hu et al. 2021, arXiv:2106.09685): their files, and merging.

Two kinds of folder are read and written. Tensors have PEFT's names and layout in both,
base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [rank, M] and .lora_B.weight [O, rank]:

    adapter.safetensors, card.json                    ours: the header names the base weights, the card the provenance
    adapter_model.safetensors, adapter_config.json    PEFT's, which does not say to which weights it belongs

Letters: M width of the input, O outputs of a linear layer.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32
from pydantic import Field

from rag.models import tensor_files
from rag.models.checkpoint import M, dotted, fill_paths
from rag.models.conversion_cache import file_digests
from rag.runtime.cache.folder import write_errors
from rag.runtime.cache.keys import content_key
from rag.runtime.files import atomic_file
from rag.runtime.options import Count
from rag.runtime.records import OpenRecord, Record, fitted_record, parsed_json, read_record
from rag.types import UserError

ADAPTER, CARD = "adapter.safetensors", "card.json"
PEFT_TENSORS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DEFAULT_READER = Path(__file__).with_name(
    "default_reader"
)  # the folder of the adapter that the package contains

Factors = tuple[Float32[np.ndarray, "rank _"], Float32[np.ndarray, "rank _"]]  # a [rank, M], b [rank, O]

_HEADER = (
    "lora_adapter"  # the one entry of the header's metadata: safetensors writes several in a random order
)
_FETCH = "fetch the adapter again"
_NAME = re.compile(
    r"base_model\.model\.(?:model\.(layers\.\d{1,4}\.[\w.]{1,60})|(lm_head))\.lora_([AB])\.weight"
)
# Settings of PEFT that do not change what the tensors mean.
_PEFT_NEUTRAL = frozenset(
    "auto_mapping base_model_name_or_path eva_config exclude_modules inference_mode layers_pattern layers_to_transform "
    "lora_dropout megatron_core peft_version qalora_group_size revision target_modules task_type".split()
)


@dataclass(frozen=True)
class LoraAdapter:
    """A change of some linear layers: the weight W of each becomes W + alpha / rank * (b.T @ a)."""

    rank: int
    alpha: float
    base_sha256: (
        str | None
    )  # of the weights that it was trained on (llama.checkpoint_sha256); None: not known
    tensors: Mapping[
        str, Factors
    ]  # by the path of the layer in the model, such as "layers.0.self_attn.q_proj"


class AdapterHeader(Record):
    """The metadata in the header of adapter.safetensors, as JSON."""

    format: Literal[1]
    rank: Count
    alpha: float
    base_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class AdapterCard(OpenRecord):
    """The provenance of an adapter; what its parts hold is up to the trainer."""

    base: Any
    data: Any
    metrics: Any
    commit: str | None
    seconds: float


class PeftConfig(OpenRecord):
    """The settings in adapter_config.json that decide what the tensors mean; PiSSA and others change the base too."""

    peft_type: Literal["LORA"]
    r: Count
    lora_alpha: float
    use_rslora: bool = False  # alpha / sqrt(rank) in place of alpha / rank
    bias: Literal["none"] = "none"
    init_lora_weights: Literal[True, False, "gaussian", "orthogonal", "eva"] = True


# --- reading


def adapter_files(folder: Path) -> list[Path]:
    """Return the files that decide what an adapter does. Raises UserError if the folder is no adapter."""
    for names in ([ADAPTER], [PEFT_CONFIG, PEFT_TENSORS]):
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    raise UserError(
        f"{folder} is no adapter: it holds neither {ADAPTER} nor {PEFT_CONFIG} with {PEFT_TENSORS}; name the folder "
        "that training or PEFT has written"
    )


def adapter_digest(folder: Path) -> str:
    """Return 64 hex digits of the contents of an adapter's files. Raises UserError if the folder is no adapter."""
    return content_key(file_digests(adapter_files(folder)))


def default_reader(base_sha256: str) -> Path | None:
    """Return the folder of the adapter in this package if it was trained on these weights, and None otherwise."""
    file = DEFAULT_READER / ADAPTER
    return DEFAULT_READER if file.is_file() and _read_header(file).base_sha256 == base_sha256 else None


def load_adapter(folder: Path) -> LoraAdapter:
    """Return the adapter in a folder of `save_adapter` or of PEFT, in float32.

    PEFT does not record the base weights: its adapters have no `base_sha256`, and fit every model with their shapes.

    Raises:
        UserError: files are missing or damaged, or a setting of PEFT changes the maths in a way that is not known here.
    """
    *config, file = adapter_files(folder)
    if config:
        rank, alpha = _read_peft_config(config[0])
        base = None
    else:
        header = _read_header(file)
        rank, alpha, base = header.rank, header.alpha, header.base_sha256
    return LoraAdapter(rank, alpha, base, _factors(tensor_files.read_safetensors(file), rank, str(file)))


def read_card(folder: Path) -> AdapterCard:
    """Return the card beside an adapter of ours. Raises UserError if it is missing or damaged."""
    try:
        return read_record(folder / CARD, AdapterCard, _FETCH)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} holds no {CARD}; {_FETCH}") from error


def _read_header(file: Path) -> AdapterHeader:
    metadata = tensor_files.read_safetensors_metadata(file)
    if _HEADER not in metadata:
        raise UserError(f"{file} is no adapter of ours: its header has no {_HEADER!r}; {_FETCH}")
    name = f"{_HEADER!r} in the header of {file}"
    return fitted_record(name, parsed_json(name, metadata[_HEADER], _FETCH), AdapterHeader, _FETCH)


def _read_peft_config(file: Path) -> tuple[int, float]:
    """Return (rank, alpha), with alpha such that alpha / rank is the scale."""
    config = read_record(file, PeftConfig, "only plain LoRA adapters can be read")
    others = config.model_extra or {}
    if refused := [name for name, value in others.items() if value and name not in _PEFT_NEUTRAL]:
        raise UserError(
            f"{file} sets {refused[:5]!r:.200}, which is no plain LoRA; merge this adapter with PEFT, and use the "
            "merged weights"
        )
    return config.r, config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1)


def _factors(tensors: Mapping[str, np.ndarray], rank: int, source: str) -> dict[str, Factors]:
    """Return the factors of each layer by its path, from tensors by their names in the file."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for name, tensor in tensors.items():
        if found := _NAME.fullmatch(name):
            pairs.setdefault(found[1] or found[2], {})[found[3]] = tensor
        else:
            unknown.append(f"{name!r:.80}")
    single = [path for path, pair in pairs.items() if len(pair) == 1]
    if unknown or single or not pairs:
        raise UserError(
            f"{source} holds an adapter of {len(pairs)} linear layers: "
            f"{tensor_files.count_names('without lora_A or lora_B', single)}; "
            f"{tensor_files.count_names('unknown', unknown)}; {_FETCH}, or take an adapter of linear layers alone"
        )
    for path, pair in pairs.items():
        a, b = pair["A"].shape, pair["B"].shape
        if len(a) != 2 or len(b) != 2 or (a[0], b[1]) != (rank, rank):
            raise UserError(
                f"{source} holds {path} with shapes {a} and {b}, where its rank is {rank}; {_FETCH}"
            )
    return {path: (pair["A"], np.ascontiguousarray(pair["B"].T)) for path, pair in pairs.items()}


# --- writing


def save_adapter(
    folder: Path,
    adapter: LoraAdapter,
    card: Mapping[str, Any],
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> None:
    """Write adapter.safetensors and then card.json; the same adapter gives the same bytes.

    Args:
        folder: made if it is missing; files of these names are replaced.
        adapter: its `base_sha256` must be known.
        card: the provenance, with the fields of AdapterCard.
        dtype: of the tensors in the file.

    Raises:
        UserError: the files cannot be written.
    """
    if adapter.base_sha256 is None:
        raise ValueError("the adapter does not say to which weights it belongs")
    header = AdapterHeader(format=1, rank=adapter.rank, alpha=adapter.alpha, base_sha256=adapter.base_sha256)
    _write_tensors(folder / ADAPTER, adapter, dtype, {_HEADER: header.model_dump_json()})
    write_card(folder, card)


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write card.json, with the fields of AdapterCard. Raises UserError if it cannot be written."""
    AdapterCard.model_validate(card)
    _write_json(folder / CARD, card)


def save_peft(folder: Path, adapter: LoraAdapter, base_model: str | None = None) -> None:
    """Write an adapter as PEFT does, in float32; `base_model` is the name or path from which PEFT loads the base."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted({path.rpartition(".")[2] for path in adapter.tensors}),
        "bias": "none",
        "inference_mode": True,
    }
    _write_json(folder / PEFT_CONFIG, config)
    _write_tensors(folder / PEFT_TENSORS, adapter, "float32", {"format": "pt"})


def _write_tensors(file: Path, adapter: LoraAdapter, dtype: str, metadata: dict[str, str]) -> None:
    from safetensors.numpy import save

    tensors: dict[str, np.ndarray] = {}
    for path, (a, b) in adapter.tensors.items():
        name = f"base_model.model.{path}" if path == "lm_head" else f"base_model.model.model.{path}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b.T}
    content = save({name: a.astype(jnp.dtype(dtype), order="C") for name, a in tensors.items()}, metadata)
    with write_errors(file), atomic_file(file) as opened:
        opened.write(content)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with write_errors(file), atomic_file(file, "w") as opened:
        opened.write(f"{text}\n")


# --- merging


def merge(model: M, adapter: LoraAdapter, source: str = "the adapter") -> M:
    """Return a model with the adapter added to its float32 weights.

    Args:
        model: it is not changed.
        adapter: the adapter.
        source: the adapter's name in errors.

    Returns:
        A model whose parameters are numpy arrays, as `llama.checkpoint.load` returns it.

    Raises:
        UserError: a layer is unknown or of another shape, or a weight would be too large for the model's sums.
    """
    weights = {
        dotted(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    if unknown := [path for path in adapter.tensors if f"{path}.weight" not in weights]:
        raise UserError(
            f"{source} does not fit the model: {tensor_files.count_names('unknown', unknown)}; use it with the weights "
            "that it was trained on"
        )
    for path, (a, b) in adapter.tensors.items():
        name, shape = f"{path}.weight", (b.shape[1], a.shape[1])
        if weights[name].shape != shape:
            raise UserError(
                f"{source} does not fit the model: it changes {name} of shape {shape}, which has the shape "
                f"{weights[name].shape}; use it with the weights that it was trained on"
            )
        with np.errstate(all="ignore"):  # `check_weights` raises for what is not finite
            merged = weights[name] + np.float32(adapter.alpha / adapter.rank) * (b.T @ a)
        weights[name] = tensor_files.check_weights(merged, name, source)
    return fill_paths(model, weights, (), source)
