"""Answer many requests together by continuous batching (rag.generate.scheduler)."""

from collections.abc import Sequence

from rag.generate import Request
from rag.generate.engine import Engine
from rag.generate.prefill_batches import TokenRequest, plan_batches
from rag.generate.scheduler import BatchPrefill, Scheduler, run
from rag.generate.stop_text import AnswerText
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.ops.sampling import Sampling


def generate_batched(
    engine: Engine, tokenizer: Tokenizer, requests: Sequence[Request], tokens_per_batch: int
) -> list[str]:
    """Return the answers to requests, in their order. Raises UserError as `Engine.check` does.

    Requests with the same sampling, max_new_tokens and stop strings are decoded together.
    """
    prompts = [tuple(tokenizer.chat(request.messages)) for request in requests]
    alike: dict[tuple[Sampling, int, tuple[str, ...]], list[int]] = {}
    for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        engine.check([prompt], request.max_new_tokens)
        options = (request.sampling, request.max_new_tokens, tuple(request.stop))
        alike.setdefault(options, []).append(i)
    texts = [""] * len(requests)
    for (sampling, max_new_tokens, stop), members in alike.items():
        asked = [(prompts[i], requests[i].seed) for i in members]
        different = list(dict.fromkeys(asked))  # equal requests are answered once
        answers = [AnswerText(tokenizer, stop) for _ in different]
        found = _decode(engine, different, sampling, max_new_tokens, answers, tokens_per_batch)
        for i, request_ids in zip(members, asked, strict=True):
            texts[i] = found[request_ids]
    return texts


def _decode(
    engine: Engine,
    requests: Sequence[TokenRequest],
    sampling: Sampling,
    max_new_tokens: int,
    answers: Sequence[AnswerText],
    tokens_per_batch: int,
) -> dict[TokenRequest, str]:
    """Return the text of each request, made by its AnswerText."""
    pieces: list[list[str]] = [[] for _ in requests]

    def on_tokens(i: int, tokens: list[int]) -> bool:
        pieces[i].append(answers[i].push(tokens))
        return not answers[i].stopped

    batches = plan_batches(requests, max_new_tokens, tokens_per_batch)
    prefill_batch = BatchPrefill(engine, requests, max_new_tokens, sampling)
    run(batches, prefill_batch, Scheduler(engine, sampling, tokens_per_batch, len(requests)), on_tokens)
    return {
        request: "".join(some) + answer.finish()
        for request, some, answer in zip(requests, pieces, answers, strict=True)
    }
