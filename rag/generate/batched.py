"""Answer many requests together by continuous batching (rag.generate.scheduler)."""

from collections.abc import Sequence
from dataclasses import replace

from rag.generate import Request
from rag.generate.engine import Engine
from rag.generate.prefill_batches import TokenRequest, plan_prefill
from rag.generate.scheduler import BatchPrefiller, Scheduler, run
from rag.generate.stop_text import AnswerText
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.ops.sampling import Sampling

_Asked = tuple[TokenRequest, Request]  # the request without its messages


def generate_batched(
    engine: Engine, tokenizer: Tokenizer, requests: Sequence[Request], tokens_per_batch: int
) -> list[str]:
    """Return the answers to requests, in their order. Raises UserError as `Engine.check` does.

    Requests with the same sampling are decoded together; equal requests are answered once.

    Args:
        engine: runs the model.
        tokenizer: the model's.
        requests: in any order, with any options.
        tokens_per_batch: cache slots of all rows that are decoded together, unless one row alone needs more.
    """
    asked: list[_Asked] = []
    for request in requests:
        tokens = TokenRequest.of(tokenizer.chat(request.messages), request)
        engine.check(tokens)
        asked.append((tokens, replace(request, messages=(), stop=tuple(request.stop))))
    groups: dict[Sampling, dict[_Asked, None]] = {}
    for one in asked:
        groups.setdefault(one[0].sampling, {})[one] = None
    texts: dict[_Asked, str] = {}
    for group in groups.values():
        texts |= _decode(engine, tokenizer, list(group), tokens_per_batch)
    return [texts[one] for one in asked]


def _decode(
    engine: Engine, tokenizer: Tokenizer, asked: Sequence[_Asked], tokens_per_batch: int
) -> dict[_Asked, str]:
    """Return the answer to each of these different requests of equal sampling."""
    requests = [request for request, _ in asked]
    answers = [AnswerText(tokenizer, request) for _, request in asked]
    pieces: list[list[str]] = [[] for _ in asked]

    def on_tokens(i: int, tokens: list[int]) -> bool:
        pieces[i].append(answers[i].push(tokens))
        return not answers[i].stopped

    scheduler = Scheduler(engine, requests[0].sampling, tokens_per_batch, len(requests))
    run(plan_prefill(requests, tokens_per_batch), BatchPrefiller(engine, requests), scheduler, on_tokens)
    return {
        one: "".join(some) + answer.finish() for one, some, answer in zip(asked, pieces, answers, strict=True)
    }
