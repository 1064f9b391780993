"""Every value of every configuration is checked: wrong types and values outside their range are one sentence each.

The tables below say, independently of the declarations, what a person may mean by a value that is odd at first sight.
A setting that nothing declares, or that takes just any value, fails here.
"""

import importlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from launch import CONF, quote_overrides
from omegaconf import DictConfig, OmegaConf
from settings import Part, build, check, settings_of

from rag.runtime.options import Count, Filled, Share, check_fields, checked, convert, is_plain
from rag.types import UserError
from tests.run_script import settings_class
from tests.scripts.test_configs import CHOICES, PRIMARY

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
    "kind": "all kinds",
    "older_than_days": "of any age",
}
TEXT = {  # text of any kind; other texts are choices
    *("question", "keep", "bench.name", "name", "runs", "baseline", "report.measure", "output"),
    *("path", "uri", "url", "model", "weights", "embedder", "kv_path", "bench.index", "bench.questions"),
    *("dataset.split", "dataset.id", "dataset.questions", "dataset.documents", "documents"),
    *("system", "user", "passage", "separator", "separators", "abstain_answer", "finished", "prompt", "stop"),
    *("query_prompt", "document_prompt", "pattern", "stemmer", "stop_words"),
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
    *("fusion.weights", "fusion.lower_bounds"),
}
OF_NULL = {  # what a setting is that is null
    **dict.fromkeys(("keep", "name", "question", "baseline", "measure", "output", "path"), "text"),
    **dict.fromkeys(("bench.index", "bench.questions", "stemmer", "kv_path"), "text"),
    **dict.fromkeys(("query_prompt", "document_prompt"), "text"),
    **dict.fromkeys(("max_length", "limit", "passage_tokens", "sensitivity.questions"), 1),
    **dict.fromkeys(("context_length", "steps_per_dispatch"), 1),
    "bench.implementation": "flash",
    "kind": "vectors",
    "older_than_days": 30.0,
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


def composed(primary: str, *overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(primary, list(overrides))
    OmegaConf.set_struct(config, False)
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, "somewhere")
    return config


def refused(config, key: str, schema) -> None:
    """Assert that the check of the configuration alone refuses the setting, in one sentence."""
    with pytest.raises(UserError) as told:
        check(config, schema)
    sentence = str(told.value)
    assert sentence.startswith(f"{key}=") and sentence.endswith("."), sentence
    assert "will not do: it must be " in sentence
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
    config = composed(ONCE[group, choice], f"{group}={choice}")
    settings = walk(config, Part, group)
    assert settings > 0 or choice in (
        "whole",
        "exact",
        "maxsim",
        "dense",
        "tfidf",
    )  # these have none of their own


@pytest.mark.parametrize("primary", PRIMARY)
def test_every_setting_of_a_script_is_checked(primary):
    config, schema = composed(primary), settings_class(primary)
    for key in set(config) - {group for _, group, _ in CHOICES}:
        part = isinstance(config[key], DictConfig) and "_target_" in config[key]
        assert walk(config, Part if part else schema, key) > 0


@pytest.mark.parametrize("primary", PRIMARY)
def test_no_part_is_null_but_those_that_may(primary):
    config, schema = composed(primary), settings_class(primary)
    may = {"transform", "reranker", "tuning"} | ({"analyzer"} if primary == "ingest" else set())
    parts = {key.rpartition(".")[0] for key in (s.key for s in settings_of(config, schema))} - {""} - may
    for key in parts:
        changed = config.copy()
        for wrong in (None, "abc", []):
            OmegaConf.update(changed, key, wrong, merge=False)
            refused(changed, key, schema)
        if "." not in key:
            del changed[key]
            with pytest.raises(UserError, match=rf"^{key}=null will not do"):
                check(changed, schema)


def test_a_name_that_is_not_utf_8_is_told_as_that():
    """Linux gives such bytes of a command line to Python as surrogates."""
    with pytest.raises(UserError, match=r"^index.path='bad\\udcff' has bytes that are not UTF-8: give it"):
        convert("index.path", "bad\udcff", Filled)


def test_a_setting_that_declares_nothing_is_found():
    """What the walk relies on: without a type, or with one that is not plain, a value would pass."""
    config = OmegaConf.create({"_target_": f"{__name__}.Loose", "anything": 3})
    [setting] = settings_of(config)
    assert not is_plain(setting.hint)
    assert not is_plain(Any) and not is_plain(list) and not is_plain(dict[str, int])


class Loose:
    def __init__(self, anything): ...


@pytest.mark.parametrize(
    ("primary", "override", "sentence"),
    [
        ("generate", "k=abc", "k=abc will not do: it must be a whole number from 1 to 2147483647."),
        ("generate", 'k="3"', 'k="3" will not do: it must be a whole number'),
        (
            "generate",
            "context.min_score=nan",
            "context.min_score=nan will not do: it must be a number, auto or null.",
        ),
        (
            "generate",
            "question=",
            'question="" will not do: it must be a question that is not empty; leave it out',
        ),
        ("generate", "output=xml", "output=xml will not do: it must be text or json."),
        ("generate", "index.path=null", "index.path=null will not do: it must be text that is not empty."),
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
        ("generate", "answer=null", "answer=null will not do: it must be settings with a _target_."),
        ("ingest", "index=3", "index=3 will not do: it must be settings: index.path, index.add."),
    ],
)
def test_a_sentence_names_the_setting_and_what_it_takes(primary, override, sentence):
    extra = {"bench.k": ["bench=search"], "bench.s": ["bench=quality"], "+bench.": ["bench=quality"]}
    choice = next((chosen for start, chosen in extra.items() if override.startswith(start)), [])
    if sentence is None:
        with pytest.raises(Exception, match="fusion"):
            composed(primary, *choice, *quote_overrides([override]))
        return
    config = composed(primary, *choice, *quote_overrides([override]))
    with pytest.raises(UserError) as told:
        check(config, settings_class(primary))
    assert sentence in str(told.value)


@pytest.mark.parametrize("overrides", [["analyzer=null"], ["embedder=bert", "embedder.query_prompt=null"]])
def test_null_may_mean_something_in_ingest(overrides):
    config = composed("ingest", *quote_overrides(overrides))
    check(config, settings_class("ingest"))
    assert config.get("analyzer") is None or config.embedder.query_prompt is None


@pytest.mark.parametrize(
    "override",
    ["reranker=null", "transform=null", "fusion.weights=[1,2]", "generator.weights=weights", "k=3"],
)
def test_what_a_person_may_mean_passes(override):
    config = composed("generate", *quote_overrides([override]))
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
        with pytest.raises(UserError, match=rf"^Options\.{next(iter(wrong))}=.* will not do: it must be "):
            Options(**wrong)


def test_a_function_checks_its_arguments():
    @checked
    def take(size: Count, share: Share = 0.5, *, other: object = None) -> tuple:
        """Return what came."""
        return size, share, other

    assert take(1, 1) == (1, 1.0, None) and type(take(1, 1)[1]) is float
    assert take.__doc__ == "Return what came."
    marker = object()
    assert take(size=2, other=marker)[2] is marker
    for wrong in ((0,), ("1",), (1, 2)):
        with pytest.raises(UserError, match="will not do"):
            take(*wrong)
    with pytest.raises(TypeError):
        take()


def test_build_checks_before_it_makes():
    with pytest.raises(UserError, match="size=0 will not do"):
        build(OmegaConf.create({"_target_": f"{__name__}.Options", "size": 0}))
    assert build(OmegaConf.create({"_target_": f"{__name__}.Options", "size": 2}), share=1) == Options(2, 1.0)
    with pytest.raises(UserError, match="must be settings with a _target_"):
        check(OmegaConf.create({"part": 3}), Holder)


@dataclass
class Holder:
    part: Part


# --- stages of a user's own: what their annotations say is checked, what they do not say is not

USERS = """
from __future__ import annotations
import collections.abc, decimal, enum, typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Optional, Protocol, TypeVar
from rag.embed import Embedder
from rag.runtime.options import check_fields
from tests.scripts.test_settings import Options
if TYPE_CHECKING:
    from numpy import ndarray

T = TypeVar("T")
class Colour(enum.Enum):
    RED = "red"
class Sizes(typing.TypedDict):
    a: int
class Own: ...
class Looks(Protocol):
    def look(self, at): ...
class Stage:
    def __init__(self, {declared}, **others: Any): self.x, self.others = x, others
class Pair:
    def __init__(self, first: int, second: float, third: str = ""): self.all = first, second, third
@dataclass(frozen=True)
class More(Options):
    w: ndarray | None = None
    def __post_init__(self): check_fields(self)
"""


@pytest.fixture
def users(tmp_path, monkeypatch, request):
    """Write a user's module whose Stage declares x in the given way; return its name."""

    def write(declared: str = "x=None", text: str = USERS) -> str:
        name = f"users_{abs(hash((request.node.name, declared)))}"
        (tmp_path / f"{name}.py").write_text(text.replace("{declared}", declared))
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return write


def stage(name: str, **values: object):
    return build(OmegaConf.create({"p": {"_target_": f"{name}.Stage", **values}}).p)


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        *((f"x: {hint}", {"a": 1}) for hint in ("dict[str, float]", "dict", "typing.Dict[str, int]", "typing.Dict")),
        *((f"x: {hint}", {"a": 1}) for hint in ("Mapping", "Mapping[str, Any]", "Sizes", "dict[str, float] | None")),
        *((f"x: {hint}", {"a": 1}) for hint in ("Any", "object", "T", "str | dict[str, Any]", "dict[str, T]")),
        *((f"x: {hint}", ["a", "b"]) for hint in ("list", "set[str] | None", "Iterable[str]", "typing.List", "tuple")),
        *((f"x: {hint}", ["a", "b"]) for hint in ("tuple[str, ...]", "tuple[str, str]", "frozenset[str]", "Sequence")),
        *((f"x: {hint}", ["a", "b"]) for hint in ("list[Any]", "collections.abc.Collection[str]", "Any", "object")),
        ("x: tuple[float, float]", [0.1, 0.2]),
        ("x: tuple[float, str]", [1, "a"]),
        ("x: list[tuple[int, float]] | None", [[1, 0.5]]),
        ("x: dict[str, tuple[int, int]]", {"a": [1, 2]}),
        ("x: tuple[T, int]", ["a", 1]),
        *((declared, value) for declared in ("x", "x=None", "x: Any", "x: 'no type'", "x: Gone | None")
          for value in (3, "a", [1], {"a": 1}, None)),
        *((f"x: {hint}", 3) for hint in ("Any", "object", "T", "Own | int", "decimal.Decimal", "complex")),
        *((f"x: {hint}", "red") for hint in ("Colour", "Iterable", "Annotated[Any, 'colour']", "bytes")),
        ("x: int = None", None),
        ("x: Own = None", None),
        ("x: ndarray = None", None),
        ("x: ndarray = None", [1, 2]),
        ("x: Optional[Own]", None),
    ],
)  # fmt: skip
def test_what_a_users_stage_declares_passes(users, declared, value):
    assert stage(users(declared), x=value).x == value
    config = OmegaConf.create({"p": {"f": {"_target_": f"{users(declared)}.Stage", "x": value, "more": 3}}})
    check(config.p.f)
    assert build(config.p.f).others == {"more": 3}


