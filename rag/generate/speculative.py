"""Drafting from the text so far: what followed the same words before is checked in one forward pass.

An answer from passages copies much of them. So the longest ending of the text that stands earlier in it is looked up
(prompt lookup, Saxena 2023; by a suffix automaton, SAM decoding, Hu et al. 2024, arXiv:2411.10666), and the tokens that
followed there are a draft of the next ones. The model reads its newest token and the draft together, chooses a token
behind each, and keeps them up to its first disagreement (Leviathan et al. 2023, for greedy choices). Nothing is written
that it would not have written alone, up to the rounding by which products of several rows differ from those of one.

Letters: W tokens read at once, 1 + the draft's; V vocab.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from rag.generate.engine import DecodeState, Decoding, Engine, is_finished
from rag.generate.suffix_automaton import SuffixAutomaton
from rag.models.checkpoint import Packed
from rag.models.llama.model import Llama, forward, logits
from rag.ops.sampling import Sampling
from rag.runtime.clock import Clock

SIZES = (3, 7)  # tokens of a draft; each is a program of its own

# How often a token that followed the same n tokens before is the next one, n = 1, 2, ... (the last: and more): what is
# believed before anything is seen, and what it counts for. Measured on answers from passages.
_BELIEVED = (0.23, 0.5, 0.6, 0.6, 0.75, 0.75, 0.8, 0.8)
_BELIEF = 8.0
_MEMORY = 64.0  # tokens that an estimate remembers
_ASSUMED_COST = 1.5  # of a verification, in plain steps, before it was measured
_TIMES = 9  # of which the median is a cost
_FORGET_AFTER = 64  # plain steps on end after which verifications may have become cheaper


@partial(jax.jit, static_argnames=("end_ids",), donate_argnames=("state",))
def verify(
    packed: Packed[Llama], state: DecodeState, draft: Int[Array, "D"], *, end_ids: tuple[int, ...]
) -> tuple[DecodeState, Int[Array, "W"]]:
    """The tokens that greedy decoding makes next: those of the draft that it would make, and one more.

    The state has one row, unfinished, and room for the draft in its cache, where a refused token's keys and values
    lie behind the length until they are overwritten. Unused places of the result are -1. An empty draft is a step
    of plain decoding.
    """
    model = packed.module
    tokens = jnp.concatenate([state.token, draft])[None]
    hidden, cache = forward(model, tokens, state.length, state.cache)
    chosen = jnp.argmax(logits(model, hidden[0]), axis=-1).astype(jnp.int32)
    order = jnp.arange(len(chosen))
    agreed = jnp.cumprod(draft == chosen[:-1]).sum()
    ends = is_finished(chosen, state.remaining - 1 - order, end_ids)
    count = jnp.minimum(agreed, jnp.where(ends.any(), jnp.argmax(ends), len(draft))) + 1
    token = chosen[count - 1][None]
    made = jnp.where(order < count, chosen, -1)
    new = replace(
        state,
        cache=cache,
        token=token,
        length=state.length + count,
        remaining=state.remaining - count,
        finished=ends[count - 1][None],
        seen=state.seen.at[0, jnp.where(order < count, chosen, token)].set(True),
    )
    return new, made


class DraftLengthPolicy:
    """Whether a draft pays, and of how many tokens: by what verifications took and how often drafts agreed.

    One lives as long as its generator and learns from all answers. What it decides changes speed alone.
    """

    def __init__(self) -> None:
        self._seconds = {size: deque[float](maxlen=_TIMES) for size in (0, *SIZES)}
        self._trials = [_BELIEF] * len(_BELIEVED)
        self._hits = [_BELIEF * belief for belief in _BELIEVED]
        self._plain = 0

    def size(self, match: int, most: int) -> int:
        """Tokens to draft, 0 or one of SIZES up to `most`, behind a match of so many tokens."""
        sizes = [0, *(size for size in SIZES if match and size <= most)]
        best = max(sizes, key=lambda size: self.expected(match, size) / self.cost(size))
        self._plain = 0 if best else self._plain + 1
        if self._plain == _FORGET_AFTER:
            self._plain = 0
            for size in SIZES:
                self._seconds[size].clear()
        return best

    def expected(self, match: int, size: int) -> float:
        """Tokens that a verification is expected to make; each that agrees lengthens the match of the next."""
        total = chance = 1.0
        for length in range(match, match + size):
            at = _match_class(length)
            chance *= self._hits[at] / self._trials[at]
            total += chance
        return total

    def cost(self, size: int) -> float:
        """Seconds of a verification, in plain steps; until it was measured no more than a longer one's."""
        plain = self._seconds[0]
        longer = [self._seconds[other] for other in SIZES if other >= size and self._seconds[other]]
        if size == 0:
            return 1.0
        if not plain or not longer:
            return _ASSUMED_COST
        ratio = median(longer[0]) / median(plain)
        return ratio if self._seconds[size] else min(ratio, _ASSUMED_COST)

    def took(self, size: int, seconds: float) -> None:
        """Learn the cost of a verification, or with size 0 of a plain step."""
        self._seconds[size].append(seconds)

    def learn(self, match: int, agreed: bool) -> None:
        """Learn whether the token that followed an earlier match was the next one."""
        at = _match_class(match)
        keep = min(1.0, _MEMORY / (self._trials[at] + 1))
        self._hits[at] = keep * (self._hits[at] + agreed)
        self._trials[at] = keep * (self._trials[at] + 1)


