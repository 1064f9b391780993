"""Sample the next token from logits: greedy, temperature, top-k, top-p, min-p, repetition penalty.

Filters apply in the order of Hugging Face's generate: penalty, temperature, top-k (Fan et al. 2018), top-p
(Holtzman et al. 2020), min-p (Nguyen et al. 2024).

Letters: B batch, V vocab.
"""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge, Lt
from jaxtyping import Array, Bool, Float, Int, Key

from rag.runtime.options import Penalty, Temperature, TopP, Whole, check_fields

MASKED = -1e30  # finite, so that a row of masked logits has no NaN in its softmax


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options of sampling. Raises UserError for values outside their range."""

    temperature: Temperature = 0.0  # 0 takes the most probable token and ignores the filters below
    top_k: Whole = 0  # keep the k most probable tokens; 0 keeps all
    top_p: TopP = 1.0  # keep the most probable tokens that together reach this probability
    min_p: Annotated[float, Ge(0), Lt(1)] = 0.0  # drop tokens below this share of the highest probability
    # Divides positive and multiplies negative logits of tokens in the context (CTRL, Keskar et al. 2019).
    repetition_penalty: Penalty = 1.0

    def __post_init__(self):
        check_fields(self)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], seen: Bool[Array, "B V"], options: Sampling
) -> Int[Array, "B"]:
    """Return one token a row. Each row has its own random key, so that its token does not depend on the batch.

    Args:
        logits: next-token logits.
        keys: random keys; each is used once.
        seen: the tokens in each row's context, for the repetition penalty.
        options: see Sampling.
    """
    if options.repetition_penalty != 1.0:
        penalty = options.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if options.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    filtered = filter_logits(logits / options.temperature, options)
    return jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)


def filter_logits(logits: Float[Array, "B V"], options: Sampling) -> Float[Array, "B V"]:
    """Return the logits, those of tokens that top-k, top-p or min-p drops replaced by MASKED."""
    if 0 < options.top_k < logits.shape[-1]:
        # The barrier keeps XLA's fast TopK: a slice of its output inside one jit would turn it into a full sort.
        values, _ = jax.lax.optimization_barrier(jax.lax.top_k(logits, options.top_k))
        logits = jnp.where(logits < values[:, -1:], MASKED, logits)
    if options.top_p < 1:
        logits = jnp.where(logits < _nucleus_threshold(logits, options.top_p), MASKED, logits)
    if options.min_p > 0:
        best = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits < best + jnp.log(options.min_p), MASKED, logits)
    return logits


def _nucleus_threshold(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B 1"]:
    """Return the smallest logit of the nucleus: the fewest most probable tokens that together reach top_p."""
    descending = -jnp.sort(-logits, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
    size = 1 + jnp.sum(mass < top_p, axis=-1, keepdims=True)
    return jnp.take_along_axis(descending, jnp.minimum(size, logits.shape[-1]) - 1, axis=-1)
