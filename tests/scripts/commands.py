"""Files of the small folder that conftest.py makes, and the settings with which scripts use it."""

FILES = {"seal.txt": "A seal eats fish on the ice.", "krill.md": "A whale eats krill.", "logo.png": "PNG"}
WORDS = ("embedder=bag_of_words",)
INDEX = ("index.path=index", *WORDS)
ASK = (*INDEX, "generator.weights=decoder", "answer.max_new_tokens=8")
QUESTIONS = [
    r"""What's attention, (really)? [yes=no] #1 "x" 🤖""",
    "a\\'b ${oc.env:HOME} {n} $x, y",
    "null",
    "???",
]