def _match_class(match: int) -> int:
    return min(match, len(_BELIEVED)) - 1


def supports_speculation(sampling: Sampling) -> bool:
    """Whether a token depends on nothing but the text: greedy choices without a repetition penalty."""
    return sampling.temperature == 0 and sampling.repetition_penalty == 1.0


@dataclass(slots=True)
class DraftCounts:
    """What became of an answer's drafts."""

    drafted: int = 0  # tokens
    accepted: int = 0  # tokens
    verifications: int = 0
    plain_steps: int = 0


class SpeculativeDecoding(Decoding):
    """One answer being decoded with drafts: its tokens in fewer steps; `counts` says what the drafts were worth."""

    def __init__(self, engine: Engine, state: DecodeState, prompt: Sequence[int], policy: DraftLengthPolicy):
        """`state` has one row, which holds the prompt; sampling is greedy (`can_draft`)."""
        super().__init__(engine, state, Sampling())
        self._policy = policy
        self._text = SuffixAutomaton(prompt)  # built while the device still reads the prompt
        self.counts = DraftCounts()

    def __next__(self) -> list[list[int]]:
        """The next tokens of the one row, end tokens left out."""
        if self._first:  # prefill made it already
            self._first = False
            made = np.asarray(self._state.token).tolist()
        elif np.asarray(self._state.finished).all():
            raise StopIteration
        else:
            made = self._step()
        for token in made:
            self._text.push(token)
        return [[token for token in made if token not in self._engine.end_ids]]

    def _step(self) -> list[int]:
        match = self._text.match
        size = self._policy.size(match, self._room())
        draft = self._text.draft(max(size, 1))  # a plain step is compared with one as well
        made = self._verify(draft[:size])
        self.counts.verifications += size > 0
        self.counts.plain_steps += size == 0
        self.counts.drafted += size
        self.counts.accepted += len(made) - 1
        if match:
            for i, (guess, token) in enumerate(zip(draft, made, strict=False)):
                self._policy.learn(match + i, guess == token)
        return made

    def _verify(self, draft: list[int]) -> list[int]:
        begin = Clock.now()
        self._state, made = verify(
            self._engine.packed, self._state, np.asarray(draft, np.int32), end_ids=self._engine.end_ids
        )
        tokens = _valid_tokens(made)
        taken = Clock.now() - begin
        if not taken.compiling:  # the first call of a program says little of the others
            self._policy.took(len(draft), taken.wall)
        return tokens

    def _room(self) -> int:
        """Tokens that a draft may have: in the cache, and of use before the budget's last token."""
        length = len(self._text.tokens) - 1  # the newest is not in the cache
        remaining = int(np.asarray(self._state.remaining)[0])
        left = self._state.cache.capacity - length - 1
        return left if remaining > 1 else 0


def _valid_tokens(tokens: Int[Array, "W"]) -> list[int]:
    return [token for token in np.asarray(tokens).tolist() if token >= 0]
