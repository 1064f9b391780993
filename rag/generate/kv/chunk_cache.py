"""Precompute the KV caches of passages, and assemble those of a prompt.

A passage is prefilled after the prefix alone (the prompt's text before its first passage, without earlier turns), as if
it were the first one: the first tokens of a text draw much attention whatever they are (StreamingLLM, Xiao et al. 2023,
arXiv:2309.17453), and every passage that was prefilled without them would have an attention sink of its own. Keys are
stored before their rotation by RoPE; a key is rotated to the position that the passage has in a prompt.

Letters: B batch (passages prefilled together), L layers, K kv heads, T tokens, S cache slots, D head dim (half: D/2).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Float32, Int, Shaped

from rag.generate.decode_state import pad_prompts
from rag.generate.engine import Engine
from rag.generate.kv.chunk_store import ChunkKVStore, KVDtype
from rag.generate.kv.prompt_parts import Ids, PromptParts, split_prompt
from rag.generate.prefill_batches import batch_by_length
from rag.models.llama import model as llama
from rag.models.llama.model import KVCache, Llama, LlamaConfig, cache_dtype, forward, rotary_of
from rag.models.placement import Packed
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.ops.rope import rotate
from rag.runtime.cache.folder import cache_root, private_folder
from rag.runtime.cache.keys import content_key
from rag.runtime.code.import_closure import code_version
from rag.runtime.shapes import round_up_prompt
from rag.types import Message, UserError

_TOKENS_PER_BATCH = 1024  # padded, of passages that are prefilled together


@jax.jit
def prefill_passages(packed: Packed[Llama], tokens: Int[Array, "B T"]) -> Float16[Array, "B L 2 K T D"]:
    """Return the keys before their rotation, and the values, of right-padded rows."""
    _, cache = forward(packed.module, tokens, jnp.zeros(len(tokens), jnp.int32))
    back = _rotations(packed.module.config, tokens.shape[1]) * jnp.array([1, -1])[:, None, None, None]
    keys = [rotate(k.astype(jnp.float32), back) for k in cache.keys]
    pairs = [jnp.stack([k, v.astype(jnp.float32)], axis=1) for k, v in zip(keys, cache.values, strict=True)]
    return jnp.stack(pairs, axis=1).astype(jnp.float16)


@partial(jax.jit, static_argnames="dtype")
def rotate_keys(
    stored: Shaped[Array, "2 K S D"],
    scales: Float32[Array, "2 K S 1"] | None,
    rotary: Float[Array, "2 1 S half"],
    dtype: np.dtype,
) -> tuple[Float[Array, "1 K S D"], Float[Array, "1 K S D"]]:
    """Return a layer's cache from stored keys and values: each key is rotated to its slot's position.

    It runs on one layer, because a program of all layers takes a second to compile for each number of slots.

    Args:
        stored: keys and values, float16 or int8.
        scales: those of int8.
        rotary: the rotations of the positions.
        dtype: of the cache.
    """
    keys_values = stored.astype(jnp.float32)
    if scales is not None:
        keys_values = keys_values * scales
    return rotate(keys_values[:1], rotary).astype(dtype), keys_values[1:].astype(dtype)


@partial(jax.jit, static_argnames=("c", "size"))
def _rotations(c: LlamaConfig, size: int) -> Float[Array, "2 1 T half"]:
    return rotary_of(c, jnp.arange(size)[None])


@dataclass(frozen=True, slots=True)
class FillReport:
    """What `ChunkKVCache.fill` computed and found."""

    computed: int  # texts; the others were cached
    sizes: dict[Path, tuple[int, int]]  # the file of each different text, prefixes too: tokens and bytes


class ChunkKVCache:
    """Computes the KV caches of passages once, stores them on disk, and assembles the cache of a prompt from them."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, fingerprint: str, path: str | None, dtype: KVDtype
    ):
        """Open or make the folder.

        Args:
            engine: runs the model.
            tokenizer: the model's.
            fingerprint: 64 hex digits of the model.
            path: the folder that chunk_kv is in; None: the cache folder.
            dtype: of the files.
        """
        self._engine, self._tokenizer, self._dtype = engine, tokenizer, dtype
        c = engine.model.config
        parent = Path(path).expanduser() if path else cache_root()
        folder = private_folder(parent / "chunk_kv", "generator.kv_path" if path else "RAG_CACHE")
        shape = (c.num_hidden_layers, c.num_key_value_heads, c.head_dim)
        self.store = ChunkKVStore(folder, content_key(fingerprint, code_version(type(self))), shape, dtype)

    def fill(
        self, prompts: Iterable[Sequence[Message]], progress: Callable[[int], None] = lambda done: None
    ) -> FillReport:
        """Compute and store what is not cached yet of these prompts; `progress` receives the number of texts done."""
        entries = self._entries(prompts)
        missing = [entry for entry in entries if self.store.load(*entry) is None]
        self._compute(missing, lambda done: progress(len(entries) - len(missing) + done))
        files = {self.store.path(*entry): len(entry[1]) for entry in entries}
        return FillReport(len(missing), {file: (tokens, _size(file)) for file, tokens in files.items()})

    def missing(self, prompts: Iterable[Sequence[Message]]) -> dict[Path, int]:
        """Return the files that are not there yet, and the tokens of each, without computing anything."""
        files = {self.store.path(*entry): len(entry[1]) for entry in self._entries(prompts)}
        return {file: tokens for file, tokens in files.items() if not file.exists()}

    def _entries(self, prompts: Iterable[Sequence[Message]]) -> list[tuple[Ids, Ids]]:
        """Return what these prompts take from the store, each entry once."""
        parts = (split_prompt(self._tokenizer, messages) for messages in prompts)
        return list(dict.fromkeys(entry for some in parts for entry in some.entries()))

    def assemble(self, parts: PromptParts, capacity: int) -> KVCache:
        """Return a cache of `capacity` slots with the prompt's prefix and passages at their positions.

        What is not in the store is computed and stored first.
        """
        entries = parts.entries()
        stored = [self.store.load(*entry) for entry in entries]
        self._compute([entry for entry, kv in zip(entries, stored, strict=True) if kv is None])
        found = [
            self._load_again(entry) if kv is None else kv for entry, kv in zip(entries, stored, strict=True)
        ]
        return self._cache_of(parts.spans(), found, capacity)

    def _load_again(self, entry: tuple[Ids, Ids]) -> np.ndarray:
        """Return what was just computed and written."""
        if (found := self.store.load(*entry)) is None:
            raise UserError(
                f"A passage that was just written to {self.store.folder} is no longer there: check the disk, and raise "
                "RAG_CACHE_GB, the size of the cache."
            )
        return found

    def _cache_of(
        self, spans: Sequence[tuple[int, int]], stored: Sequence[np.ndarray], capacity: int
    ) -> KVCache:
        """Copy stored keys and values side by side into one array, so that one program rotates all lengths."""
        c, int8 = self._engine.model.config, self._dtype == "int8"
        shape = (c.num_hidden_layers, 2, c.num_key_value_heads, capacity, c.head_dim)
        # In int8 any value will do for unused slots: their scale is 0.
        stored_values = np.ones(shape, np.int8) if int8 else np.full(shape, llama.UNUSED_SLOT, np.float16)
        scales = np.full((*shape[:-1], 1), llama.UNUSED_SLOT, np.float32) if int8 else None
        for (start, end), kv in zip(spans, stored, strict=True):
            part = kv[:, :, :, : end - start]  # a prompt may begin with a part of the prefix alone
            if scales is None:
                stored_values[:, :, :, start:end] = part
            else:
                stored_values[:, :, :, start:end] = part["values"]
                scales[:, :, :, start:end, 0] = part["scale"]
        dtype, rotary = cache_dtype(self._engine.model), _rotations(c, capacity)
        layers = [
            rotate_keys(layer, None if scales is None else scales[i], rotary, dtype)
            for i, layer in enumerate(stored_values)
        ]
        keys, values = zip(*layers, strict=True)
        return KVCache(keys, values)

    def _compute(
        self, entries: Sequence[tuple[Ids, Ids]], progress: Callable[[int], None] = lambda done: None
    ) -> None:
        """Prefill texts, those of similar lengths together, and store their keys and values."""
        order = sorted(dict.fromkeys(entries), key=lambda entry: -len(entry[0]) - len(entry[1]))
        done = 0
        for some, size in batch_by_length([len(a) + len(b) for a, b in order], _TOKENS_PER_BATCH):
            members = order[some]
            rows = [[*prefix, *passage] for prefix, passage in members]
            rows += [rows[-1]] * (size - len(rows))
            made = np.asarray(
                prefill_passages(self._engine.packed, pad_prompts(rows, round_up_prompt(len(rows[0]))))
            )
            for (prefix, passage), kv in zip(members, made, strict=False):
                start = len(prefix)
                self.store.save(prefix, passage, kv[:, :, :, start : start + len(passage)])
            done += len(members)
            progress(done)


def _size(file: Path) -> int:
    """Return the bytes of a file; 0 where it was evicted meanwhile."""
    return file.stat().st_size if file.exists() else 0
