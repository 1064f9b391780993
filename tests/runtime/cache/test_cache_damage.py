"""When any file of a cached model is damaged, the model is the same as an intact one, and there is a notice."""

import threading
from itertools import cycle, product

import numpy as np
import pytest

from rag.models import conversion_cache
from rag.models.bert import checkpoint as bert_checkpoint
from rag.models.llama import checkpoint as llama_checkpoint
from rag.runtime import files
from rag.runtime.cache import entries, file_hash
from rag.runtime.cache.folder import cache_root
from rag.types import UserError
from tests import trials
from tests.damage import WAYS
from tests.tiny_models import write_classifier, write_decoder, write_encoder


def decoder(path, **options):
    model, tokenizer = llama_checkpoint.load(path, **options)
    return *parameters(model), tokenizer.encode("A seal eats fish."), tokenizer.spec


def encoder(path):
    model, tokenizer, settings = bert_checkpoint.load(path)
    return *parameters(model), tokenizer.encode("a seal eats fish"), settings


def classifier(path):
    model, tokenizer, settings = bert_checkpoint.load_classifier(path)
    return *parameters(model), tokenizer.encode("a seal eats fish"), settings


def parameters(model):
    import jax

    return [np.array(array) for array in jax.tree.leaves(model)]  # copies: damage shows in what is mapped


KINDS = {
    "decoder": (write_decoder, decoder),
    "decoder int8": (write_decoder, lambda path: decoder(path, int8=True)),
    "encoder": (write_encoder, encoder),
    "classifier": (lambda path: write_classifier(path, "bert"), classifier),
}


def equal(one, other):
    return all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in zip(one, other, strict=True)
    )


LONG = ("decoder", "classifier")  # the others are read in the same ways


@pytest.fixture(params=[pytest.param(kind, marks=[pytest.mark.long] * (kind in LONG)) for kind in KINDS])
def model(request, tmp_path, monkeypatch):
    """Return the path of a checkpoint, and a function that loads it as values that can be compared."""
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    write, load = KINDS[request.param]
    write(tmp_path / "checkpoint")
    return tmp_path / "checkpoint", load


def converted():
    return sorted(path for path in (cache_root() / "converted").glob("*/*/*") if path.is_file())


def test_any_file_of_a_converted_checkpoint_may_be_damaged(model, capsys):
    """The suite damages one of sixteen parameters, each in another way; with --long every one in every way."""
    path, load = model
    intact = load(path)
    used = [file for file in converted() if file.parent == checkpoint_folder(load, path)]
    arrays = [file for file in used if file.suffix == ".npy"]
    others = [file for file in used if file.suffix != ".npy"]
    assert len(arrays) > 10 and len(others) > 3
    pairs = zip([*others, *arrays[::16]], cycle(WAYS), strict=False)
    capsys.readouterr()
    for file, way in product(used, WAYS) if trials.LONG else pairs:
        WAYS[way](file)
        assert equal(load(path), intact), (file, way)
        printed = capsys.readouterr().err
        assert str(file) in printed and printed.count("made again") == printed.count("\n") == 1, (file, way)
    assert equal(load(path), intact) and capsys.readouterr().err == ""


def checkpoint_folder(load, path):
    """Return the folder of converted weights that the loader reads."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            conversion_cache,
            "load_module",
            lambda module, folder: seen.append(folder) or real(module, folder),
        )
        load(path)
    return seen[-1]


real = conversion_cache.load_module


def test_a_flip_that_keeps_the_time_stamp_of_the_source_is_found(tmp_path, monkeypatch):
    """A decaying disk does this: the cached digest is still that of the intact file."""
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    monkeypatch.setattr(file_hash, "_RACY_NS", 0)
    right = file_hash.file_sha256(source)
    stamp = files.file_stamp(source)
    monkeypatch.setattr(file_hash, "file_stamp", lambda path: stamp)
    WAYS["middle"](source)
    assert file_hash.file_sha256(source) == right
    with pytest.raises(UserError, match=r"source has changed although nobody wrote to it: fetch it again"):
        conversion_cache.converted_folder("toy", [source], lambda folder: pytest.fail("it was read"))
    assert file_hash.file_sha256(source) != right  # for the next start


def test_threads_convert_a_checkpoint_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    write_decoder(tmp_path / "checkpoint")
    made, write_folder = [], entries.write_folder
    monkeypatch.setattr(
        entries, "write_folder", lambda path, fill: made.append(path) or write_folder(path, fill)
    )
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(decoder(tmp_path / "checkpoint"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(made) == 1 and all(equal(result, results[0]) for result in results)
