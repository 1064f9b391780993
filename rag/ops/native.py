"""A decoder layer for one token as one C++ call (decoder_layer.cc), where this machine has a compiler.

An option that nothing depends on: without it, or where it does not apply, XLA runs the same maths. What it saves is
not arithmetic but the forty small steps of a layer, between which XLA's threads go to sleep. The library is built
at first use, in seconds, and kept in the cache folder under its source, the compiler and the processor.

Letters: M width, F ffn, H query heads, K kv heads, D head dim, S slots of the cache.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache as once
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int8, Int32

from rag import cache
from rag.measure import cores, cpu_flags

_SOURCE = Path(__file__).with_name("decoder_layer.cc")
_TARGET = "rag_decoder_layer"
# Not -ffast-math: a library linked with it makes the whole process flush small numbers to zero.
_FLAGS = (
    *(
        "-std=c++17",
        "-O3",
        "-march=native",
        "-mprefer-vector-width=512",
        "-fPIC",
        "-shared",
        "-pthread",
        "-w",
    ),
    *(
        "-fassociative-math",
        "-freciprocal-math",
        "-fno-signed-zeros",
        "-fno-trapping-math",
        "-fno-math-errno",
    ),
)

Weight = tuple[Int8[Array, "_ _"], Float32[Array, "_"]]  # [N, M] values, [N] scale: rag.ops.linear.quantize


@once
def available() -> bool:
    """Whether the layer can be called in this process: on CPU, with a C++ compiler or a library built before."""
    if jax.default_backend() != "cpu":
        return False
    library = _library()
    if library is None:
        return False
    handler = ctypes.CDLL(str(library)).RagDecoderLayer
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    return True


def _library() -> Path | None:
    """The built library; None where there is no compiler, or it cannot build this."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        return None
    key = cache.content_key(
        _SOURCE.read_text(), compiler, _FLAGS, list(cpu_flags()), metadata.version("jaxlib")
    )
    path = cache.cache_root() / "native" / f"{key}.so"
    if not path.exists():
        with cache.writing(), cache.locked(path):
            if not path.exists() and not _build(compiler, path):
                return None
    return path


def _build(compiler: str, path: Path) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "library.so"
        command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(built)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        with cache.atomic_file(path) as file:
            file.write(built.read_bytes())
    return True


def decoder_layer(
    x: Float32[Array, "1 1 M"],
    position: Int32[Array, "1"],
    angles: Float32[Array, "1 1 R"],
    norms: tuple[Float32[Array, "M"], Float32[Array, "M"]],
    projections: Sequence[Weight],
    cached: tuple[Float32[Array, "1 K S D"], Float32[Array, "1 K S D"]],
    eps: float,
) -> tuple[Float32[Array, "1 1 M"], tuple[Float32[Array, "1 K S D"], Float32[Array, "1 K S D"]]]:
    """One token at `position` through a layer: the residual stream behind it, and the cache with it written.

    `norms` are RMSNorm's weights before attention and before the MLP, `projections` q, k, v, o, gate, up and down,
    `angles` the token's R = D/2 rotations. In place where the cache was donated. Ask `available` first.
    """
    results = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *cached))
    q_to_o = [array for weight in projections[:4] for array in weight]
    mlp = [array for weight in projections[4:] for array in weight]
    angles = angles[0, 0]
    arguments = [x, position, jnp.cos(angles), jnp.sin(angles), norms[0], *q_to_o, norms[1], *mlp, *cached]
    aliases = {len(arguments) - 2: 1, len(arguments) - 1: 2}
    call = jax.ffi.ffi_call(_TARGET, results, input_output_aliases=aliases)
    y, keys, values = call(*arguments, threads=np.int64(cores()), eps=np.float32(eps))
    return y, (keys, values)
