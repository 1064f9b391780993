"""Passages are read once: their keys and values are kept on disk, and a prompt that shows them reads only the rest.

A passage is read behind the prompt's own beginning alone (the system text and what the template puts first), as if it
were the first one: the first tokens of a text draw much attention whatever they are (StreamingLLM, Xiao et al. 2023,
arXiv:2309.17453), and every passage that was read without them would bring such a sink of its own. What is kept are
the keys before the rotation by their positions, and the values; a key is rotated to wherever the passage stands in a
prompt. The first passage is exact. A later one does not know those before it, unless its first tokens (EPIC, Hu et al.
2024, arXiv:2410.15332) or those that differ most (CacheBlend, rag.generate.kv.blend) are read anew.

    chunk_kv/<key>.npy   [L, 2, K, T, D] float16: keys, values; or int8 with a float32 scale for each vector

The key is made of the model and its code, the ids of the beginning and those of the passage. Files appear whole or
not at all; one that has changed since is computed anew.

Letters: L layers, K kv heads, T tokens of a passage, C slots of the cache, D head dim, B passages read together.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, Float32, Int, Shaped

from rag.generate.engine import DecodeState, Engine, batch_by_length, pad_prompts
from rag.generate.kv.blend import LAYERS, blend
from rag.generate.scoring import log_probs_after_cache, next_log_probs_after_cache
from rag.models.checkpoint import Packed
from rag.models.llama import model as llama
from rag.models.llama.model import KVCache, Llama, LlamaConfig, cache_dtype, forward, rotary_of
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.ops.rope import rotate
from rag.ops.sampling import Sampling
from rag.runtime import cache as disk_cache
from rag.runtime.cache_key import content_key
from rag.runtime.checksums import Damaged
from rag.runtime.files import cache_root, private_folder
from rag.runtime.import_closure import code_version
from rag.runtime.options import Filled, Share, Whole, check_fields
from rag.runtime.shapes import round_up_prompt, round_up_suffix
from rag.types import Message, UserError

KVDtype = Literal["float16", "int8"]

Ids = tuple[int, ...]

_TOKENS_TOGETHER = 1024  # padded, of passages read in one batch


@dataclass(frozen=True, slots=True)
class ChunkKVOptions:
    """How passages are kept, and how much of them is read anew. Raises UserError for what cannot be."""

    path: Filled | None = None  # of the folder that chunk_kv is in; None: the cache's
    dtype: KVDtype = "float16"  # of the files, or int8: half the bytes
    recompute: Whole = 0  # first tokens of each passage that are read anew
    blend_share: Share = 0.0  # of the passages' tokens, those that are read anew because they differ most
    behind_prefix: bool = (
        True  # False: passages are read without the prompt's beginning, to show what that costs
    )

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, slots=True)
class PromptParts:
    """A prompt, and what of it may be kept."""

    ids: list[int]
    beginning: Ids  # what passages are read behind; the prompt begins with `shared` tokens of it
    shared: int
    passages: tuple[tuple[int, Ids], ...]  # where each begins, and its ids


def split_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> PromptParts:
    """The prompt of a conversation in pieces, as `Tokenizer.chat_pieces` cuts it.

    The beginning is that of the conversation without its earlier turns, so that they do not change the passages.
    """
    pieces = tokenizer.chat_pieces(messages)
    short = _without_turns(messages)
    beginning = (pieces if len(short) == len(messages) else tokenizer.chat_pieces(short))[0]
    ids: list[int] = []
    passages = []
    for some, reusable in pieces:
        if reusable:
            passages.append((len(ids), tuple(some)))
        ids += some
    kept = () if beginning[1] else tuple(beginning[0])
    return PromptParts(ids, kept, min(_shared_prefix(kept, ids), len(ids) - 1), tuple(passages))


def _without_turns(messages: Sequence[Message]) -> list[Message]:
    """The template's own messages at the beginning, and the first that holds passages."""
    own = next((i for i, m in enumerate(messages) if m.fixed < len(m.content)), len(messages))
    shown = next((i for i, m in enumerate(messages) if m.reusable), own)
    return [*messages[: min(own, shown)], *messages[shown : shown + 1]]


def _shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@jax.jit
def prefill_passages(packed: Packed[Llama], tokens: Int[Array, "B T"]) -> Float16[Array, "B L 2 K T D"]:
    """Keys before their rotation, and values, of right-padded rows."""
    _, cache = forward(packed.module, tokens, jnp.zeros(len(tokens), jnp.int32))
    back = _rotations(packed.module.config, tokens.shape[1]) * jnp.array([1, -1])[:, None, None, None]
    keys = [rotate(k.astype(jnp.float32), back) for k in cache.keys]
    pairs = [jnp.stack([k, v.astype(jnp.float32)], axis=1) for k, v in zip(keys, cache.values, strict=True)]
    return jnp.stack(pairs, axis=1).astype(jnp.float16)