@pytest.mark.parametrize(
    ("hint", "value", "asked"),
    [
        ("Own", 3, "settings with a _target_"),
        ("Own | None", "a", "settings with a _target_ or null"),
        ("Own | float", "a", "settings with a _target_ or a number"),
        ("Looks", [1], "settings with a _target_"),
        ("Embedder", {"a": 1}, "settings with a _target_"),
        ("Own", None, "settings with a _target_"),
        ("Callable[[int], int]", 3, "settings with a _target_"),
        ("list[Own]", [3], "a list of which each is settings with a _target_"),
        ("dict[str, Any]", 3, "settings"),
        ("dict", [1], "settings"),
        ("set[str]", 3, "a list of which each is text"),
        ("set[str]", [3], "a list of which each is text"),
        ("tuple[float, float]", [1], "a list of 2: a number, a number"),
        ("tuple[float, float]", [1, "2"], "a list of 2: a number, a number"),
        ("tuple[int, ...]", [1.5], "a list, as in x=[10,100], of which each is a whole number"),
    ],
)
def test_what_a_users_stage_does_not_mean_is_refused(users, hint, value, asked):
    with pytest.raises(UserError) as told:
        stage(users(f"x: {hint}"), x=value)
    assert str(told.value).replace("p.x", "x").endswith(f" will not do: it must be {asked}.")


