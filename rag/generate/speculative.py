"""Speculative decoding by prompt lookup: draft tokens come from the text so far, one forward pass verifies them.

An answer from passages copies much of them. So the longest suffix of the text that occurs earlier in it is looked up
(prompt lookup, Saxena 2023; by a suffix automaton, SAM decoding, Hu et al. 2024, arXiv:2411.10666), and the tokens that
followed it there are the draft. The model runs on its newest token and the draft together, chooses a token after each,
and accepts the draft up to the first disagreement (Leviathan et al. 2023, for greedy choices). The answer is that of
plain decoding, up to the rounding by which products of several rows differ from those of one.

Letters: n draft tokens.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from rag.generate.decode_state import DecodeState, is_finished
from rag.generate.engine import Engine
from rag.generate.suffix_automaton import SuffixAutomaton
from rag.models.llama.model import Llama, forward, logits
from rag.models.placement import Packed
from rag.ops.sampling import Sampling
from rag.runtime.machine.clock import Clock

DRAFT_SIZES = (3, 7)  # tokens of a draft; a program is compiled for each

# How often the token that followed the same n tokens before is the next one, for n = 1, 2, ... (the last: and more):
# the prior, measured on answers from passages, and how many trials it counts for.
_PRIOR = (0.23, 0.5, 0.6, 0.6, 0.75, 0.75, 0.8, 0.8)
_PRIOR_TRIALS = 8.0
_MEMORY = 64.0  # trials that an estimate remembers
_ASSUMED_COST = 1.5  # of a verification, in plain steps, before it was measured
_TIMES = 9  # of which the median is a cost
_FORGET_AFTER = 64  # consecutive plain steps after which verifications may have become cheaper


@partial(jax.jit, static_argnames=("end_ids",), donate_argnames=("state",))
def verify(
    packed: Packed[Llama], state: DecodeState, draft: Int[Array, "n"], *, end_ids: tuple[int, ...]
) -> tuple[DecodeState, Int[Array, "n+1"]]:
    """Run the model on a draft, and accept it up to the first token that greedy decoding would not choose.

    The keys and values of a rejected token stay after the row's length until they are overwritten. An empty draft is
    a step of plain decoding.

    Args:
        packed: the model.
        state: one row, unfinished, with room for the draft in its cache; it is donated.
        draft: the proposed tokens.
        end_ids: the tokens that end an answer.

    Returns:
        The new state, and its new tokens: the accepted ones and one more, then -1.
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
    """Chooses how many tokens to draft, by what verifications took and how often draft tokens were accepted.

    One policy lives as long as its generator and learns from all answers. It changes speed alone.
    """

    def __init__(self) -> None:
        self._seconds = {size: deque[float](maxlen=_TIMES) for size in (0, *DRAFT_SIZES)}
        self._trials = [_PRIOR_TRIALS] * len(_PRIOR)
        self._hits = [_PRIOR_TRIALS * probability for probability in _PRIOR]
        self._plain = 0

    def size(self, match: int, most: int) -> int:
        """Return how many tokens to draft after a match of `match` tokens: 0, or one of DRAFT_SIZES up to `most`."""
        sizes = [0, *(size for size in DRAFT_SIZES if match and size <= most)]
        best = max(sizes, key=lambda size: self.expected(match, size) / self.cost(size))
        self._plain = 0 if best else self._plain + 1
        if self._plain == _FORGET_AFTER:
            self._plain = 0
            for size in DRAFT_SIZES:
                self._seconds[size].clear()
        return best

    def expected(self, match: int, size: int) -> float:
        """Return the expected number of tokens of a verification; each accepted one lengthens the match of the next."""
        total = chance = 1.0
        for length in range(match, match + size):
            at = _match_class(length)
            chance *= self._hits[at] / self._trials[at]
            total += chance
        return total

    def cost(self, size: int) -> float:
        """Return the seconds of a verification in plain steps; until measured, no more than those of a longer one."""
        plain = self._seconds[0]
        longer = [self._seconds[other] for other in DRAFT_SIZES if other >= size and self._seconds[other]]
        if size == 0:
            return 1.0
        if not plain or not longer:
            return _ASSUMED_COST
        ratio = median(longer[0]) / median(plain)
        return ratio if self._seconds[size] else min(ratio, _ASSUMED_COST)

    def took(self, size: int, seconds: float) -> None:
        """Learn the seconds of a verification, or with size 0 of a plain step."""
        self._seconds[size].append(seconds)

    def learn(self, match: int, accepted: bool) -> None:
        """Learn whether the token that followed an earlier match was the next one."""
        at = _match_class(match)
        decay = min(1.0, _MEMORY / (self._trials[at] + 1))
        self._hits[at] = decay * (self._hits[at] + accepted)
        self._trials[at] = decay * (self._trials[at] + 1)


def _match_class(match: int) -> int:
    return min(match, len(_PRIOR)) - 1


def supports_speculation(sampling: Sampling) -> bool:
    """Return whether a token depends on the text alone: greedy choices without a repetition penalty."""
    return sampling.temperature == 0 and sampling.repetition_penalty == 1.0


def stream_speculatively(
    engine: Engine, state: DecodeState, prompt: Sequence[int], policy: DraftLengthPolicy
) -> Iterator[list[int]]:
    """Yield what `engine.stream` yields for greedy choices, in fewer steps.

    Args:
        engine: runs the model.
        state: one row, which holds the prompt and its first new token; it is donated.
        prompt: the prompt's tokens.
        policy: chooses the drafts' sizes and learns from them.
    """
    text = SuffixAutomaton(prompt)  # built while the device still prefills
    made = np.asarray(state.token).tolist()
    while True:
        for token in made:
            text.push(token)
        yield [token for token in made if token not in engine.end_ids]
        if np.asarray(state.finished).all():
            return
        match = text.match
        size = policy.size(match, _max_draft(state, len(text.tokens)))
        guesses = text.draft(max(size, 1))  # a plain step is compared with one as well
        begin = Clock.now()
        draft = np.asarray(guesses[:size], np.int32)
        state, verified = verify(engine.packed, state, draft, end_ids=engine.end_ids)
        made = [token for token in np.asarray(verified).tolist() if token >= 0]
        taken = Clock.now() - begin
        if not taken.compiling:  # the first call of a program says little about the others
            policy.took(size, taken.wall)
        if match:
            for i, (guess, token) in enumerate(zip(guesses, made, strict=False)):
                policy.learn(match + i, guess == token)


def _max_draft(state: DecodeState, tokens: int) -> int:
    """Return how many draft tokens fit the cache after a text of so many tokens; 0 before the budget's last token."""
    in_cache = tokens - 1  # the newest is not
    return state.cache.capacity - in_cache - 1 if int(np.asarray(state.remaining)[0]) > 1 else 0