@partial(jax.jit, static_argnames="dtype")
def rotate_keys(
    values: Shaped[Array, "2 K C D"],
    scales: Float32[Array, "2 K C 1"] | None,
    rotary: Float[Array, "2 1 C R"],
    dtype: np.dtype,
) -> tuple[Float[Array, "1 K C D"], Float[Array, "1 K C D"]]:
    """A layer's cache of what was kept, each key turned to its slot by the `rotary`; `scales` are those of int8 values.

    Of one layer, because a program of all takes a second to compile for each number of slots.
    """
    vectors = values.astype(jnp.float32)
    if scales is not None:
        vectors = vectors * scales
    return rotate(vectors[:1], rotary).astype(dtype), vectors[1:].astype(dtype)


@partial(jax.jit, static_argnames=("c", "size"))
def _rotations(c: LlamaConfig, size: int) -> Float[Array, "2 1 T R"]:
    return rotary_of(c, jnp.arange(size)[None])


class ChunkKVStore:
    """The files of one model's passages."""

    def __init__(self, folder: Path, model: str, shape: tuple[int, int, int], dtype: str):
        """`model` is what identifies it and the code that runs it, `shape` its layers, kv heads and head dim."""
        self.folder, self._model, self._shape, self._dtype = folder, model, shape, dtype

    @property
    def dtype(self) -> np.dtype:
        """Of a file's items: a number, or a vector of int8 with its scale."""
        if self._dtype == "float16":
            return np.dtype(np.float16)
        return np.dtype([("scale", np.float32), ("values", np.int8, (self._shape[2],))])

    @property
    def token_bytes(self) -> int:
        """What a token takes in a file."""
        layers, heads, dim = self._shape
        return layers * 2 * heads * self.dtype.itemsize * (dim if self._dtype == "float16" else 1)

    def path(self, beginning: Ids, passage: Ids) -> Path:
        """Where a passage that is read behind this beginning is kept."""
        return self.folder / f"{content_key(self._model, self._dtype, beginning, passage)}.npy"

    def load(self, beginning: Ids, passage: Ids) -> Shaped[np.ndarray, "L 2 K T *D"] | None:
        """What is kept, memory-mapped; None where nothing is, and, with a notice, where it is damaged."""
        return disk_cache.get(self.path(beginning, passage), partial(self._opened, tokens=len(passage)))

    def _opened(self, path: Path, tokens: int) -> Shaped[np.ndarray, "L 2 K T *D"]:
        found = disk_cache.read_array(path)
        layers, heads, dim = self._shape
        vector = (dim,) if self._dtype == "float16" else ()
        if found.dtype != self.dtype or found.shape != (layers, 2, heads, tokens, *vector):
            raise Damaged(f"{path} is no passage of this model")
        return found

    def save(self, beginning: Ids, passage: Ids, kv: Float16[np.ndarray, "L 2 K T D"]) -> None:
        """Keep a passage. Raises UserError when it cannot be written."""
        content = io.BytesIO()
        np.save(content, np.ascontiguousarray(kv) if self._dtype == "float16" else self._rounded(kv))
        disk_cache.write(self.path(beginning, passage), content.getvalue())

    def _rounded(self, kv: Float16[np.ndarray, "L 2 K T D"]) -> Shaped[np.ndarray, "L 2 K T"]:
        vectors = kv.astype(np.float32)
        rounded = np.empty(kv.shape[:-1], self.dtype)
        rounded["scale"] = np.maximum(np.abs(vectors).max(axis=-1), 1e-12) / 127
        rounded["values"] = np.rint(vectors / rounded["scale"][..., None])
        return rounded


@dataclass(frozen=True, slots=True)
class Filled:
    """What filling the store with prompts' passages came to."""

    computed: int  # passages; the others were there
    sizes: dict[Path, tuple[int, int]]  # the file of each different one, beginnings too: tokens and bytes


def _size(file: Path) -> int:
    """Bytes of a file; 0 where it was evicted meanwhile."""
    return file.stat().st_size if file.exists() else 0