def test_entries_of_a_users_mapping_are_checked(users):
    with pytest.raises(UserError, match=r"^p\.x\.a=b will not do: it must be a number\.$"):
        stage(users("x: dict[str, float]"), x={"a": "b"})


@pytest.mark.parametrize("hint", ["list", "Sequence[Own]", "list[Looks] | None", "tuple[Own, ...]", "Any"])
def test_a_list_of_parts_is_built_and_what_is_in_it_checked(users, hint):
    name = users(f"x: {hint}")
    part = {"_target_": f"{__name__}.Options", "size": 4}
    assert stage(name, x=[part, part]).x == [Options(4)] * 2
    with pytest.raises(UserError, match=r"^p\.x\[1\]\.size=0 will not do"):
        stage(name, x=[part, part | {"size": 0}])
    with pytest.raises(UserError, match=r"no setting 'p\.x\[0\]\.sise'"):
        stage(name, x=[part | {"sise": 1}])


def test_what_is_written_in_c_takes_anything(users):
    array = {"_target_": "numpy.array", "object": [1, 2]}
    assert stage(users("x: ndarray"), x=array).x.tolist() == [1, 2]


def test_a_subclass_of_options_checks_what_can_be_evaluated(users):
    more = importlib.import_module(users()).More
    assert more(size=2, w=[1]).w == [1]
    with pytest.raises(UserError, match=r"^More\.size=0 will not do"):
        more(size=0)


