"""Decode prompts' token ids by an engine: each prompt alone, or many by continuous batching."""

from collections.abc import Callable, Sequence
from itertools import chain

from rag.generate.engine import Engine
from rag.generate.prefill_batches import TokenRequest, plan_batches
from rag.generate.scheduler import BatchPrefill, Scheduler, run
from rag.ops.sampling import Sampling


def alone(
    engine: Engine, prompt: Sequence[int], new_tokens: int, sampling: Sampling = Sampling(), seed: int = 0
) -> list[int]:
    """Return the answer to one prompt."""
    return list(chain(*engine.stream(engine.prefill(prompt, new_tokens, sampling, seed), sampling)))


def together(
    engine: Engine,
    requests: Sequence[TokenRequest],
    new_tokens: int,
    sampling: Sampling = Sampling(),
    tokens_per_batch: int = 4096,
    wanted: Sequence[int] | None = None,
    make: Callable[..., Scheduler] = Scheduler,
) -> list[list[int]]:
    """Return the answers to requests; `wanted[i]` tokens are enough for request i, as a stop string ends it."""
    made: list[list[int]] = [[] for _ in requests]

    def on_tokens(i: int, tokens: list[int]) -> bool:
        made[i].extend(tokens)
        return wanted is None or len(made[i]) < wanted[i]

    scheduler = make(engine, sampling, tokens_per_batch, len(requests))
    batches = plan_batches(requests, new_tokens, tokens_per_batch)
    run(batches, BatchPrefill(engine, requests, new_tokens, sampling), scheduler, on_tokens)
    assert scheduler.busy == 0
    return made


def batch(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Return the greedy answers to prompts that are decoded together."""
    return together(engine, [(tuple(prompt), 0) for prompt in prompts], new_tokens)
