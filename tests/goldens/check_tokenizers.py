"""Compare the tokenizers built from GGUF vocabularies with the expected ids of llama.cpp's test files.

    python tests/goldens/check_tokenizers.py FOLDER

FOLDER holds NAME.gguf (a vocabulary), NAME.gguf.inp (texts, between lines "__ggml_vocab_test__") and
NAME.gguf.out (a line of ids a text, no special tokens), as llama.cpp's models/ folder does. Prints one line a
vocabulary; exits with 1 if a case differs.
"""

import sys
from pathlib import Path

from make_tokenizer_goldens import read_metadata

from rag.models.tokenizer.gguf import from_metadata


def check(gguf: Path) -> int:
    """Print and count the cases of one vocabulary that differ."""
    texts = Path(f"{gguf}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [
        [int(index) for index in line.split()] for line in Path(f"{gguf}.out").read_text().split("\n")
    ]
    tokenizer = from_metadata(read_metadata(gguf))
    got = [tokenizer.encode(text, special=False) for text in texts]
    wrong = [case for case in zip(texts, expected, got, strict=True) if case[1] != case[2]]
    for text, want, have in wrong:
        print(f"{text!r}\n  expected {want}\n  got      {have}")
    print(f"{gguf.name}: {len(texts)} cases, {len(wrong)} differ")
    return len(wrong)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sys.exit(1 if sum(check(path) for path in sorted(folder.glob("*.gguf"))) else 0)
