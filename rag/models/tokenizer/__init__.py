"""Load tokenizers and chat templates: `load_tokenizer` chooses the builder by the kind of the checkpoint's files."""

from pathlib import Path

from rag.models import gguf_file
from rag.models.tokenizer import gguf, huggingface
from rag.models.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Build the tokenizer of a checkpoint, a GGUF file or a Hugging Face folder.

    Raises:
        UserError: files are missing or damaged, or the kind of tokenizer is not known.
    """
    if gguf_file.is_gguf(path):
        return gguf.from_metadata(gguf_file.read(path)[0])
    return huggingface.from_folder(path)
