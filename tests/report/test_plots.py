"""The figures of a report."""

import io
import sys

from PIL import Image

from rag.report import plots
from rag.report.plots import Mark


def mark(label: str, mean: float, seconds: float, **more) -> Mark:
    return Mark(label, mean, mean - 0.01, mean + 0.01, more.pop("significance", "open"), seconds, **more)


def test_the_front_is_of_those_that_none_beats():
    marks = [
        mark("fast", 0.3, 0.001),
        mark("slow and worse", 0.29, 0.002),
        mark("good", 0.5, 0.01),
        mark("as good, slower", 0.5, 0.02),
        mark("twin of good", 0.5, 0.01),
        mark("sample", 0.9, 0.0001, sample=True),
    ]
    assert [marks[i].label for i in plots.front(marks)] == ["fast", "good", "twin of good"]
    assert [marks[i].label for i in plots.front(marks, lower=True)] == ["fast", "slow and worse"]


def test_a_figure_takes_any_label():
    labels = ["$x_{$", "^_\\", "emoji-free " * 20, "two\nlines"]
    marks = [mark(label, 0.1 * i, 10.0**i) for i, label in enumerate(labels, 1)]
    for png in (plots.forest(marks, "$m_", 0.9), plots.pareto(marks, "$m_", 0.9)):
        assert Image.open(io.BytesIO(png)).size[0] == 1840


def test_letters_that_the_font_lacks_give_no_warning(recwarn):
    plots.forest([mark("文字", 0.1, 0.1)], "nDCG@10", 0.9)
    assert not [str(one.message) for one in recwarn]


def test_no_state_of_pyplot_is_touched():
    assert "matplotlib.pyplot" not in sys.modules
    assert "rag.report.plots" in sys.modules