def test_arguments_by_place_and_half_given_ones_are_not_asked_for(users):
    name = users()
    pair = {"_target_": f"{name}.Pair"}
    assert stage(name, x=pair | {"_partial_": True}).x(1, 2.0).all == (1, 2.0, "")
    assert stage(name, x=pair | {"_partial_": True, "second": 2}).x(1).all == (1, 2, "")
    assert stage(name, x=pair | {"_args_": [1, 2.0]}).x.all == (1, 2.0, "")
    assert stage(name, x=pair | {"_args_": [1], "second": 2.0, "third": "c"}).x.all == (1, 2.0, "c")
    made = build(OmegaConf.create({"p": pair | {"_partial_": True}}).p, first=1)
    assert made(second=3).all == (1, 3, "")
    for wrong, told in [
        ({"_args_": [1]}, r"p\.x\.second=null will not do"),
        ({"_args_": [1], "first": 1, "second": 2}, r"no setting 'p\.x\.first'"),
        ({"_args_": 3}, r"p\.x\._args_=3 will not do: it must be a list"),
        ({"_partial_": "yes"}, r"p\.x\._partial_=yes will not do: it must be true or false"),
        ({"_partial_": True, "first": "a"}, r"p\.x\.first=a will not do"),
        ({"_partial_": True, "_args_": [{"_target_": f"{__name__}.Options", "size": 0}]},
         r"p\.x\._args_\[0\]\.size=0 will not do"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=told):
            stage(name, x=pair | wrong)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ("\ndef Stage(:", r"SyntaxError in .*{name}\.py, line 2: "),
        ("\n\nclass Stage: x = 1 / 0", r"ZeroDivisionError in .*{name}\.py, line 3: division by zero"),
        ("\nraise RuntimeError('two\\nlines.')", r"RuntimeError in .*{name}\.py, line 2: two lines\)"),
        ("import nowhere_at_all", r"ModuleNotFoundError in .*{name}\.py, line 1: No module named"),
        ("def stage(): ...", r"\(module '{name}' has no attribute 'Stage'\)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_sentence(users, lines, error):
    name = users(lines, "{declared}")
    with pytest.raises(UserError, match=error.replace("{name}", name)) as told:
        stage(name)
    assert str(told.value).startswith(f"p._target_={name}.Stage is nothing that can be built (")
    assert len(str(told.value).splitlines()) == 1
