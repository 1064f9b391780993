"""Every file of conf/ composes, begins with a command to paste, and fits what its `_target_` takes."""

import re

import explain
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from launch import CONF
from omegaconf import DictConfig, OmegaConf
from settings import check

from rag.types import UserError
from tests.run_script import settings_class

PRIMARY = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "shared")


def filled(config: DictConfig) -> DictConfig:
    """Fill in the settings that a person must give, and return the configuration."""
    OmegaConf.set_struct(config, False)
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, "somewhere")
    return config


def checked(config: DictConfig, primary: str) -> None:
    """Check a whole configuration as its script does."""
    check(filled(config), settings_class(primary))


def groups(primary: str) -> list[str]:
    """The groups whose choices are stages; a method is made of other groups' choices (test_a_method_...)."""
    defaults = OmegaConf.load(CONF / f"{primary}.yaml").defaults
    names = [key for entry in defaults if OmegaConf.is_dict(entry) for key in entry]
    return [name for name in names if "@" not in name and name != "method"]


CHOICES = [
    (primary, group, path.stem)
    for primary in PRIMARY
    for group in groups(primary)
    for path in sorted((CONF / group).glob("*.yaml"))
]


def composed(primary: str, *overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(primary, list(overrides))


def test_there_is_something_to_check():
    assert {"ingest", "generate", "eval", "bench"} <= set(PRIMARY)
    assert {group for _, group, _ in CHOICES} >= {
        "embedder",
        "chunker",
        "retriever",
        "generator",
        "sampling",
        "bench",
    }


@pytest.mark.parametrize("primary", PRIMARY)
def test_a_script_takes_the_shared_settings_and_fits_its_targets(primary):
    config = composed(primary)
    assert config.device == "auto"
    assert config.profile is False
    checked(config, primary)


@pytest.mark.parametrize(("primary", "group", "choice"), CHOICES)
def test_a_choice_fits_its_target(primary, group, choice):
    config = composed(primary, f"{group}={choice}")
    assert "_target_" in config[group]
    checked(config, primary)


@pytest.mark.parametrize("method", sorted(path.stem for path in (CONF / "method").glob("*.yaml")))
def test_a_method_is_a_whole_evaluation(method):
    config = composed("eval", f"method={method}", "dataset.path=x")
    checked(config, "eval")
    assert f"method={method}\n" in (CONF / "method" / f"{method}.yaml").read_text()
    assert method == "dense" or config != composed("eval", "dataset.path=x")


@pytest.mark.parametrize(
    ("primary", "overrides", "wanted"),
    [
        (
            "bench",
            ["bench=search", "bench.k=10"],
            r"k=10 .* a list that is not empty, as in bench\.k=\[10,100\]",
        ),
        ("bench", ["bench=search", "bench.queries=null"], r"as in bench\.queries=\[10,100\]"),
        ("bench", ["bench=attention", "bench.head_dims=many"], r"as in bench\.head_dims="),
        ("bench", ["bench=attention", "bench.tokens=[512,x]"], r"as in bench\.tokens="),
        ("ingest", ["embedder=bag_of_words", "+embedder.vocabulary=word"], r"embedder\.vocabulary=\[a,b\]"),
        ("generate", ["context.min_score=high"], r"min_score=high .* a number, auto or null\."),
        (
            "generate",
            ["generator.steps_per_dispatch=few"],
            r"steps_per_dispatch=few .* 2147483647 or null\.",
        ),
    ],
)
def test_a_value_of_another_type_is_an_error_that_names_it(primary, overrides, wanted):
    group = overrides[-1].lstrip("+").partition(".")[0]
    with pytest.raises(UserError, match=wanted):
        check(composed(primary, *overrides)[group])


@pytest.mark.parametrize("override", ["bench.k=[5]", "bench.index=folder"])
def test_a_value_that_fits_passes(override):
    check(composed("bench", "bench=search", override).bench)


@pytest.mark.parametrize("score", ["auto", "null", "1", "0.5"])
def test_a_choice_of_types_takes_each(score):
    check(composed("generate", f"context.min_score={score}").context)


def test_a_number_of_questions_is_answered_with_the_setting_that_takes_it():
    config = composed("bench", "bench=quality", "bench.questions=20")
    sentence = (
        "The setting 'bench.questions' is called 'bench.questions.limit' now: write bench.questions.limit=20"
    )
    with pytest.raises(UserError, match=sentence):
        explain.check_divided(config)
    explain.check_divided(composed("bench", "bench=quality", "bench.questions.limit=20"))


def test_a_group_of_another_name_is_answered_with_the_nearest():
    with pytest.raises(HydraException) as error:
        composed("bench", "bench=quality", "prompt@bench.prompt=short")
    sentence = explain.explain(error.value, "bench", CONF)
    assert (
        sentence == "There is no group 'prompt@bench.prompt': did you mean 'prompt@bench.questions.prompt'?"
    )


def test_benchmarks_take_the_default_weights():
    assert composed("bench", "bench=generate").bench.weights == composed("generate").generator.weights
    assert composed("bench", "bench=embed").bench.weights == composed("ingest").embedder.uri


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.relative_to(CONF).as_posix()
)
def test_a_file_begins_with_a_command(path):
    head = re.match(r"(#.*\n)+", path.read_text())
    assert head, "the first line is no comment"
    assert "python scripts/" in head[0]
