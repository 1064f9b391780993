"""Free text of a command line arrives as typed, through the grammars of Hydra and OmegaConf."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra_plugins.patient_sweeper import combinations
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from quoting import quote, quote_overrides

from tests.scripts.launch_settings import SPECIAL

# Characters that mean something to one of the grammars, often side by side.
TEXT = st.text(st.sampled_from("\\\\\\'\"${}$ab?,=[]() \n:\U0001f916")) | st.text(
    st.characters(exclude_characters="\0")
)


def through_hydra(text: str) -> object:
    """What a config holds after an override with the quoted text: Hydra's parser, OmegaConf's resolution."""
    override = OverridesParser.create().parse_override(f"question={quote(text)}")
    config = OmegaConf.create({"question": None, "overrides": [override.input_line]})  # Hydra keeps them too
    OmegaConf.update(config, "question", override.value(), merge=True)
    assert not OmegaConf.is_missing(config, "question")
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)["question"]


@pytest.mark.parametrize("text", SPECIAL)
def test_special_text_arrives_as_typed(text):
    assert through_hydra(text) == text


@given(TEXT)
def test_any_text_arrives_as_typed(text):
    assert through_hydra(text) == text


@given(TEXT)
def test_a_sweep_passes_text_on_as_it_is(text):
    """The sweeper writes each job's overrides anew; a comma in the text must not split it."""
    override = OverridesParser.create().parse_override(f"question={quote(text)}")
    assert not override.is_sweep_override()
    [[job]] = combinations([override])
    assert OverridesParser.create().parse_override(job).value() == override.value()


def test_only_free_text_is_quoted():
    others = [
        "stage=large", "n=1,2", "chunker.size=128", "questions=[a,b]", "~question", "-m",
        "--cfg", "job", "pathx=1", "model=a,b",
    ]  # fmt: skip
    assert quote_overrides(others) == others
    assert quote_overrides(["question=a, b"]) == ["question='a, b'"]
    assert quote_overrides(["++question=x y", "+index.path=a=b"]) == ["++question='x y'", "+index.path='a=b'"]
    assert quote_overrides(["note=a b"], free_text=("note",)) == ["note='a b'"]


def test_a_sweep_over_paths_is_written_as_a_choice():
    assert quote_overrides(["-m", "index.path=choice(a,b)"]) == ["-m", "index.path=choice(a,b)"]
    assert quote_overrides(["index.path=choice(a,b)"]) == ["index.path='choice(a,b)'"]
    assert quote_overrides(["-m", "index.path=a,b"]) == ["-m", "index.path='a,b'"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r'["\n\n"]', ["\n\n"]),  # in single quotes in a shell ...
        (r"[\n\n]", ["\n\n"]),  # ... and without any, which takes the double ones away
        (r"['\n',aaa, b]", ["\n", "aaa", "b"]),
        (r'["\\n"]', [r"\n"]),  # a backslash is two
        (r'["\\"]', ["\\"]),
        (r'["a\"b\tc"]', ['a"b\tc']),
        (r'["\d"]', [r"\d"]),
        ('["\n"]', ["\n"]),
        ("[]", []),
        (r'["a, b","[x]\n"]', ["a, b", "[x]\n"]),
        ("null", None),
    ],
)
@pytest.mark.parametrize("key", ["answer.stop", "bench.stop", "transform.stop", "chunker.separators"])
def test_escapes_in_lists_of_texts_mean_what_they_mean_in_yaml(key, typed, meant):
    [override] = quote_overrides([f"{key}={typed}"])
    assert OverridesParser.create().parse_override(override).value() == meant


@pytest.mark.parametrize(
    "key", ["prompt.user", "prompt.separator", "retriever.system", "reranker.prompt", "embedder.query_prompt"]
)
def test_escapes_in_templates_mean_what_they_mean_in_yaml(key):
    def value(text):
        return OverridesParser.create().parse_override(quote_overrides([f"{key}={text}"])[0]).value()

    assert value(r"Passages:\n\n{context}, [a]\t\\n \d") == "Passages:\n\n{context}, [a]\t\\n \\d"
    assert value("null") is None
    assert value("'null'") == "'null'"


