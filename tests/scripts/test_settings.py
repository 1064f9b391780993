"""Every value of every configuration is checked: wrong types and values outside their range are one sentence each.

The tables below say, independently of the declarations, what a person may mean by a value that is odd at first sight.
A setting that nothing declares, or that takes just any value, fails here.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from settings import Part, check, settings_of

from rag.runtime.options import is_plain
from rag.types import UserError
from tests.run_script import settings_class
from tests.scripts.test_configs import CHOICES, PRIMARY, composed, filled, groups

# A setting stands in a table by its last words. What 0 means:
ZERO = {
    "seed": "a seed like any other",
    "sensitivity.answers": "no questions are answered",
    "sensitivity.answer_budgets": "no lengths of answers are tried",
    "chunker.overlap": "no overlap",
    "chunker.window": "each sentence alone",
    "analyzer.cjk": "runs of Han and kana are words",
    "sampling.top_k": "no limit",
    "min_p": "no limit",
    "temperature": "the most probable token",
    "bench.warmup": "none",
    "kv_recompute": "none",
    "prefix_mib": "no memory for prompts: nothing is reused",
    "reranker.label": "the first",
    "min_score": "a score",
    "score_threshold": "a score",
    "fusion.lower_bounds": "a score",
    "fusion.weights": "the arm does not count",
    "fusion.constant": "1, 1/2, 1/3 ...",
    "tuning.grid.constants": "1, 1/2, 1/3 ...",
    "blend_share": "none",
    "reranker.weight": "difference alone",
    "weights.k1": "presence alone",
    "tuning.grid.k1": "presence alone",
    "weights.b": "length does not count",
    "tuning.grid.b": "length does not count",
    "weights.delta": "none",
    "chunker.percentile": "a chunk ends at nearly every sentence",
    "bench.spread": "all texts are as long",
    "older_than_days": "of any age",
    "options.rank": "all weights",
    **dict.fromkeys(("holdout", "validation", "unanswerable", "warmup", "constant", "average"), "none"),
    **dict.fromkeys(
        ("weight_decay", "final", "leakage.passages", "contexts.passages", "style.weight"), "none"
    ),
    **dict.fromkeys(("short.weight", "cited.weight", "plain.weight"), "this style is not drawn"),
    "min_f1": "any answer",
    "checkpoint_minutes": "after each step",
    "stop_after_minutes": "after one step",
}
NEGATIVE = {
    "reranker.label": "the last",
    **dict.fromkeys(("min_score", "score_threshold", "fusion.lower_bounds"), "a score"),
}
ONE_AND_A_HALF = {  # of numbers that are no shares
    *(
        "temperature",
        "repetition_penalty",
        "min_score",
        "score_threshold",
        "fusion.lower_bounds",
        "fusion.weights",
    ),
    *("fusion.constant", "tuning.grid.constants", "weights.k1", "weights.delta", "tuning.grid.k1"),
    *("chunker.percentile", "bench.spread", "generator.timeout_s", "limit_gb", "older_than_days"),
    *("alpha", "contexts.passages", "short.weight", "cited.weight", "plain.weight"),
    *("learning_rate", "weight_decay", "clip_norm", "epochs", "checkpoint_minutes", "stop_after_minutes"),
}
HUGE = {"min_score": "above every score", "score_threshold": "above every score"}
NULL = {
    "question": "an interactive session",
    "min_score": "no passage counts as irrelevant",
    "questions.path": "the sample set",
    "questions.limit": "all questions",
    "passage_tokens": "each document is a passage",
    "score_threshold": "not known",
    "stemmer": "words as they stand",
    "stop_words": "all words count",
    "kv_path": "the cache folder",
    "adapter": "the weights as they are",
    "kind": "all kinds",
    "older_than_days": "of any age",
    "stages": "no stages of your own",
}
TEXT = {  # text of any kind; other texts are choices
    *("question", "keep", "bench.name", "name", "runs", "baseline", "report.measure", "output", "stages"),
    *("path", "uri", "url", "model", "weights", "embedder", "kv_path", "bench.index", "bench.questions"),
    *("dataset.split", "dataset.id", "dataset.questions", "dataset.documents", "documents"),
    *("system", "user", "passage", "separator", "separators", "abstain_answer", "finished", "prompt", "stop"),
    *("query_prompt", "document_prompt", "pattern", "stemmer", "stop_words", "adapter"),
    *("more", "against", "licences", "trackers"),
    *("measure", "measures", "span_measures"),  # their grammar is checked by those who know it
}
LIST_TOO = {"stop_words", "runs"}  # beside a word
CHOICE = {"ablation.measure", "generate.output"}  # although others of their name are text
EMPTY = {  # text
    "system": "no system message",
    **dict.fromkeys(("user", "passage", "reranker.prompt"), "a template, which says what it lacks"),
    "separator": "nothing in between",
    "abstain_answer": "nothing is said",
    **dict.fromkeys(("query_prompt", "document_prompt"), "nothing before the text"),
}
EMPTY_LIST = {
    *("stop", "separators", "stop_words", "depths", "conditions", "likelihood", "measures", "span_measures"),
    *("documents", "bench.speculative", "bench.prompt_tokens", "bench.contexts"),
    *("bench.tokens", "bench.vectors", "bench.chunks"),  # of bench=growth: not measured
    *("sensitivity.tokens_per_batch", "search_batches", "vector_dtypes", "answer_batches", "answer_dtypes"),
    *("fusion.weights", "fusion.lower_bounds", "more", "against", "licences", "trackers"),
}
OF_NULL = {  # what a setting is that is null
    **dict.fromkeys(("keep", "name", "question", "baseline", "measure", "output", "path"), "text"),
    **dict.fromkeys(("bench.index", "bench.questions", "stemmer", "kv_path"), "text"),
    **dict.fromkeys(("query_prompt", "document_prompt", "adapter"), "text"),
    **dict.fromkeys(("max_length", "limit", "passage_tokens", "sensitivity.questions"), 1),
    **dict.fromkeys(("context_length", "steps_per_dispatch"), 1),
    "bench.implementation": "flash",
    "kind": "vectors",
    "older_than_days": 30.0,
    "patience": 3,
    "stop_after_minutes": 30.0,
    "questions.passages": 100,
    **dict.fromkeys(("min_score", "score_threshold"), 0.5),
    "stop_words": ["text"],
    **{key: [0.5] for key in ("fusion.weights", "fusion.lower_bounds")},
}
OF_EMPTY_LIST = {"depths": 1, "conditions": "oracle"}  # others are of texts


def listed(key: str, table) -> bool:
    """Whether a table has the setting, by its last word, its last two, or its last three."""
    words = re.sub(r"int8.*\.", "", key).split(".")
    return any(".".join(words[-n:]) in table for n in (1, 2, 3))


def entry(key: str, table: dict) -> Any:
    words = key.split(".")
    return next(table[name] for n in (3, 2, 1) if (name := ".".join(words[-n:])) in table)


def wrong_for(key: str, value: object, optional: bool) -> Iterator[object]:
    """The values that must be refused where `value` is right."""
    if not optional and not listed(key, NULL):
        yield None
    yield {"a": 1}
    if isinstance(value, list):
        yield from (3, True, "[]")
        if not listed(key, EMPTY_LIST):
            yield []
        kind = value[0] if value else entry(key, OF_EMPTY_LIST) if listed(key, OF_EMPTY_LIST) else "text"
        yield from ([wrong] for wrong in wrong_for(key, kind, False) if wrong is not None)
        yield [value[0] if value else kind, None]
        return
    yield True if not isinstance(value, bool) else 1
    if not listed(key, LIST_TOO):
        yield from ([value], [])
    if isinstance(value, bool):
        yield from ("abc", "yes", "true", "", 0, 1.5, math.nan)
    elif isinstance(value, str):
        yield from (3, 1.5, math.nan) if not listed(key, {"min_score"}) else (math.nan,)
        if not listed(key, EMPTY):
            yield ""
        if not listed(key, TEXT) or listed(key, CHOICE) or (listed(key, LIST_TOO) and value == "english"):
            yield "abc"
    else:
        yield from ("abc", "", "3", math.nan, math.inf, -math.inf)
        if isinstance(value, int) and not listed(key, ONE_AND_A_HALF):
            yield from (1.5, 1.0)
        elif not listed(key, ONE_AND_A_HALF):
            yield 1.5
        if not listed(key, HUGE):
            yield from (10**40, -(10**40))
        if not listed(key, ZERO):
            yield 0
        if not listed(key, NEGATIVE):
            yield -1


def refused(config, key: str, schema) -> None:
    """Assert that the check of the configuration alone refuses the setting, in one sentence."""
    with pytest.raises(UserError) as error:
        check(config, schema)
    sentence = str(error.value)
    assert sentence.startswith(f"{key}=") and sentence.endswith("."), sentence
    assert "is not valid: it must be " in sentence
    assert len(sentence.splitlines()) == 1
    assert len(sentence) < 700


def walk(config, schema, name: str) -> int:
    """Try every wrong value of every setting in the part `name`, or of that one setting; return how many there are."""
    inside = isinstance(config[name], DictConfig) and schema is Part
    found = settings_of(config[name]) if inside else settings_of(config, schema)
    seen = {s.key: s for s in found if f"{s.key}.".startswith(f"{name}.")}
    for key, (_, value, hint) in seen.items():
        assert is_plain(hint), f"{key} declares no plain type, but {hint}"
        right = entry(key, OF_NULL) if value is None else value
        changed = config.copy()
        for wrong in wrong_for(key, right, value is None):
            OmegaConf.update(changed, key, wrong, merge=False)
            refused(changed[name] if inside else changed, key, schema)
    return len(seen)


# One script is enough for each choice of a group.
ONCE = {(group, choice): primary for primary, group, choice in CHOICES}


@pytest.mark.parametrize(("group", "choice"), sorted(ONCE))
def test_every_setting_of_a_choice_is_checked(group, choice):
    config = filled(composed(ONCE[group, choice], f"{group}={choice}"))
    settings = walk(config, Part, group)
    assert settings > 0 or choice in ("whole", "exact", "maxsim", "dense")  # which have no settings


@pytest.mark.parametrize("primary", PRIMARY)
def test_every_setting_of_a_script_is_checked(primary):
    config, schema = filled(composed(primary)), settings_class(primary)
    for key in set(config) - set(groups(primary)):
        part = isinstance(config[key], DictConfig) and "_target_" in config[key]
        assert walk(config, Part if part else schema, key) > 0


@pytest.mark.parametrize("primary", PRIMARY)
def test_only_optional_parts_may_be_null(primary):
    config, schema = filled(composed(primary)), settings_class(primary)
    may = {"transform", "reranker", "tuning"} | ({"analyzer"} if primary == "ingest" else set())
    parts = {key.rpartition(".")[0] for key in (s.key for s in settings_of(config, schema))} - {""} - may
    for key in parts:
        changed = config.copy()
        for wrong in (None, "abc", []):
            OmegaConf.update(changed, key, wrong, merge=False)
            refused(changed, key, schema)
        if "." not in key:
            del changed[key]
            with pytest.raises(UserError, match=rf"^{key}=null is not valid"):
                check(changed, schema)


def test_a_setting_without_a_declared_type_is_found():
    """What the walk relies on: without a type, or with one that is not plain, a value would pass."""
    config = OmegaConf.create({"_target_": f"{__name__}.Loose", "anything": 3})
    [setting] = settings_of(config)
    assert not is_plain(setting.hint)
    assert not is_plain(Any) and not is_plain(list) and not is_plain(dict[str, int])


class Loose:
    def __init__(self, anything): ...
