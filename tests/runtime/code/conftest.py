"""Fixtures of the tests of code versions."""

import textwrap

import pytest


@pytest.fixture
def tree(tmp_path):
    """Return a function that writes files, given as {path: text}, and returns their folder."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        return tmp_path / "tree"

    return write
