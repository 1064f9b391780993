"""Decode prompts' token ids by an engine: each prompt alone, or many by continuous batching."""

from collections.abc import Callable, Sequence
from itertools import chain

from rag.generate.decode_state import DecodeState
from rag.generate.engine import Engine
from rag.generate.prefill_batches import TokenRequest, plan_prefill
from rag.generate.scheduler import BatchPrefiller, Scheduler, run
from rag.ops.sampling import Sampling


def request(
    prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = Sampling(), seed: int = 0
) -> TokenRequest:
    """Return a request with any sequence of ids as its prompt."""
    return TokenRequest(tuple(prompt), max_new_tokens, sampling, seed)


def written(engine: Engine, state: DecodeState, sampling: Sampling = Sampling()) -> list[int]:
    """Return the answer of a one-row state."""
    return list(chain(*engine.stream(state, sampling)))


def answer(engine: Engine, request: TokenRequest) -> list[int]:
    """Return the answer to one request."""
    return written(engine, engine.prefill(request), request.sampling)


def alone(
    engine: Engine, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = Sampling(), seed: int = 0
) -> list[int]:
    """Return the answer to one prompt."""
    return answer(engine, request(prompt, max_new_tokens, sampling, seed))


def together(
    engine: Engine,
    requests: Sequence[TokenRequest],
    tokens_per_batch: int = 4096,
    wanted: Sequence[int] | None = None,
    make: Callable[..., Scheduler] = Scheduler,
) -> list[list[int]]:
    """Return the answers to requests; `wanted[i]` tokens are enough for request i, as a stop string ends it."""
    made: list[list[int]] = [[] for _ in requests]

    def on_tokens(i: int, tokens: list[int]) -> bool:
        made[i].extend(tokens)
        return wanted is None or len(made[i]) < wanted[i]

    scheduler = make(engine, requests[0].sampling, tokens_per_batch, len(requests))
    run(plan_prefill(requests, tokens_per_batch), BatchPrefiller(engine, requests), scheduler, on_tokens)
    assert scheduler.busy == 0
    return made


def batch(engine: Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Return the greedy answers to prompts that are decoded together."""
    return together(engine, [request(prompt, max_new_tokens) for prompt in prompts])
