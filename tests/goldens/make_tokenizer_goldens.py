"""Compare the token ids of varied strings by llama.cpp with those of tokenizers built from GGUF metadata.

    python tests/goldens/make_tokenizer_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf
    python tests/goldens/make_tokenizer_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf --write

Compares 1,000 strings, prints those that differ and a count, and exits with 1 if any does. `--write` writes
the first 60 strings with their ids to tokenizer_smollm.json. Needs llama-cpp-python and gguf; the tests need
neither.
"""

import argparse
import json
import random
import sys
from pathlib import Path

GOLDEN = Path(__file__).with_name("tokenizer_smollm.json")

_FIXED = [
    "", " ", "  ", "\n", "\t", "\r\n", " \n \n", "\n\n\n", "Hello world", " Hello World!",
    "don't I'LL we've 'S", "<|im_start|>user\nhi<|im_end|>\n", "<|im_end|", "<|endoftext|>",
    "a<|im_end|>b<|im_end|>", "<repo_name><file_sep>", "<<|im_start|>>", "0123456789", "3.14159e-10",
    "1,234,567.89", "\u0663\u0664\u0665 \xbd \u2167 \xb2", "\U0001f916",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f", "caf\xe9 cafe\u0301",
    "\xdf \u1e9e \u0130 \u0131 \ufb01", "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c", "\uc548\ub155\ud558\uc138\uc694",
    "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!", "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "def f(x):\n    return x ** 2  # \u03c0\n",
    "\t\tif (a!=b) {\n\t\t\t++c;\n\t\t}\n", "https://example.org/a?b=c&d=%20e#f",
    "x = [i for i in range(10)]", "\xa0\u2003\u2028\u3000 wide \u200b spaces", "zero\x00byte \x07 \x1b[0m",
    "\ufeffbom", "\ufffd", "a\u0300\u0301\u0302", "\u201cquotes\u201d \u2013 \u2014 \u2026",
    "'s't're've'm'll'd", "' s 't", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "        eight", "trailing   ",
    "\u2581\u2581low",
]  # fmt: skip

_ALPHABETS = {
    "latin": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "accents": "\u00e0\u00e9\u00ee\u00f5\u00fc\u00e7\u00f1\u00df\u00f8\u0142\u017e\u0103\u1ea5\u0301\u0308",
    "digits": "0123456789\u0661\u0662\u0967\u00b2\u00bd\u2163",
    "space": "     \n\n\t\r\u00a0\u2009\u3000\u200b",
    "marks": "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u00bf\u2026\u2014\u20ac\u00a7\u3002\u3001",
    "cyrillic": "\u0430\u0431\u0432\u0433\u0434\u0435\u0436\u0437\u0418\u0419\u041a\u041b",
    "greek": "\u03b1\u03b2\u03b3\u03b4\u03b5\u03a9\u03a3\u03c2",
    "cjk": "\u4e00\u4e8c\u4e09\u4eba\u5927\u5c0f\u65e5\u672c\u8a9e\u3042\u30ab\ud55c\uae00\u9f98",
    "semitic": "\u05d0\u05d1\u05d2\u05d3\u0627\u0628\u062a\u062b\u064b\u0651",
    "indic": "\u0905\u0906\u0915\u094d\u0937\u0ba4\u0bae\u0bbf\u0e01\u0e33",
    "emoji": "\U0001f600\U0001f916\u2764\ufe0f\u200d\U0001f3fd\U0001f1eb\U0001f1f7\u2603",
    "math": "\u2211\u222b\u221e\u2264\U0001d400\U0001d7d8\u00d7\u00f7",
    "control": "\x00\x01\x07\x1b\x7f\x85",
}
_WORDS = [
    "the", "of", "and", "attention", "is", "all", "you", "need", "Transformer", "retrieval", "doesn't",
    "I'm", "they'll", "WE'VE", "it's", "co-operate", "naive", "def", "return", "import", "self.x", "==",
    "!=", "->", "lambda", "{", "}", ";", "//", "/*", "*/", "<html>", "</p>", "&amp;", "SELECT", "*", "FROM",
    "0x1F", "1e-5", "v2.0.1", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "<s>", "</s>",
    "[CLS]", "[UNK]", "<0x0A>", "<repo_name>", "<empty_output>",
]  # fmt: skip


def varied_strings(count: int, seed: int = 0) -> list[str]:
    """Return `count` strings: fixed difficult ones, then random mixtures of words, scripts, marks and white space."""
    random_ = random.Random(seed)
    strings = list(_FIXED)
    while len(strings) < count:
        strings.append("".join(_piece(random_) for _ in range(random_.randint(1, 12))))
    return strings[:count]


def _piece(random_: random.Random) -> str:
    if random_.random() < 0.4:
        return random_.choice(["", " ", " ", "  ", "\n"]) + random_.choice(_WORDS)
    alphabet = random_.choice(list(_ALPHABETS.values()))
    return "".join(random_.choice(alphabet) for _ in range(random_.randint(1, 9)))


def read_metadata(path: Path) -> dict[str, object]:
    """Return the tokenizer's part of a GGUF file's metadata."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    from llama_cpp import Llama

    from rag.models.tokenizer.gguf import from_metadata

    peer = Llama(str(options.gguf), vocab_only=True, verbose=False)
    ours = from_metadata(read_metadata(options.gguf))
    rows, wrong = [], 0
    for text in varied_strings(options.count, options.seed):
        row = {"text": text}
        for key, parse in (("ids", False), ("ids_parsed", True)):
            row[key] = peer.tokenize(text.encode(), add_bos=False, special=parse)
            got = ours.encode(text, special=False, parse_special=parse)
            if got != row[key]:
                wrong += 1
                print(f"{text!r} parse_special={parse}\n  llama.cpp {row[key]}\n  ours      {got}")
        rows.append(row)
    print(f"{options.gguf.name}: {len(rows)} strings, each with and without parse_special, {wrong} differ")
    if options.write:
        lines = ",\n".join(json.dumps(row) for row in rows[:60])
        GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="ascii")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
