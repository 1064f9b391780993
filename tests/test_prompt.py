"""Prompts: templates filled in one pass, so that no document and no question can act as a template."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rag.prompt import PromptTemplate, render, render_passage
from rag.types import Context, Message, Source, UserError

CONF = Path(__file__).parent.parent / "conf"
TEMPLATE = PromptTemplate(
    system="Be brief.", user="{context}\n\nQ: {question}", passage="[{n}] ({path}) {text}", separator="\n--\n"
)


def context_of(*passages):
    sources = tuple(Source(n, path, 0, len(text), 1.0, text) for n, (path, text) in enumerate(passages, 1))
    return Context(sources, tokens=0)


def test_messages_in_the_order_that_a_chat_template_expects():
    context = context_of(("a.md", "One."), ("b.md", "Two."))
    assert render(TEMPLATE, "Why?", context) == [
        Message("system", "Be brief."),
        Message("user", "[1] (a.md) One.\n--\n[2] (b.md) Two.\n\nQ: Why?"),
    ]


def test_a_blank_system_text_gives_no_message():
    template = PromptTemplate(user="{question}", system=" \n")
    assert render(template, "Why?", context_of()) == [Message("user", "Why?")]


def test_the_system_text_may_hold_the_context():
    template = PromptTemplate(user="{question}", system="Use: {context}", passage="{text}")
    assert render(template, "Q", context_of(("a", "A")))[0] == Message("system", "Use: A")


def test_a_passage_alone():
    assert render_passage(TEMPLATE, Source(7, "x/y.md", 3, 4, 0.5, "{n}{text}")) == "[7] (x/y.md) {n}{text}"


BRACES = "{question} {context} {n} {text} {path} {{question}} {0} {} { \\1 \\g<0> %s $n {n!r} {n.__class__}"


def test_data_that_look_like_a_placeholder_are_not_changed():
    (_, message) = render(TEMPLATE, BRACES, context_of((BRACES, BRACES)))
    assert message.content == f"[1] ({BRACES}) {BRACES}\n\nQ: {BRACES}"


ANY = st.text() | st.lists(
    st.sampled_from(["{question}", "{context}", "{text}", "{n}", "{", "}", "\\1", "🤖"])
).map("".join)


@given(ANY, ANY, ANY)
def test_any_question_and_passage_come_through_as_written(question, path, text):
    messages = render(TEMPLATE, question, context_of((path, text)))
    assert messages[-1].content == "[1] (" + path + ") " + text + "\n\nQ: " + question


def test_braces_in_a_template_that_are_no_placeholder_are_plain_text():
    template = PromptTemplate(user='Answer as {"a": [1, {}]} {{question}} { question } {1}', passage="{text}")
    assert render(template, "Q", context_of())[-1].content == 'Answer as {"a": [1, {}]} {Q} { question } {1}'


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"user": "{question} {documents}"},
            r"user has the unknown placeholder \{documents\}.*\{question\} and \{context\}",
        ),
        ({"user": "{question} {text}"}, r"unknown placeholder \{text\}"),
        ({"system": "{user_input}"}, r"system has the unknown placeholder \{user_input\}"),
        (
            {"passage": "{text} {score}"},
            r"passage has the unknown placeholder \{score\}.*\{n\} and \{text\} and \{path\}",
        ),
        ({"separator": "{n}"}, r"separator has the unknown placeholder \{n\}.*no placeholder"),
        ({"abstain_answer": "No {context}"}, r"abstain_answer has the unknown placeholder"),
        ({"user": "{context}"}, r"put \{question\} into"),
        ({"passage": "[{n}]"}, r"put \{text\} into"),
    ],
)
def test_a_template_that_cannot_work_is_an_error_when_it_is_made(fields, message):
    with pytest.raises(UserError, match=message):
        PromptTemplate(**({"user": "{question} {context}"} | fields))


def stage_fields(path):
    """Return the fields of a YAML file with those of the files in its `defaults`."""
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    inherited = [
        stage_fields(path.with_name(f"{name}.yaml"))
        for name in fields.pop("defaults", [])
        if name != "_self_"
    ]
    return {name: value for some in (*inherited, fields) for name, value in some.items()}


@pytest.mark.parametrize("path", sorted((CONF / "prompt").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_templates_that_come_with_the_project(path):
    fields = stage_fields(path)
    assert fields.pop("_target_") == "rag.prompt.PromptTemplate"
    template = PromptTemplate(**fields)
    messages = render(template, "What is it?", context_of(("a.md", "It is a pump."), ("b.md", "It pumps.")))
    shown = "\n".join(message.content for message in messages)
    assert "What is it?" in shown
    asked_closed_book = path.stem == "closed_book"
    assert ("It is a pump." in shown and "It pumps." in shown) != asked_closed_book
    assert (template.abstain_answer == "The documents do not answer this question.") != asked_closed_book
    assert path.read_text(encoding="utf-8").startswith("# python scripts/")


def test_the_prompts_that_come_with_the_project():
    names = {path.stem for path in (CONF / "prompt").glob("*.yaml")}
    assert names == {"cited", "plain", "seed", "short", "few_shot", "closed_book"}


def test_the_seed_prompt_is_the_notebooks():
    fields = stage_fields(CONF / "prompt" / "seed.yaml")
    del fields["_target_"]
    assert render(PromptTemplate(**fields), "Why?", context_of(("d", "Because."))) == [
        Message(
            "user",
            "\nYou are a helpful assistant. You answer in 2-3 sentences, the user input is: Why?\n"
            "Answer accordingly to the user input based on this information: Because.\n",
        )
    ]


@pytest.mark.parametrize(
    "path",
    sorted([*CONF.glob("chunker/*.yaml"), *CONF.glob("context/*.yaml")]),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_chunker_and_context_groups_build_their_options(path):
    import importlib

    fields = stage_fields(path)
    module, _, name = fields.pop("_target_").rpartition(".")
    options = getattr(importlib.import_module(module), name)(**fields)
    assert hash(options) == hash(getattr(importlib.import_module(module), name)(**fields))
    assert path.read_text(encoding="utf-8").startswith("# python scripts/")


# --- where the passages are


def shown(message):
    return [message.content[start:end] for start, end in message.reusable]


def test_a_message_says_where_its_passages_are():
    context = context_of(("a.md", "One."), ("{text}", "Two."), ("c.md", ""))
    system, user = render(TEMPLATE, "{context} Two.", context)
    assert shown(user) == [" One.", " Two."]  # each with its space; the empty one is none
    assert user.content[: user.fixed] == ""
    assert (system.reusable, system.fixed) == ((), len(system.content))


def test_passages_in_the_system_text_and_twice():
    template = PromptTemplate(user="Q {question} {context}", system="Use: {context}|", passage="{text}")
    system, user = render(template, "Why?", context_of(("a", "A"), ("b", "B")))
    assert (shown(system), shown(user)) == ([" A", "B"], [" A", "B"])
    assert system.content[: system.fixed] == "Use: " and user.content[: user.fixed] == "Q "


@given(ANY, st.lists(ANY, max_size=4), st.sampled_from(["", " ", "  ", "--"]))
def test_the_spans_are_the_passages(question, texts, separator):
    template = PromptTemplate(user="{context}{question}", passage="{text}", separator=separator)
    message = render(template, question, context_of(*(("p", text) for text in texts)))[-1]
    passages = [text for text in texts if text]
    assert all(
        s in (t, " " + t) for s, t in zip(shown(message), passages, strict=True)
    )  # perhaps with its space
    ends = [place for span in message.reusable for place in span]
    assert ends == sorted(ends)


def test_spans_do_not_change_the_content_of_a_message():
    assert Message("user", "A", ((0, 1),), 1) == Message("user", "A")
    assert len({Message("user", "A", ((0, 1),)), Message("user", "A")}) == 1


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        ({"user": "Passages:\n\n{context}\n\nQuestion: {question}"}, ("Passages:", "Question:")),
        ({"user": "{context}\n  Question: {question}\nAnswer in a few words: be brief."}, ("Question:",)),
        (
            {"user": "{question}", "passage": "My source: {path}\n{text}", "system": "Rules:\nNone"},
            ("Rules:", "My source:"),
        ),
        ({"user": "{context} Question: {question}\nQuestion: again?\nQuestion: {question}"}, ("Question:",)),
        ({"user": "資料\uff1a\n{context}\n問題\uff1a{question}"}, ("資料\uff1a", "問題\uff1a")),
        ({"user": "{question}\n{context}"}, ()),
    ],
)
def test_labels_are_the_words_before_a_colon_at_the_beginning_of_a_line(texts, labels):
    assert PromptTemplate(**texts).labels == labels


def test_labels_come_from_the_template_and_not_from_what_fills_it():
    """A question or a passage may hold such a line; the answer may have it too."""
    assert PromptTemplate(user="{context}\n{question}", passage="{text}").labels == ()


@pytest.mark.parametrize(
    ("answer", "abstains"),
    [
        ("I do not know.", True),
        ("i do not know [1, 2]", True),
        ("  I do not know!\n", True),
        ("I do not know the king.", False),
        ("Edda", False),
        ("", False),
    ],
)
def test_an_answer_abstains_in_the_words_of_the_template(answer, abstains):
    assert PromptTemplate(abstain_answer="I do not know.").abstains(answer) is abstains
