"""A wrong value is answered by one sentence that names the setting and what it takes."""

import math
from dataclasses import dataclass

import pytest
from launch import quote_overrides
from omegaconf import OmegaConf
from settings import Part, build, check

from rag.runtime.options import Count, Filled, Share, check_fields, checked, convert
from rag.types import UserError
from tests.run_script import settings_class
from tests.scripts.test_configs import composed, filled


def test_a_name_that_is_not_utf_8_has_a_sentence_of_its_own():
    """Linux gives such bytes of a command line to Python as surrogates."""
    with pytest.raises(UserError, match=r"^index.path='bad\\udcff' has bytes that are not UTF-8: give it"):
        convert("index.path", "bad\udcff", Filled)


@pytest.mark.parametrize(
    ("primary", "override", "sentence"),
    [
        ("generate", "k=abc", "k=abc is not valid: it must be a whole number from 1 to 2147483647."),
        ("generate", 'k="3"', 'k="3" is not valid: it must be a whole number'),
        (
            "generate",
            "context.min_score=nan",
            "context.min_score=nan is not valid: it must be a number, auto or null.",
        ),
        (
            "generate",
            "question=",
            'question="" is not valid: it must be a question that is not empty; leave it out',
        ),
        ("generate", "output=xml", "output=xml is not valid: it must be text or json."),
        ("generate", "index.path=null", "index.path=null is not valid: it must be text that is not empty."),
        ("generate", "retriever.fusion=rrf", None),  # dense has none
        (
            "eval",
            "dataset.split=2020",
            "it must be text that is not empty; as text write dataset.split='\"2020\"'.",
        ),
        (
            "bench",
            "bench.k=10",
            "it must be a list that is not empty, as in bench.k=[10,100], of which each is",
        ),
        ("bench", "bench.settings.int8.dtype=int3", "must be auto, float32, bfloat16 or int8."),
        ("bench", "+bench.settings.int8.nothing=1", "There is no setting 'bench.settings.int8.nothing': "),
        ("generate", "+qestion2=x", "There is no setting 'qestion2': did you mean question?"),
        ("generate", "+prompt.usr=x", "There is no setting 'prompt.usr': did you mean prompt.user?"),
        (
            "ingest",
            "embedder._target_=rag.embed.bert.Nope",
            "embedder._target_=rag.embed.bert.Nope is nothing that can be built",
        ),
        ("generate", "embedder=null", "must be one of bag_of_words, bert, minilm."),
        ("generate", "answer=null", "answer=null is not valid: it must be settings with a _target_."),
        ("ingest", "index=3", "index=3 is not valid: it must be settings: index.path, index.add."),
    ],
)
def test_a_sentence_names_the_setting_and_what_it_takes(primary, override, sentence):
    extra = {"bench.k": ["bench=search"], "bench.s": ["bench=quality"], "+bench.": ["bench=quality"]}
    choice = next((chosen for start, chosen in extra.items() if override.startswith(start)), [])
    if sentence is None:
        with pytest.raises(Exception, match="fusion"):
            composed(primary, *choice, *quote_overrides([override]))
        return
    config = filled(composed(primary, *choice, *quote_overrides([override])))
    with pytest.raises(UserError) as error:
        check(config, settings_class(primary))
    assert sentence in str(error.value)


@pytest.mark.parametrize("overrides", [["analyzer=null"], ["embedder=bert", "embedder.query_prompt=null"]])
def test_null_is_a_valid_value_of_these_settings(overrides):
    config = filled(composed("ingest", *quote_overrides(overrides)))
    check(config, settings_class("ingest"))
    assert config.get("analyzer") is None or config.embedder.query_prompt is None


@pytest.mark.parametrize(
    "override",
    ["reranker=null", "transform=null", "fusion.weights=[1,2]", "generator.weights=weights", "k=3"],
)
def test_these_values_are_accepted(override):
    config = filled(composed("generate", *quote_overrides([override])))
    check(config, settings_class("generate"))


@dataclass(frozen=True)
class Options:
    size: Count = 3
    share: Share = 0.5
    parts: tuple[int, ...] | None = None
    inner: object = None

    def __post_init__(self):
        check_fields(self)


def test_options_check_themselves():
    options = Options(size=4, share=1)
    assert options == Options(4, 1.0) and type(options.share) is float
    for wrong in ({"size": 0}, {"size": True}, {"share": 1.5}, {"share": math.nan}, {"parts": ["x"]}):
        with pytest.raises(UserError, match=rf"^Options\.{next(iter(wrong))}=.* is not valid: it must be "):
            Options(**wrong)


def test_a_function_checks_its_arguments():
    @checked
    def take(size: Count, share: Share = 0.5, *, other: object = None) -> tuple:
        """Return the arguments."""
        return size, share, other

    assert take(1, 1) == (1, 1.0, None) and type(take(1, 1)[1]) is float
    assert take.__doc__ == "Return the arguments."
    marker = object()
    assert take(size=2, other=marker)[2] is marker
    for wrong in ((0,), ("1",), (1, 2)):
        with pytest.raises(UserError, match="is not valid"):
            take(*wrong)
    with pytest.raises(TypeError):
        take()


def test_build_checks_before_it_builds():
    with pytest.raises(UserError, match="size=0 is not valid"):
        build(OmegaConf.create({"_target_": f"{__name__}.Options", "size": 0}))
    assert build(OmegaConf.create({"_target_": f"{__name__}.Options", "size": 2}), share=1) == Options(2, 1.0)
    with pytest.raises(UserError, match="must be settings with a _target_"):
        check(OmegaConf.create({"part": 3}), Holder)


@dataclass
class Holder:
    part: Part