class ChunkKVCache:
    """An engine that reads of a prompt what was never read before. Reads the model's `fingerprint`, 64 hex digits."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        fingerprint: str,
        options: ChunkKVOptions = ChunkKVOptions(),
    ):
        self._engine, self._tokenizer, self._options = engine, tokenizer, options
        c = engine.model.config
        place = Path(options.path).expanduser() if options.path else cache_root()
        folder = private_folder(place / "chunk_kv", "generator.kv_path" if options.path else "RAG_CACHE")
        shape = (c.num_hidden_layers, c.num_key_value_heads, c.head_dim)
        self.store = ChunkKVStore(
            folder, content_key(fingerprint, code_version(type(self))), shape, options.dtype
        )

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation: those of its pieces."""
        return split_prompt(self._tokenizer, messages).ids

    def start(
        self, messages: Sequence[Message], max_new_tokens: int, sampling: Sampling = Sampling(), seed: int = 0
    ) -> tuple[list[int], DecodeState]:
        """The prompt's ids, and the state behind it. Raises UserError as `Engine.prefill` does."""
        parts = split_prompt(self._tokenizer, messages)
        self._engine.check([parts.ids], max_new_tokens)
        cache, there = self._kept(parts, self._engine.capacity(len(parts.ids), max_new_tokens))
        options = (max_new_tokens, sampling, seed)
        if self._blends(parts):
            cache, last = self._blended(cache, parts, there)
            return parts.ids, self._engine.begin(cache, last, parts.ids, *options)
        return parts.ids, self._engine.resume(cache, parts.ids, np.flatnonzero(~there).tolist(), *options)

    def log_probs(self, messages: Sequence[Message], continuation: Sequence[int]) -> Float32[np.ndarray, "n"]:
        """The log-probability of every token of a continuation of the conversation."""
        if not continuation:
            return np.zeros(0, np.float32)
        ids, cache, fresh = self._read_for(messages, len(continuation))
        return log_probs_after_cache(self._engine.packed, cache, ids, fresh, continuation)

    def next_log_probs(self, messages: Sequence[Message]) -> Float32[np.ndarray, "V"]:
        """The log-probability of every token to be the answer's first."""
        ids, cache, fresh = self._read_for(messages, 1)
        return next_log_probs_after_cache(self._engine.packed, cache, ids, fresh)

    def _read_for(self, messages: Sequence[Message], tokens: int) -> tuple[list[int], KVCache, list[int]]:
        """A prompt's ids, and `assembled` of it with room for so many tokens behind it."""
        parts = split_prompt(self._tokenizer, messages)
        self._engine.check([parts.ids], tokens)
        room = round_up_suffix(len(parts.ids)) + round_up_suffix(tokens)
        return parts.ids, *self.assembled(parts, self._engine.capacity(len(parts.ids), room))

    def fill(
        self, prompts: Iterable[Sequence[Message]], progress: Callable[[int], None] = lambda done: None
    ) -> Filled:
        """Read the passages of all prompts that are not kept yet, and keep them; `progress` is told how many."""
        wanted = self._wanted(prompts)
        missing = [entry for entry in wanted if self.store.load(*entry) is None]
        self._read(missing, lambda done: progress(len(wanted) - len(missing) + done))
        files = {self.store.path(*entry): len(entry[1]) for entry in wanted}
        return Filled(len(missing), {file: (tokens, _size(file)) for file, tokens in files.items()})

    def unread(self, prompts: Iterable[Sequence[Message]]) -> dict[Path, int]:
        """The files that `fill` would write, and the tokens of each; nothing is computed."""
        files = {self.store.path(*entry): len(entry[1]) for entry in self._wanted(prompts)}
        return {file: tokens for file, tokens in files.items() if not file.exists()}

    def _wanted(self, prompts: Iterable[Sequence[Message]]) -> list[tuple[Ids, Ids]]:
        """What the store should hold for these prompts, each once."""
        parts = (split_prompt(self._tokenizer, messages) for messages in prompts)
        return list(dict.fromkeys(entry for some in parts for entry in self._entries(some)))

    def assembled(self, parts: PromptParts, capacity: int) -> tuple[KVCache, list[int]]:
        """A cache with what was kept in its place, blended if that is asked for, and the positions still to be read."""
        cache, there = self._kept(parts, capacity)
        if self._blends(parts):
            return self._blended(cache, parts, there)[0], [len(parts.ids) - 1]
        return cache, np.flatnonzero(~there).tolist()

    def _blends(self, parts: PromptParts) -> bool:
        return self._options.blend_share > 0 and bool(parts.passages)

    def _kept(self, parts: PromptParts, capacity: int) -> tuple[KVCache, Bool[np.ndarray, "T"]]:
        """A cache with what was kept in its place, and which tokens of the prompt that is."""
        entries = self._entries(parts)
        kept = [self.store.load(*entry) for entry in entries]
        if missing := [entry for entry, found in zip(entries, kept, strict=True) if found is None]:
            self._read(list(dict.fromkeys(missing)))
            kept = [
                self._reread(entry) if found is None else found
                for entry, found in zip(entries, kept, strict=True)
            ]
        ends = [(0, parts.shared), *((at, at + len(ids)) for at, ids in parts.passages)]
        if not parts.beginning:
            ends = ends[1:]
        cache = self._placed([(*end, kv) for end, kv in zip(ends, kept, strict=True)], capacity)
        there = np.zeros(len(parts.ids), bool)
        for start, end in ends:
            there[start:end] = True
        for at, ids in parts.passages:
            if not self._exact(parts, at):
                there[at : at + min(self._options.recompute, len(ids))] = False
        there[-1] = False
        return cache, there

    def _reread(self, entry: tuple[Ids, Ids]) -> np.ndarray:
        """What was just computed and written."""
        if (found := self.store.load(*entry)) is None:
            raise UserError(
                f"A passage that was just written to {self.store.folder} is no longer there: check the disk, and raise "
                "RAG_CACHE_GB, the size of the cache."
            )
        return found

    def _exact(self, parts: PromptParts, at: int) -> bool:
        """Whether a passage stands where it was read."""
        return self._options.behind_prefix and at == parts.shared == len(parts.beginning)

    def _entries(self, parts: PromptParts) -> list[tuple[Ids, Ids]]:
        """What the store should hold: the beginning, unless it is empty, and the passages behind it."""
        behind = parts.beginning if self._options.behind_prefix else ()
        passages = [(behind, ids) for _, ids in parts.passages]
        return [((), parts.beginning), *passages] if parts.beginning else passages

    def _placed(self, kept: Sequence[tuple[int, int, np.ndarray]], capacity: int) -> KVCache:
        """Copied side by side into one array, so that one program serves all lengths."""
        c, int8 = self._engine.model.config, self._options.dtype == "int8"
        shape = (c.num_hidden_layers, 2, c.num_key_value_heads, capacity, c.head_dim)
        values = np.ones(shape, np.int8) if int8 else np.full(shape, llama.UNUSED_SLOT, np.float16)
        scales = np.full((*shape[:-1], 1), llama.UNUSED_SLOT, np.float32) if int8 else None
        for start, end, kv in kept:
            part = kv[:, :, :, : end - start]
            values[:, :, :, start:end] = part["values"] if int8 else part
            if int8:
                scales[:, :, :, start:end, 0] = part["scale"]
        dtype, rotary = cache_dtype(self._engine.model), _rotations(c, capacity)
        layers = [
            rotate_keys(layer, None if scales is None else scales[i], rotary, dtype)
            for i, layer in enumerate(values)
        ]
        return KVCache(*zip(*layers, strict=True))

    def _blended(
        self, cache: KVCache, parts: PromptParts, there: Bool[np.ndarray, "T"]
    ) -> tuple[KVCache, Float[Array, "1 M"]]:
        """The complete cache, and the last token's hidden state."""
        width = round_up_prompt(len(parts.ids))
        kept, candidates = np.zeros(width, bool), np.zeros(width, bool)
        kept[: len(there)] = there
        for at, ids in parts.passages:
            candidates[at : at + len(ids)] = there[at : at + len(ids)] & (not self._exact(parts, at))
        inside = sum(len(ids) for _, ids in parts.passages)
        anew = np.count_nonzero(~there) + round(self._options.blend_share * inside)
        return blend(
            self._engine.packed,
            cache,
            pad_prompts([parts.ids], width),
            np.int32(len(parts.ids)),
            kept,
            candidates,
            count=min(width, round_up_suffix(int(anew))),
            layers=min(LAYERS, self._engine.model.config.num_hidden_layers),
        )

    def _read(self, entries: Sequence[tuple[Ids, Ids]], progress: Callable[[int], None] = lambda done: None):
        """Compute and keep passages, those of like lengths together."""
        order = sorted(entries, key=lambda entry: -len(entry[0]) - len(entry[1]))
        done = 0
        for some, size in batch_by_length([len(a) + len(b) for a, b in order], _TOKENS_TOGETHER):
            members = order[some]
            rows = [[*beginning, *passage] for beginning, passage in members]
            rows += [rows[-1]] * (size - len(rows))
            made = np.asarray(
                prefill_passages(self._engine.packed, pad_prompts(rows, round_up_prompt(len(rows[0]))))
            )
            for (beginning, passage), kv in zip(members, made, strict=False):
                start = len(beginning)
                self.store.save(beginning, passage, kv[:, :, :, start : start + len(passage)])
            done += len(members)
            progress(done)
