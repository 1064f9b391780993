"""Attention in float32, and a decoder with int8 weights, each as one C++ call (cpp/), where there is a compiler.

An option that nothing depends on: without it, or with RAG_NATIVE=0 in the environment, XLA runs the same maths. What it
saves are the ways of attention's scores to memory and back, the forty small steps of a decoder's layer, between which
XLA's threads go to sleep, the making or loading of the programs that hold them, and with AMX most of the time of the
products. The library is built at first use, in seconds, and kept in the cache folder under its sources, the compiler
and the processor.

Letters: B batch, T tokens of a row, M width, K kv heads, D head dim, S slots of the cache, R rotations, D/2, or rows of
a product, N outputs.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as once
from importlib import metadata
from itertools import chain
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Float32, Int, Int8, Int32

from rag.runtime import cache, cache_key, files
from rag.runtime.machine import cores, cpu_flags
from rag.types import UserError

_ENTRY = Path(__file__).with_name("cpp") / "calls.cc"
_WANTED = os.environ.get("RAG_NATIVE") != "0"
# What kept results depend on beside Python code, read by rag.runtime.import_closure.
RAG_SOURCES = ("cpp/*.h", "cpp/*.cc")
RAG_ENVIRONMENT = ("RAG_NATIVE",)
_TARGETS = {"rag_attention": "RagAttention", "rag_decoder": "RagDecoder", "rag_linear": "RagLinear"}
# Not -ffast-math: a library linked with it makes the whole process flush small numbers to zero.
_FLAGS = (
    *"-std=c++17 -O3 -march=native -mprefer-vector-width=512 -fPIC -shared -pthread -w".split(),
    *"-fassociative-math -freciprocal-math -fno-signed-zeros -fno-trapping-math -fno-math-errno".split(),
)

FEW = 8  # tokens that are read faster than by XLA even without AMX
_AT_ONCE = 256  # tokens of one call: more would not be read faster, and take memory
MOST_DIM = 256  # of a head
CACHE_DTYPE = np.float16  # of keys and values
_DAY_S = 86_400

Weight = tuple[Int8[Array, "_ _"], Float32[Array, "_"]]  # [N, M] values, [N] scale: rag.ops.linear.quantize


@once
def available() -> bool:
    """Whether it can be called in this process: on an x86 CPU with AVX2, with a C++ compiler, without RAG_NATIVE=0."""
    return _loaded() is not None


@once
def has_tiles(width: int = 64) -> bool:
    """Whether products of so many inputs go through AMX's matrix unit, whose strength is many tokens: there `linear`
    beats XLA."""
    return width % 64 == 0 and available() and _loaded().RagHasTiles()


def supports_prefill(tokens: int) -> bool:
    """Whether `decoder` reads so many tokens, B * T, faster than XLA does. Ask `available` first."""
    return has_tiles() or tokens <= FEW


def int8_digits(rows: int, width: int) -> bool:
    """Whether `linear` multiplies so many rows of so many inputs by digits, two int8 products, and not in float32."""
    return rows > 1 and has_tiles(width)


@once
def _loaded() -> ctypes.CDLL | None:
    if not _WANTED or jax.default_backend() != "cpu" or "avx2" not in cpu_flags():
        return None
    try:
        if (library := _library()) is None:
            return None
        loaded = ctypes.CDLL(str(library))
        loaded.RagHasTiles.restype = ctypes.c_bool
        functions = {target: getattr(loaded, symbol) for target, symbol in _TARGETS.items()}
    except (OSError, AttributeError, UserError) as error:  # not loaded, no such symbol, not written
        files.notice(f"The native library cannot be used, so XLA does its work: {error}")
        return None
    for target, function in functions.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    return loaded


def _library() -> Path | None:
    """The built library; None where there is no compiler, or it cannot build this."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        return None
    key = cache_key.content_key(
        [
            file.read_text(encoding="utf-8")
            for pattern in RAG_SOURCES
            for file in sorted(Path(__file__).parent.glob(pattern))
        ],
        _version(compiler),
        _FLAGS,
        list(cpu_flags()),
        metadata.version("jaxlib"),
        "sealed",
    )
    path = files.private_folder(files.cache_root() / "native") / f"{key}.so"
    log = path.with_suffix(".log")
    if not path.exists() and _is_fresh(log):
        return None

    def make() -> None:
        if not _is_fresh(log):
            _build(compiler, path, log)

    with suppress(FileNotFoundError):
        return files.private_file(cache.get_or_make(path, make, cache.verified_path))
    return None


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _is_fresh(log: Path) -> bool:
    """Whether a compiler failed less than a day ago: it is asked again once it may be mended, not at every start."""
    return log.exists() and time.time() - log.stat().st_mtime < _DAY_S


