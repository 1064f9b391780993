"""Weights in: safetensors and GGUF files -> NNX modules, by tables of names, strictly.

A table is a sequence of `Rule`s, each from a tensor's name in the file to a parameter's path in the module;
`{i}` stands for a layer number on both sides. A tensor that no rule knows, a parameter that no tensor fills and
a tensor of another shape are errors: a model that loads is the model that was saved.

Reading and dequantising a GGUF costs seconds, so what was read once is kept as one .npy file a parameter
(float32, memory-mapped when it is read again) in the cache folder, under the names and SHA-256 of the source files and
the code that converts them:

    converted/<sources>/<code>/   files that another code made alike are hard links to that one's

A folder of which a file is missing or has changed is made again (rag.runtime.cache).
"""

import filecmp
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rag import native
from rag.models import gguf_file
from rag.models.tokenizer.tokenizer import Tokenizer, read_json
from rag.ops.linear import quantize
from rag.runtime import cache, cache_key, file_hash, files
from rag.runtime.import_closure import code_version
from rag.runtime.records import reason, stays_inside
from rag.types import UserError

M = TypeVar("M", bound=nnx.Module)

_LARGEST = 65504  # float16's largest number: with such weights no sum overflows float32
_PLAIN = {"F16": np.float16, "F32": np.float32}  # of the others the gguf library takes the bytes
_SAFETENSORS_TYPES = (
    "F32",
    "F16",
    "BF16",
    "F64",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
)  # whole numbers: buffers

_ALIGNED = 64  # bytes, to which JAX takes an array of numpy's without a copy


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a weight table."""

    name: str  # in the file, with {i} for the layer
    path: str | None  # in the module, dotted, with {i}; None: known, and not used
    transform: Callable[[np.ndarray], np.ndarray] | None = None


def fill(module: M, tensors: Mapping[str, np.ndarray], table: Sequence[Rule], source: str) -> M:
    """The abstract `module` (from `nnx.eval_shape`) with every parameter taken from `tensors`.

    `source` names the checkpoint in errors. Raises UserError for unknown, missing and wrong-shape tensors.
    """
    found: dict[str, Any] = {}
    unknown = []
    for name in tensors:
        rule, layer = _match(table, name)
        if rule is None:
            unknown.append(name)
        elif rule.path is not None:
            array = tensors[name]
            found[rule.path.replace("{i}", layer)] = rule.transform(array) if rule.transform else array
    return _filled(module, found, unknown, source)


def _filled(module: M, found: Mapping[str, np.ndarray], unknown: Sequence[str], source: str) -> M:
    """`fill` with the parameters by their dotted paths; `unknown` are the file's names that no rule knows."""
    graph, state = nnx.split(module)
    flat = {_dotted(path): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    missing = sorted(flat.keys() - found.keys())
    surplus = sorted(unknown) + sorted(found.keys() - flat.keys())
    if missing or surplus:
        raise UserError(
            f"{source} does not hold this architecture: {_some('missing', missing)}; {_some('unknown', surplus)}; "
            "check that the checkpoint is complete and of a supported model family"
        )
    for name, (_, leaf) in flat.items():
        if found[name].shape != leaf.get_value().shape:
            raise UserError(
                f"{source} holds {name} with shape {tuple(found[name].shape)} where its own configuration says "
                f"{tuple(leaf.get_value().shape)}; the checkpoint is damaged or of another model"
            )
    values = [(path, leaf.replace(found[name])) for name, (path, leaf) in flat.items()]
    return nnx.merge(graph, nnx.from_flat_state(values))


def copies(layer: M, count: int) -> nnx.List:
    """So many abstract layers like this one: to trace one and copy its shapes is much sooner done than to trace all."""
    return nnx.List([jax.tree.map(lambda shape: shape, layer) for _ in range(count)])


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def to_device(module: M, dtype: np.dtype | None = None) -> M:
    """The module with its parameters on the default device, in `dtype` or (None) in their own.

    On CPU a memory-mapped file of that dtype is not copied.
    """

    def placed(a: np.ndarray) -> jax.Array:
        return jax.device_put(a if dtype in (None, a.dtype) else np.asarray(a, dtype), may_alias=True)

    return jax.tree.map(placed, module)


def in_huge_pages(module: M) -> M:
    """The module with its parameters copied side by side into pages of 2 MiB, where the system has such (Linux).

    What is read from memory for every token is read faster so: fetching ahead ends at the end of a page.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return module
    arrays, structure = jax.tree.flatten(module)
    ends = np.cumsum([-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays])
    memory = mmap.mmap(-1, int(ends[-1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: the pages are small ones then
        memory.madvise(mmap.MADV_HUGEPAGE)
    copies = []
    for array, start in zip(arrays, [0, *ends[:-1]], strict=True):
        copy = np.frombuffer(memory, array.dtype, array.size, int(start)).reshape(array.shape)
        copy[...] = array
        copies.append(copy)
    return jax.tree.unflatten(structure, copies)


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["structure"])
@dataclass(frozen=True)
class Packed(Generic[M]):
    """A module as a tuple of its arrays, which jit takes in a tenth of the time that it takes a module in."""

    arrays: tuple[jax.Array, ...]
    structure: Any  # jax's PyTreeDef

    @property
    def module(self) -> M:
        return jax.tree.unflatten(self.structure, self.arrays)


def pack(module: M) -> Packed[M]:
    arrays, structure = jax.tree.flatten(module)
    return Packed(tuple(arrays), structure)


def quantized(module: M) -> M:
    """The module with the weight of every layer that has a place for a scale made int8 (rag.ops.linear.quantize)."""
    for _, layer in nnx.iter_modules(module):
        if hasattr(layer, "scale"):
            values, scale = quantize(jnp.asarray(layer.weight[...]))
            layer.weight, layer.scale = nnx.Param(values), nnx.Param(scale)
    return module


def multiply_natively(module: nnx.Module) -> None:
    """Let rag.native multiply by the module's int8 weights, where that is the faster way."""
    for _, layer in nnx.iter_modules(module):
        if getattr(layer, "scale", None) is not None and hasattr(layer, "native"):
            layer.native = native.has_tiles(layer.weight.shape[1])


def _match(table: Sequence[Rule], name: str) -> tuple[Rule | None, str]:
    for rule in table:
        pattern = re.escape(rule.name).replace(r"\{i\}", r"(\d+)")
        if found := re.fullmatch(pattern, name):
            return rule, found.group(1) if found.groups() else ""
    return None, ""


def _some(what: str, names: Sequence[str]) -> str:
    listed = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    return f"{len(names)} {what}{listed}"


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file, or of a folder with model.safetensors or a sharded model's index."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, np.ndarray] = {}
    for shard in shards(path):
        try:
            with safe_open(shard, framework="flax") as file:  # flax: numpy alone has no bfloat16
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    tensors[name] = _usable(_tensor_of(file, name, shard), name, str(shard))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read the weights in {shard} ({reason(error)}); fetch the file again"
            ) from error
    return tensors


