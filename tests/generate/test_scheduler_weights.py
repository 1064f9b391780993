"""Many prompts of real text answered in one call by the default weights, beside each prompt alone. Long: --long."""

from pathlib import Path

import numpy as np
import pytest

from rag.generate.local import LocalGenerator
from rag.models.llama.model import forward, logits
from tests.generate.decode import alone, batch

pytestmark = [pytest.mark.long, pytest.mark.weights]

SAMPLE = Path(__file__).parents[2] / "data/sample/documents"
# Two logits closer than this, in standard deviations of a step's logits, may change places: products of other shapes
# round otherwise. The greatest that was seen is in LOG.md.
TIES = {"float32": 1e-4, "int8": 0.25, "bfloat16": 0.25}


@pytest.fixture(scope="module", params=TIES)
def reader(request):
    return LocalGenerator(dtype=request.param, adapter=None), TIES[request.param]


def prompts_of(reader: LocalGenerator, lengths) -> list[tuple[int, ...]]:
    """Pieces of the sample's text of so many tokens, each a question in the chat format."""
    text = " ".join(path.read_text() for path in sorted(SAMPLE.glob("*.txt")))
    ids = reader.tokenizer.encode(text, special=False)
    rng, found = np.random.default_rng(0), []
    for length in lengths:
        start = int(rng.integers(0, len(ids) - length))
        found.append((1, *ids[start : start + length - 1]))
    return found


def gap(reader: LocalGenerator, prompt, answer, other) -> float:
    """Return the distance between the logits of the first tokens that differ, in standard deviations."""
    at = next(i for i, (a, b) in enumerate(zip([*answer, -1], [*other, -1], strict=False)) if a != b)
    text = np.asarray([[*prompt, *answer[:at]]], np.int32)
    hidden, _ = forward(reader.engine.model, text, np.zeros(1, np.int32))
    row = np.asarray(logits(reader.engine.model, hidden[:, -1]))[0]
    ends = list(reader.engine.end_ids)
    values = [row[made[at]] if at < len(made) else row[ends].max() for made in (answer, other)]
    return float(abs(values[0] - values[1]) / row.std())


@pytest.mark.parametrize(
    ("lengths", "new_tokens"),
    [([200, 248] * 6, 48), (np.linspace(20, 1100, 64).astype(int).tolist(), 64)],
    ids=["six pairs", "64 prompts"],
)
def test_answers_in_one_call_are_those_of_each_prompt_alone(reader, lengths, new_tokens):
    reader, tie = reader
    prompts = prompts_of(reader, lengths)
    single = [alone(reader.engine, prompt, new_tokens) for prompt in prompts]
    made = batch(reader.engine, prompts, new_tokens)
    pairs = zip(prompts, single, made, strict=True)
    gaps = [gap(reader, prompt, one, other) for prompt, one, other in pairs if one != other]
    print(f"\n{len(prompts) - len(gaps)} of {len(prompts)} answers equal; the others part at {sorted(gaps)}")
    assert max(gaps, default=0.0) <= tie
    if tie < 1e-3:
        assert not gaps
