"""Files to answer through every stage, with counted words as the embedder and a generator that shows its prompt."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from rag import pipeline
from rag.context import ContextOptions
from rag.embed.bag_of_words import BagOfWords
from rag.index.store import Index
from rag.ingest.chunk.sentence import SentenceChunker
from rag.pipeline import AnswerOptions, Reader
from rag.prompt import PromptTemplate
from rag.retrieve.collection import Collection
from rag.retrieve.search import Dense, Lexical, Search
from rag.types import Answer, Usage, UserError
from tests.tiny_collections import write_files

TEMPLATE = PromptTemplate(user="{context}\n\nQ: {question}", passage="[{n}] {text}", separator="\n")


@dataclass
class Echo:
    """A generator that records its messages. A token is a word."""

    context_length: int = 1000
    asked: list = field(default_factory=list)
    pieces: tuple[str, ...] = ("see ", "[1]")

    def count(self, text: str) -> int:
        return len(text.split())

    fingerprint, description = "echo", "an echo"

    def prompt_tokens(self, messages) -> int:
        return sum(self.count(message.content) for message in messages)

    def stream(self, request):
        self.asked.append(request.messages)
        yield from self.pieces
        yield Usage(self.prompt_tokens(request.messages), 2, 0.5, 0.25, finish_reason="length")

    def generate(self, requests):
        raise NotImplementedError


@pytest.fixture
def corpus(tmp_path):
    return write_files(tmp_path / "corpus")


@pytest.fixture
def search(corpus, tmp_path):
    pipeline.ingest(corpus, tmp_path / "index", SentenceChunker(8), BagOfWords())
    index = Index.open(tmp_path / "index")
    return Search(Collection(index, index.restore(BagOfWords())), Dense(), k=3)


def reader(generator, **context):
    return Reader(generator, TEMPLATE, ContextOptions(**context), options=AnswerOptions(max_new_tokens=10))


def asked(question, search, reader):
    *pieces, answer = pipeline.answer(question, search, reader)
    assert isinstance(answer, Answer)
    return "".join(pieces), answer


def test_the_answer_streams_and_its_sources_are_spans_of_the_documents(search):
    generator = Echo()
    text, answer = asked("what eats krill.", search, reader(generator))
    assert text == answer.answer == "see [1]"
    assert not answer.abstained
    best = answer.sources[0]
    assert best.path == "krill.md"
    assert "A whale eats krill." in best.text
    for source in answer.sources:
        assert search.collection.index.document_text(source.path)[source.start : source.end] == source.text
        assert f"[{source.n}] {source.text}" in generator.asked[0][-1].content
    assert (answer.timings.prefill_s, answer.timings.new_tokens) == (0.5, 2)
    assert answer.cited == (1,)
    assert answer.finish_reason == "length"


def test_without_a_relevant_hit_no_model_is_asked(search):
    generator = Echo()
    text, answer = asked("quantum chromodynamics", search, reader(generator, min_score=0.2))
    assert answer.abstained
    assert text == answer.answer == TEMPLATE.abstain_answer
    assert (answer.sources, generator.asked) == ((), [])
    assert answer.finish_reason == "stop"


def test_a_model_that_says_so_abstains_with_the_sources_that_it_was_shown(search):
    generator = Echo(pieces=(TEMPLATE.abstain_answer,))
    _, answer = asked("Where do tides matter?", search, reader(generator))
    assert answer.abstained and answer.sources and generator.asked


@pytest.mark.parametrize("min_score", [None, 0.99])
def test_a_question_that_the_embedder_cuts_gives_a_notice(search, min_score):
    """What it does not read cannot be found."""
    embedder = search.collection.embedder
    _, answer = asked("what eats krill.", search, reader(Echo(), min_score=min_score))
    assert answer.notices == ()
    embedder.max_query_tokens = 2
    _, answer = asked("what eats krill.", search, reader(Echo(), min_score=min_score))
    assert answer.notices == ("The question has 3 tokens, of which the embedder reads the first 2.",)
    several = "krill. eats what"
    [*_, answer] = pipeline.answer("krill.", search, reader(Echo(), min_score=min_score), search_text=several)
    assert answer.notices == (
        "The question with the earlier ones has 3 tokens, of which the embedder reads the first 2.",
    )
    embedder.max_query_tokens = 3
    _, answer = asked("what eats krill.", search, reader(Echo(), min_score=min_score))
    assert answer.notices == ()


def test_a_long_prompt_loses_passages_and_gives_a_notice(search):
    _, whole = asked("a whale eats krill", search, reader(Echo()))
    generator = Echo(context_length=whole.timings.prompt_tokens - 2 + 10)
    _, answer = asked("a whale eats krill", search, reader(generator))
    assert 0 < len(answer.sources) <= len(whole.sources)
    assert answer.timings.prompt_tokens <= generator.context_length - 10
    assert any("longer than the model's context" in notice for notice in answer.notices)
    assert whole.notices == ()


def test_a_question_that_cannot_fit_is_an_error(search):
    with pytest.raises(UserError, match="leaves no room for a passage"):
        asked("krill " * 100, search, reader(Echo(context_length=50)))


def test_another_embedder_than_the_index_was_made_with_is_an_error(search):
    class Other(BagOfWords):
        def __init__(self):
            super().__init__()
            self.fingerprint = "another"

    with pytest.raises(UserError, match="built by another embedder"):
        Index.open(Path(search.collection.index.path)).restore(Other())


def test_k_below_one_is_an_error(search):
    with pytest.raises(UserError, match="k=0"):
        Search(search.collection, Dense(), k=0)


def test_any_method_can_feed_the_reader(search):
    _, answer = asked("krill whale", replace(search, method=Lexical()), reader(Echo(), min_score="auto"))
    assert [source.path for source in answer.sources] == ["krill.md"]  # no other shares a word


@pytest.mark.parametrize("options", [{"stop": "END"}, {"seed": -1}, {"seed": 1 << 32}, {"max_new_tokens": 0}])
def test_invalid_answer_options_are_errors(options):
    with pytest.raises(UserError, match=f"AnswerOptions.{next(iter(options))}="):
        AnswerOptions(**options)


def test_marks_of_no_source_are_left_out_of_the_stream_and_the_answer(search):
    generator = Echo(pieces=("see [1", ", 99]", " and [9", "9].", " [9"))
    text, answer = asked("what eats krill.", search, reader(generator))
    assert text == answer.answer == "see [1] and. [9"
    assert answer.cited == (1,)
    raw = replace(reader(generator), options=AnswerOptions(10, clean_up=False))
    text, answer = asked("what eats krill.", search, raw)
    assert text == answer.answer == "see [1, 99] and [99]. [9"
    unnumbered = replace(reader(generator), template=replace(TEMPLATE, passage="{text}"))
    assert asked("what eats krill.", search, unnumbered)[0] == "see [1, 99] and [99]. [9"  # no citations


def test_the_request_ends_an_answer_before_a_line_like_the_prompts_own():
    options = AnswerOptions(7, seed=3, stop=["END"])
    request = replace(reader(Echo()), options=options).request([])
    assert (request.max_new_tokens, request.seed, request.stop) == (7, 3, ("END", "\nQ:"))
    assert request.no_repeat
    request = replace(reader(Echo()), options=replace(options, clean_up=False)).request([])
    assert (request.stop, request.no_repeat) == (("END",), False)