def _tensor_of(file: Any, name: str, shard: Path) -> np.ndarray:
    """One tensor of a safetensors file. Raises UserError for numbers that a weight cannot be read from as it is."""
    if (kind := file.get_slice(name).get_dtype()) not in _SAFETENSORS_TYPES:
        raise UserError(
            f"the weights {name!r} in {shard} are of type {kind}; only {', '.join(_SAFETENSORS_TYPES[:4])} are known, "
            "take another version of this checkpoint"
        )
    return np.asarray(file.get_tensor(name))


def shards(path: Path) -> Sequence[Path]:
    """The weight files of a safetensors checkpoint, a file or a Hugging Face folder; UserError if it has none."""
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
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} holds no weight_map from tensors to files; fetch the file again")
    for name in places.values():
        if not stays_inside(name):
            raise UserError(
                f"{index} names a file outside of its folder ({name!r:.80}); do not use this checkpoint"
            )
    found = [index.parent / name for name in sorted(set(places.values()))]
    if absent := [shard.name for shard in found if not shard.is_file()]:
        raise UserError(f"{index} names files that are not there: {_some('missing', absent)}; fetch them")
    return found


def check_layers(names: Iterable[str], pattern: str, count: int, source: str) -> None:
    """Compare the layers that a configuration counts with those that tensors are there of.

    `pattern` is what the names of a layer's tensors begin with, {i} for its number. Raises UserError.
    """
    start = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d{1,9})"))
    found = {int(match[1]) for match in map(start.match, names) if match}
    if len(found) != count or max(found) != count - 1:
        raise UserError(
            f"{source} counts {count:,} layers in its configuration, and holds tensors of {len(found):,}; the "
            "checkpoint is damaged or incomplete, fetch it again"
        )