def _build(compiler: str, path: Path, log: Path) -> None:
    """The library, or what the compiler had to say."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "library.so"
        includes = f"-I{jax.ffi.include_dir()}"
        command = [compiler, *_FLAGS, includes, str(_ENTRY), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == 0:
            cache.write(path, built.read_bytes())
            return
    with files.write_errors():
        files.discard(path)  # a damaged one
        with files.atomic_file(log) as file:
            file.write(done.stderr)
    files.notice(f"{compiler} cannot build {_ENTRY.name}, so XLA does its work: {log}")


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of a layer: RMSNorm's before attention and before the MLP; q, k, v, o, gate, up and down."""

    norms: tuple[Float32[Array, "M"], Float32[Array, "M"]]
    projections: Sequence[Weight]

    @property
    def arrays(self) -> list[Array]:
        q_to_o, mlp = self.projections[:4], self.projections[4:]
        return [self.norms[0], *chain(*q_to_o), self.norms[1], *chain(*mlp)]


def decoder(
    x: Float32[Array, "B T M"],
    positions: Int32[Array, "B T"],
    rotations: Float32[Array, "2 B T R"],
    layers: Sequence[DecoderLayer],
    keys: Sequence[Float16[Array, "B K S D"]],
    values: Sequence[Float16[Array, "B K S D"]],
    eps: float,
) -> tuple[Float32[Array, "B T M"], tuple[Array, ...], tuple[Array, ...]]:
    """The residual stream behind all layers, and keys and values with these tokens' written to their positions.

    A token sees the slots up to its position, those of later tokens of its row included if they stand there. So
    positions ascend, unless there are no more than _AT_ONCE tokens. `rotations` are the tokens' (rag.ops.rope). In
    place where the cache was donated. Ask `available` first. A position outside of [0, S) is an error of the call.
    """
    step, read = max(1, _AT_ONCE // len(x)), []
    caches = [array for pair in zip(keys, values, strict=True) for array in pair]
    for at in range(0, x.shape[1], step):
        some = slice(at, at + step)
        y, caches = _decoder(x[:, some], positions[:, some], rotations[:, :, some], layers, caches, eps)
        read.append(y)
    return jnp.concatenate(read, axis=1), tuple(caches[::2]), tuple(caches[1::2])


def _decoder(x, positions, rotations, layers: Sequence[DecoderLayer], caches: list[Array], eps: float):
    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, *caches)]
    arguments, aliases = [x, positions, *rotations], {}
    for i, layer in enumerate(layers):
        arguments += [*layer.arrays, *caches[2 * i : 2 * i + 2]]
        aliases |= {len(arguments) - 2: 2 * i + 1, len(arguments) - 1: 2 * i + 2}
    call = jax.ffi.ffi_call("rag_decoder", results, input_output_aliases=aliases)
    y, *written = call(*arguments, threads=np.int64(cores()), eps=np.float32(eps))
    return y, written


def attention(
    q: Float32[Array, "B H T D"],
    k: Float32[Array, "B K S D"],
    v: Float32[Array, "B K S D"],
    first: Int[Array, "B T"],
    past: Int[Array, "B T"],
    segments: tuple[Int[Array, "B T"] | None, Int[Array, "B S"] | None],
    scale: float,
) -> tuple[Float32[Array, "B H T D"], Float32[Array, "B H T"]]:
    """Softmax attention of each query to the keys [first, past) of S, and the log-sum-exp of its scaled scores.

    With segments only to keys of its own id, and with a negative id to none. Zeros and -inf where nothing is seen.
    Blockwise with online softmax, in memory that does not grow with T or S beside the results. D is at most MOST_DIM.
    Ask `available` first.
    """
    seen = [first, past, *(jnp.zeros((0, 0)) if some is None else some for some in segments)]
    results = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], q.dtype))
    call = jax.ffi.ffi_call("rag_attention", results, vmap_method="sequential")
    seen = (array.astype(jnp.int32) for array in seen)
    return call(q, k, v, *seen, threads=np.int64(cores()), scale=np.float32(scale))


def linear(
    x: Float[Array, "R M"], values: Int8[Array, "N M"], scale: Float32[Array, "N"]
) -> Float32[Array, "R N"]:
    """`x @ (values * scale[:, None]).T`; what a row's neighbours hold changes nothing. Ask `available` first.

    With AMX two rows or more are multiplied by digits where its tiles divide the weight, else float32 by the weight.
    """
    result = jax.ShapeDtypeStruct((len(x), len(values)), jnp.float32)
    call = jax.ffi.ffi_call("rag_linear", result)
    return call(x.astype(jnp.float32), values, scale, threads=np.int64(cores()))