@given(st.lists(TEXT))
def test_every_list_of_texts_can_be_typed(texts):
    """As YAML writes it: a backslash and the quotation mark behind a backslash, a line break as one."""
    escaped = [text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for text in texts]
    [override] = quote_overrides(["answer.stop=[" + ",".join(f'"{text}"' for text in escaped) + "]"])
    assert resolved(override) == texts


def resolved(override: str) -> object:
    """What becomes of a list in a configuration that has a k to lead to."""
    value = OverridesParser.create().parse_override(override).value()
    config = OmegaConf.create({"k": 3, "stop": ["x"], "answer": {"stop": value}})
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)["answer"]["stop"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ('["${k}"]', ["${k}"]),
        (r'["${k}\n"]', ["${k}\n"]),
        ("['${k}',b]", ["${k}", "b"]),
        ("[${k}]", ["${k}"]),
        (r"[${k}\n]", ["${k}\n"]),
        (r'["\\${k}"]', ["\\${k}"]),
        ('["???"]', ["???"]),
        ("[???]", ["???"]),
        ("${stop}", ["x"]),  # in place of a list
        ("[3,null,true]", [3, None, True]),  # are refused later
    ],
)
def test_texts_in_a_list_lead_nowhere_with_a_backslash_or_without(typed, meant):
    assert resolved(quote_overrides([f"answer.stop={typed}"])[0]) == meant


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("[nDCG@10,RBP(p=0.8)@10]", ["nDCG@10", "RBP(p=0.8)@10"]),
        ("[RBP(p=0.8), P(rel=2)@5 ,MAP]", ["RBP(p=0.8)", "P(rel=2)@5", "MAP"]),
        ("[BPM(T=1,max_rel=4)@10]", ["BPM(T=1,max_rel=4)@10"]),
        ("['RBP(p=0.8)',\"P(rel=2)@5\"]", ["RBP(p=0.8)", "P(rel=2)@5"]),
        ("[nDCG@10,MRR@10]", ["nDCG@10", "MRR@10"]),
    ],
)
def test_measures_with_parameters_need_no_quotation_marks(typed, meant):
    [override] = quote_overrides([f"evaluation.measures={typed}"])
    assert OverridesParser.create().parse_override(override).value() == meant
    parsed = OverridesParser.create().parse_overrides(
        quote_overrides([f"evaluation.measures={typed},[MAP]", "-m"])[:1]
    )
    assert len(combinations(parsed)) == 2


def test_a_sweep_over_lists_of_texts_keeps_its_commas():
    sweep = quote_overrides(["-m", r'answer.stop=["\n"],[a,"\t"]'])
    parsed = OverridesParser.create().parse_overrides(sweep[1:])
    jobs = combinations(parsed)
    assert [OverridesParser.create().parse_override(job).value() for [job] in jobs] == [["\n"], ["a", "\t"]]


def test_text_arrives_through_the_whole_of_hydra(run):
    for a, b, c in zip(SPECIAL[::3], SPECIAL[1::3], SPECIAL[2::3], strict=True):
        code, [config], _ = run(f"question={a}", f"index.path={b}", f"corpus.path={c}", "stage.size=1")
        assert (code, config["stage"]["size"]) == (0, 1)
        paths = [None if text == "null" else text for text in (b, c)]  # null is null but for the question
        assert [config["question"], config["index"]["path"], config["corpus"]["path"]] == [a, *paths]


def test_sweeps_over_other_keys_stay(run):
    code, seen, _ = run("-m", "n=1,2", "stage=small,large", "question=a, b")
    assert code == 0
    assert [(c["n"], c["stage"]["size"], c["question"]) for c in seen] == [
        (1, 128, "a, b"), (1, 512, "a, b"), (2, 128, "a, b"), (2, 512, "a, b"),
    ]  # fmt: skip