def check_vocabulary(tokenizer: Tokenizer, rows: int, source: str) -> None:
    """Compare the tokens with the rows that a model has for them. Raises UserError where a token has no row."""
    if tokenizer.largest_id >= rows:
        raise UserError(
            f"{source} has {rows:,} rows in its embedding, and a tokenizer with an id {tokenizer.largest_id:,}; its "
            "files are of different models, fetch it again"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder; UserError if it is missing or damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json; name a complete Hugging Face checkpoint folder")
    return read_json(path)


class GgufTensors(Mapping[str, np.ndarray]):
    """The tensors of a GGUF file by name, dequantised to float32 one at a time, as they are asked for."""

    def __init__(self, tensors: Mapping[str, gguf_file.Tensor], source: str):
        self._tensors, self._source = tensors, source

    def __getitem__(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        data = tensor.data.view(_PLAIN.get(tensor.kind.name, np.uint8))
        try:
            with np.errstate(all="ignore"):  # scales may be infinite: `_usable` tells
                array = gguf.dequantize(data, tensor.kind).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise UserError(
                f"tensor {name!r} is quantised as {tensor.kind.name}, which the gguf library cannot "
                "dequantise; take another quantisation of this model"
            ) from error
        return _usable(array.reshape(tensor.shape), name, self._source)

    def __contains__(self, name: object) -> bool:  # Mapping's own would dequantise the tensor
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_gguf(path: Path) -> tuple[dict[str, Any], GgufTensors]:
    """(metadata as plain Python values, tensors) of a GGUF file. Raises UserError for a file that is none."""
    metadata, tensors = gguf_file.read(path)
    return metadata, GgufTensors(tensors, str(path))


def gguf_name(metadata: Mapping[str, Any]) -> str:
    """What a GGUF file calls its model, for errors."""
    name = metadata.get("general.name")
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= 100 else "the GGUF file"


def _usable(array: np.ndarray, name: str, source: str) -> np.ndarray:
    """The weights, if all are numbers with which the models' sums stay finite. Raises UserError."""
    if array.size:
        low, high = float(array.min()), float(array.max())
        if not -_LARGEST <= low <= high <= _LARGEST:  # NaN is no more and no less
            raise UserError(
                f"the weights {name!r} in {source} are not all finite numbers up to {_LARGEST}; the file is damaged, "
                "fetch it again"
            )
    return array


def is_gguf(path: Path) -> bool:
    """Whether the file begins with GGUF's magic number (Ollama's blobs have no file name ending)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def keep(kind: str, sources: Sequence[Path], convert: Callable[[Path], None]) -> Path:
    """The cache's folder for what `convert(folder)` makes of the source files, made once for the same bytes and code.

    `kind` names what they are read as, since one file may be read as several. UserError if the cache cannot be
    written, and where a source file has changed under its time stamp.
    """
    known = contents(sources)
    place = files.cache_root() / "converted" / cache_key.content_key(kind, known)
    folder = place / code_version(convert)

    def fill(unfinished: Path) -> None:
        convert(unfinished)
        _link_equal_files(unfinished, place)

    def make() -> None:
        _require_unchanged(sources, known)
        cache.write_folder(folder, fill)

    return cache.get_or_make(folder, make, cache.check_folder, lock=place)


def contents(sources: Sequence[Path], *, fresh: bool = False) -> list[tuple[str, str]]:
    """(name, SHA-256) of a checkpoint's files: a file that is renamed is read as another, or no longer.

    With `fresh` no remembered digest counts.
    """
    digests = [file_hash.file_sha256(path, fresh=fresh) for path in sources]
    if len(sources) == 1:  # a GGUF file, whatever it is called
        return [("", digests[0])]
    folder = sources[0].parent
    return [(os.path.relpath(path, folder), digest) for path, digest in zip(sources, digests, strict=True)]


def _require_unchanged(sources: Sequence[Path], known: list[tuple[str, str]]) -> None:
    """UserError for a file that is not what its remembered digest says: a disk decays without a new time stamp."""
    now = contents(sources, fresh=True)
    if changed := [path for path, old, new in zip(sources, known, now, strict=True) if old != new]:
        raise UserError(f"{changed[0]} has changed although nobody wrote to it: fetch it again.")


def _link_equal_files(folder: Path, place: Path) -> None:
    """Make links of the files in `folder` to equal ones that earlier code left in `place`: weights are large."""
    earlier = [path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for other in sorted(earlier, key=lambda path: path.stat().st_mtime, reverse=True)[:1]:
        for file in folder.iterdir():
            if (other / file.name).is_file() and filecmp.cmp(other / file.name, file, shallow=False):
                with suppress(OSError):  # a file system without links
                    link = folder / f".{file.name}"
                    os.link(other / file.name, link)
                    os.replace(link, file)


def save_module(module: nnx.Module, folder: Path) -> None:
    """Write every parameter of `module` as `<dotted path>.npy`."""
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        np.save(folder / f"{_dotted(path)}.npy", leaf.get_value())


def load_module(module: M, folder: Path) -> M:
    """The abstract `module` with its parameters memory-mapped from `save_module`'s files."""
    paths = [_dotted(path) for path, _ in nnx.to_flat_state(nnx.state(module))]
    tensors = {path: np.load(folder / f"{path}.npy", mmap_mode="r") for path in paths}
    return _filled(module, tensors, (), str(folder))
