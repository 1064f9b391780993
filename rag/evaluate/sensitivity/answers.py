"""Numerical sensitivity of the answers that a generator writes, from the passages that the reference found."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import groupby

from rag.evaluate.ablation import AblationInputs, ContextAblation, Reply, answer_all
from rag.evaluate.metrics import measure_answer
from rag.evaluate.metrics.answers import JudgedAnswer
from rag.evaluate.sensitivity.lists import Found, ListSensitivity, batches
from rag.evaluate.sensitivity.options import Variation
from rag.evaluate.sensitivity.report import AnswerChanges, MetricChange
from rag.generate import Generator
from rag.generate.prefill_batches import boundary_budgets
from rag.retrieve.collection import Collection
from rag.retrieve.search import Search
from rag.runtime.shapes import round_up_prompt

ANSWER_METRICS_COMPARED = ("F1", "contains")

_WHOLE = 1 << 24  # tokens: more than any batch of answers has, so that it is never divided

Replies = dict[str, Reply]  # query id -> reply


class AnswerSensitivity:
    """The answers of the reference, and how they change with each variation."""

    def __init__(self, lists: ListSensitivity):
        self.lists, self.options = lists, lists.options
        self.system, self.dataset = lists.system, lists.dataset
        self.replies = self._answer(self.system.generator) if self.options.answers else {}

    def means(self) -> dict[str, float | None]:
        """Return metric -> mean over the reference's answers."""
        scores = self._scores(self.replies)
        return {name: MetricChange.between(values, values).mean for name, values in scores.items()}

    def variations(self) -> tuple[list[Variation], list[str]]:
        """Return the variations and a sentence for each axis that is left out.

        A variation computes two sets of replies: those to compare with, and those of the changed setting.
        """
        system, options = self.system, self.options
        if not options.answers:
            return [], []
        whole = system.generator
        if system.generator_of_batch is not None:  # one that does not divide its batches
            whole = cache(partial(system.generator_of_batch, _WHOLE))
        variations = [
            Variation("answer_batches", str(n), partial(self._answer_again, whole, n))
            for n in options.answer_batches
        ]
        skipped, lengths = [], self._lengths(whole()) if options.answer_budgets else {}
        budgets = boundary_budgets(list(lengths.values()), options.answer_budgets)
        variations += [
            Variation("answer_budgets", f"{n} tokens", partial(self._alone_and_in_pairs, whole, lengths, n))
            for n in budgets
        ]
        if options.answer_budgets and not budgets:
            skipped.append(
                "answer_budgets is left out: no two prompts are prefilled together and need caches of two sizes."
            )
        if system.generator_of_dtype is None:
            return variations, [*skipped, "answer_dtypes is left out: the generator has no such setting."]
        for dtype in options.answer_dtypes:
            make = partial(system.generator_of_dtype, dtype)
            variations.append(Variation("answer_dtypes", dtype, partial(self._answer_again, make)))
        return variations, skipped

    def changes(self, variation: Variation) -> AnswerChanges:
        """Compute a variation and compare its answers."""
        before, after = variation.compute()
        old, new = self._scores(before), self._scores(after)
        return AnswerChanges(
            axis=variation.axis,
            setting=variation.setting,
            answers=len(before),
            changed=tuple(query for query, reply in before.items() if reply.answer != after[query].answer),
            movements={name: MetricChange.between(old[name], new[name]) for name in old},
        )

    def _asked(self) -> Found:
        """Return the hits of the questions that are answered."""
        asked = self.dataset.sample(self.options.answers, self.dataset.seed).queries
        return {query: self.lists.found[query] for query in asked}

    def _mixed(self) -> Found:
        """Return the same with one passage, two, three ... in turn, so that the prompts are of many lengths."""
        most = self.options.passages
        return {query: hits[: 1 + i % most] for i, (query, hits) in enumerate(self._asked().items())}

    def _lengths(self, generator: Generator) -> dict[str, int]:
        """Return query id -> tokens of its mixed prompt, of those for which the model is asked."""
        replies = self._answer(lambda: generator, found=self._mixed(), new_tokens=1)
        return {query: reply.prompt_tokens for query, reply in replies.items() if reply.prompt_tokens}

    def _answer_again(
        self, make: Callable[[], Generator], batch: int | None = None
    ) -> tuple[Replies, Replies]:
        return self.replies, self._answer(make, batch)

    def _alone_and_in_pairs(
        self, make: Callable[[], Generator], lengths: Mapping[str, int], new_tokens: int
    ) -> tuple[Replies, Replies]:
        """Answer the mixed prompts one at a time, then in pairs of a short and a long one prefilled together."""
        found = self._mixed()
        together: Replies = {}
        alone = self._answer(make, 1, found={query: found[query] for query in lengths}, new_tokens=new_tokens)
        order = sorted(lengths, key=lengths.__getitem__)
        for _, alike in groupby(order, key=lambda query: round_up_prompt(lengths[query])):
            left = deque(alike)
            while left:  # a third prompt could widen the cache of the two
                pair = [left.popleft(), *([left.pop()] if left else [])]
                together |= self._answer(make, found={q: found[q] for q in pair}, new_tokens=new_tokens)
        return alone, together

    def _answer(
        self,
        make: Callable[[], Generator],
        batch: int | None = None,
        *,
        found: Found | None = None,
        new_tokens: int | None = None,
    ) -> Replies:
        """Answer `batch` questions in one call (None: all) from these hits, by default the reference's."""
        generator = make()
        reference = self.lists.collection
        collection = Collection(
            reference.index, reference.embedder, lambda: generator, queries=reference.queries
        )
        reader = self.system.reader(generator)
        if new_tokens is not None:
            reader = replace(reader, options=replace(reader.options, max_new_tokens=new_tokens))
        inputs = AblationInputs(
            collection=collection,
            dataset=self.dataset,
            score_threshold=Search(collection, self.system.method).score_threshold,
            reader=reader,
            closed_book=reader.template,
            ablation=ContextAblation(conditions=("retrieved",), likelihood=(), k=self.options.passages),
        )
        replies: Replies = {}
        for some in batches(self._asked() if found is None else found, batch):
            replies |= {reply.query: reply for reply in answer_all(inputs, some)}
        return replies

    def _scores(self, replies: Replies) -> dict[str, list[float | None]]:
        """Return metric -> a value for each answer, None where it is not defined."""
        rows = [
            measure_answer(
                JudgedAnswer(reply.answer, self.dataset.answers.get(query, ()), reply.abstained),
                ANSWER_METRICS_COMPARED,
            )
            for query, reply in replies.items()
        ]
        return {name: [row[name] for row in rows] for name in ANSWER_METRICS_COMPARED}
