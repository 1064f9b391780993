"""Merge in rag/native/cpp/flash.h, called on its own: the softmax states of several threads become one output."""

import ctypes
import shutil
import subprocess

import jax
import numpy as np
import pytest

from rag import native
from rag.native import build

CALL = """
#include "flash.h"
extern "C" void CallMerge(const rag::SoftmaxState* states, int64_t count, int64_t dim, float* out) {
  rag::Merge(states, count, dim, out);
}
"""
DIM, LOWEST = 40, -1e30  # the running maximum of a state that saw no slot

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler, or no CPU backend")


@pytest.fixture(scope="module")
def merge(tmp_path_factory):
    """Return a function of running maxima [n], denominators [n] and accumulators [n, DIM] that returns the output."""
    folder = tmp_path_factory.mktemp("merge")
    (folder / "merge.cc").write_text(CALL)
    compiler = shutil.which("g++") or shutil.which("clang++")
    includes = [f"-I{build._ENTRY.parent}", f"-I{jax.ffi.include_dir()}"]
    command = [compiler, *build._FLAGS, *includes, folder / "merge.cc", "-o", folder / "merge.so"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "merge.so"))

    def merge(running_max, denominators, accumulators):
        states = np.zeros((len(running_max), 2 + native.MOST_DIM), np.float32)
        states[:, 0], states[:, 1], states[:, 2 : 2 + DIM] = running_max, denominators, accumulators
        out = np.full(DIM, np.nan, np.float32)
        count, dim = ctypes.c_int64(len(states)), ctypes.c_int64(DIM)
        library.CallMerge(
            states.ctypes.data_as(ctypes.c_void_p), count, dim, out.ctypes.data_as(ctypes.c_void_p)
        )
        return out

    return merge


@pytest.mark.parametrize("empty", [[], [0], [2, 3]])
def test_states_are_merged_as_one_softmax(merge, empty):
    rng = np.random.default_rng(len(empty))
    scores, values = 5 * rng.standard_normal((4, 9)), rng.standard_normal((4, 9, DIM))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    states = scores.max(axis=1), weights.sum(axis=1), np.einsum("ns,nsd->nd", weights, values)
    for state, unseen in zip(states, (LOWEST, 0, 0), strict=True):
        state[empty] = unseen
    seen = [i for i in range(4) if i not in empty]
    softmax = np.exp(scores[seen]) / np.exp(scores[seen]).sum()
    np.testing.assert_allclose(merge(*states), np.einsum("ns,nsd->d", softmax, values[seen]), atol=1e-5)


def test_a_query_that_saw_no_slot_gets_zeros(merge):
    np.testing.assert_array_equal(merge([LOWEST] * 3, np.zeros(3), np.zeros((3, DIM))), 0)
