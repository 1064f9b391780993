"""A default stands in conf/, or in a class and in conf/ with the same value, but for the differences listed here.

Options that only scripts build (tuning, numerical sensitivity, benchmarks) have no defaults in their classes. What
people build from Python too has them, and conf/ repeats them, so that `--cfg job` lists every setting.
"""

from collections.abc import Iterator

import pytest
from omegaconf import DictConfig, ListConfig, OmegaConf
from settings import target_of

from rag.runtime.options import parameters_of
from tests.scripts.test_configs import CHOICES, PRIMARY, composed, filled, groups

# The settings whose value in conf/ is meant to differ from the default of the class.
DIFFERENT = {
    "analyzer=cjk": {"cjk", "stop_words"},
    "analyzer=english": {"stemmer"},
    "analyzer=plain": {"stop_words"},
    "chunker=fixed": {"overlap"},
    "chunker=recursive": {"overlap"},
    "chunker=semantic": {"percentile"},
    "chunker=sentence": {"overlap"},
    # from Python no threshold is applied unless one is given
    "context=document": {"min_score", "order"},
    "context=neighbours": {"min_score", "order", "expand"},
    "context=parent": {"min_score", "order", "expand", "expand_tokens"},
    "context=reverse": {"min_score", "order"},
    "context=score": {"min_score"},
    "context=sides": {"min_score", "order"},
    "dataset=synthetic": {"embedder.score_threshold", "generator.adapter"},
    "embedder=bag_of_words": {"score_threshold"},
    "embedder=bert": {"uri"},
    "embedder=minilm": {"score_threshold"},
    "fusion=dbsf": {"normalizer"},
    "fusion=theoretical_min_max": {"normalizer"},
    "fusion=z_score": {"normalizer"},
    "generator=base": {"adapter"},
    "prompt=cited": {"system"},
    "prompt=closed_book": {"system", "user", "passage", "abstain_answer"},
    "prompt=few_shot": {"system", "user", "passage"},
    "prompt=plain": {"system", "passage"},
    "prompt=seed": {"user", "passage", "separator"},
    "prompt=short": {"system", "user", "passage"},
    "retriever=iterative": {"passage", "stop", "max_new_tokens"},
    "sampling=min_p": {"temperature", "min_p"},
    "sampling=temperature": {"temperature"},
    "sampling=top_k": {"temperature", "top_k"},
    "sampling=top_p": {"temperature", "top_p"},
    "task=reader": {
        f"options.styles.{prompt}.template.{text}"
        for prompt, texts in {
            "short": ("system", "user", "passage"),
            "cited": ("system",),
            "plain": ("system", "passage"),
        }.items()
        for text in texts
    },
    "transform=multi_query": {"max_new_tokens"},
    "transform=rewrite": {"max_new_tokens", "stop"},
    # the gold answers of an evaluation are short
    "eval": {"answer.max_new_tokens", "answer.stop"},
    "sensitivity": {"answer.max_new_tokens", "answer.stop"},
}
NOT_LISTED = {"embedder.vocabulary"}  # a bag of words takes it from the corpus
# Choices of each group once, with the script that they are composed for; benchmarks have no defaults in classes.
CHOSEN = {f"{group}={choice}": (primary, group) for primary, group, choice in CHOICES if group != "bench"}


def parts_of(config: DictConfig) -> Iterator[DictConfig]:
    """Yield the parts in a mapping, itself included where it is one; not those that it refers to."""
    if "_target_" in config:
        yield config
    for key, value in config.items():
        if isinstance(value, DictConfig) and not OmegaConf.is_interpolation(config, key):
            yield from parts_of(value)


def plain(value: object) -> object:
    """Return a value with tuples for lists: YAML has no tuples."""
    if isinstance(value, list | tuple | ListConfig):
        return tuple(plain(item) for item in value)
    return value


def different(config: DictConfig, name: str) -> set[str]:
    """Return the settings of the parts in `config`, without their first word `name`, that differ from their class."""
    found = set()
    for part in parts_of(config):
        for key, parameter in parameters_of(target_of(part)).items():
            if parameter.default is parameter.empty or isinstance(part.get(key), DictConfig):
                continue
            full_key = part._get_full_key(key)
            assert key in part or full_key in NOT_LISTED, f"conf/ does not list {full_key}"
            if key in part and plain(part[key]) != plain(parameter.default):
                found.add(full_key.removeprefix(f"{name}."))
    return found


@pytest.mark.parametrize("choice", CHOSEN)
def test_a_choice_differs_from_its_class_only_where_it_is_meant_to(choice):
    primary, group = CHOSEN[choice]
    config = filled(composed(primary, choice))
    assert different(config[group], group) == DIFFERENT.get(choice, set())


@pytest.mark.parametrize("primary", PRIMARY)
def test_a_script_differs_from_the_classes_of_its_parts_only_where_it_is_meant_to(primary):
    config = filled(composed(primary))
    own = [key for key in config if key not in groups(primary) and not key.startswith("closed_book")]
    found = set().union(*(different(config[key], "") for key in own if isinstance(config[key], DictConfig)))
    assert found == DIFFERENT.get(primary, set())


def test_every_listed_difference_is_of_a_choice_that_exists():
    assert DIFFERENT.keys() <= CHOSEN.keys() | set(PRIMARY)
