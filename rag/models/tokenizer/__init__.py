"""Load tokenizers and chat templates of every kind of checkpoint."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from rag.models.tokenizer import gguf, huggingface
from rag.models.tokenizer.tokenizer import Tokenizer


@runtime_checkable
class TokenizerSource(Protocol):
    """A module that builds tokenizers from one kind of file; a new kind is one such module and one row of SOURCES."""

    def matches(self, path: Path) -> bool:
        """Return whether a checkpoint, a file or a folder, has a tokenizer of this kind."""

    def files(self, path: Path) -> list[Path]:
        """Return the files that the tokenizer depends on, in a fixed order."""

    def load(self, path: Path) -> Tokenizer:
        """Build the tokenizer. Raises UserError if files are missing or damaged."""


SOURCES: tuple[TokenizerSource, ...] = (gguf, huggingface)  # the first that matches; the last always does


def load_tokenizer(path: Path) -> Tokenizer:
    """Build the tokenizer of a checkpoint. Raises UserError if files are missing or damaged, or of an unknown kind."""
    return _source(path).load(path)


def tokenizer_files(path: Path) -> list[Path]:
    """Return the files that the tokenizer of a checkpoint depends on, in a fixed order."""
    return _source(path).files(path)


def _source(path: Path) -> TokenizerSource:
    return next(source for source in SOURCES if source.matches(path))
