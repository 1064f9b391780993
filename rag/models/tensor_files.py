"""Read the configuration and tensors of checkpoint files, safetensors (sharded or not) and GGUF, all in float32."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rag.models import gguf_file
from rag.models.configuration import read_json
from rag.runtime.records import reason, stays_inside
from rag.types import UserError

_MAX_WEIGHT = 65504  # float16's largest number: with such weights no sum overflows float32
_GGUF_FLOATS = {"F16": np.float16, "F32": np.float32}  # for other types the gguf library takes the bytes
_SAFETENSORS_FLOATS = ("F32", "F16", "BF16", "F64")
_SAFETENSORS_BUFFERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a Hugging Face folder. Raises UserError if it is missing or damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json; name a complete Hugging Face checkpoint folder")
    return read_json(path)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a .safetensors file, or of a folder with one or with a sharded model's index.

    Raises UserError for files that are missing or damaged, types other than numbers that a weight can have, and
    weights that are not finite.
    """
    tensors: dict[str, np.ndarray] = {}
    for shard in shards(path):
        with _opened_safetensors(shard) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                array = check_weights(_safetensors_array(file, name, shard), name, str(shard))
                tensors[name] = np.asarray(array, np.float32)
    return tensors


def read_safetensors_metadata(path: Path) -> Mapping[str, str]:
    """Return the texts in the header of a .safetensors file. Raises UserError if the file is missing or damaged."""
    with _opened_safetensors(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened_safetensors(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="flax") as file:  # flax: numpy alone has no bfloat16
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read the weights in {path} ({reason(error)}); fetch the file again"
        ) from error


def _safetensors_array(file: Any, name: str, shard: Path) -> np.ndarray:
    if (kind := file.get_slice(name).get_dtype()) not in (*_SAFETENSORS_FLOATS, *_SAFETENSORS_BUFFERS):
        raise UserError(
            f"the weights {name!r} in {shard} are of type {kind}; only {', '.join(_SAFETENSORS_FLOATS)} are known, "
            "take another version of this checkpoint"
        )
    return np.asarray(file.get_tensor(name))


def shards(path: Path) -> Sequence[Path]:
    """Return the weight files of a safetensors checkpoint, a file or a Hugging Face folder.

    Raises UserError if there are none, or if the index of a sharded model names files that are missing or outside
    of its folder.
    """
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_shards(index)
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    raise UserError(
        f"{path} holds neither model.safetensors nor model.safetensors.index.json; name a checkpoint folder"
    )


def _indexed_shards(index: Path) -> Sequence[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} holds no weight_map from tensors to files; fetch the file again")
    for name in names.values():
        if not stays_inside(name):
            raise UserError(
                f"{index} names a file outside of its folder ({name!r:.80}); do not use this checkpoint"
            )
    found = [index.parent / name for name in sorted(set(names.values()))]
    if missing := [shard.name for shard in found if not shard.is_file()]:
        raise UserError(
            f"{index} names files that are not there: {count_names('missing', missing)}; fetch them"
        )
    return found


def count_names(what: str, names: Sequence[str]) -> str:
    """Return how many names there are and the first three of them, for an error: "4 missing (a, b, c, ...)"."""
    listed = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    return f"{len(names)} {what}{listed}"


class GgufTensors(Mapping[str, np.ndarray]):
    """The tensors of a GGUF file by name. Each is dequantised to float32 when it is asked for."""

    def __init__(self, tensors: Mapping[str, gguf_file.Tensor], source: str):
        self._tensors, self._source = tensors, source

    def __getitem__(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        data = tensor.data.view(_GGUF_FLOATS.get(tensor.kind.name, np.uint8))
        try:
            with np.errstate(all="ignore"):  # scales may be infinite: `check_weights` raises then
                array = gguf.dequantize(data, tensor.kind).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise UserError(
                f"tensor {name!r} is quantised as {tensor.kind.name}, which the gguf library cannot "
                "dequantise; take another quantisation of this model"
            ) from error
        return check_weights(array.reshape(tensor.shape), name, self._source)

    def __contains__(self, name: object) -> bool:  # Mapping's own would dequantise the tensor
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_gguf(path: Path) -> tuple[dict[str, Any], GgufTensors]:
    """Return (metadata as plain Python values, tensors) of a GGUF file. Raises UserError if it is not one."""
    metadata, tensors = gguf_file.read(path)
    return metadata, GgufTensors(tensors, str(path))


def gguf_name(metadata: Mapping[str, Any]) -> str:
    """Return the model's name in a GGUF file's metadata, for error messages."""
    name = metadata.get("general.name")
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= 100 else "the GGUF file"


def check_weights(array: np.ndarray, name: str, source: str) -> np.ndarray:
    """Return the weights. Raises UserError if they are not finite or so large that the model's sums might not be."""
    if array.size:
        low, high = float(array.min()), float(array.max())
        if not -_MAX_WEIGHT <= low <= high <= _MAX_WEIGHT:  # false for NaN
            raise UserError(
                f"the weights {name!r} in {source} are not all finite numbers up to {_MAX_WEIGHT}; the file is "
                "damaged, fetch it again"
            )
    return array
