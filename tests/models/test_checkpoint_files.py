"""Every file that a loader opens is in the fingerprint, as the kernel saw it: Python's and the libraries' own reads."""

import ctypes
import json
import os
import struct
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from rag.embed.bert import BertEmbedder
from rag.generate.local import LocalGenerator
from rag.models import conversion_cache
from rag.models.bert import checkpoint as bert_checkpoint
from rag.models.llama import checkpoint as llama_checkpoint
from rag.retrieve.rerank.cross_encoder import CrossEncoder
from tests import tiny_models
from tests.tiny_models import write_classifier

_OPENED = 0x20  # IN_OPEN, of <sys/inotify.h>
_NOT_READ = {"README.md": "# A model", "vocab.txt": "a\nb", "onnx/model.onnx": "0", "training_args.bin": "0"}


class Opened:
    """The files below a folder that are opened in a with block, by whatever code."""

    def __init__(self, folder: Path):
        self._folder, self.files = folder, set()

    def __enter__(self) -> "Opened":
        libc = ctypes.CDLL(None, use_errno=True)
        self._queue = libc.inotify_init1(os.O_NONBLOCK)
        folders = [self._folder, *(path for path in self._folder.rglob("*") if path.is_dir())]
        self._watched = {
            libc.inotify_add_watch(self._queue, str(path).encode(), _OPENED): path for path in folders
        }
        assert self._queue >= 0 and min(self._watched) >= 0, os.strerror(ctypes.get_errno())
        return self

    def __exit__(self, *_) -> None:
        events = b""
        while True:
            try:
                events += os.read(self._queue, 1 << 16)
            except BlockingIOError:
                break
        os.close(self._queue)
        at = 0
        while at < len(events):
            watch, _, _, length = struct.unpack_from("iIII", events, at)
            name = events[at + 16 : at + 16 + length].rstrip(b"\0").decode()
            path = self._watched[watch] / name
            if path.is_file():
                self.files.add(path)
            at += 16 + length


def shard(folder: Path) -> None:
    """The weights in two files and their index, as large models have them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
        files |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def write_encoder(folder: Path) -> Path:
    tiny_models.write_encoder(folder)
    tiny_models.write_sentence_files(folder, {"pooling_mode": "cls"})
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "my_pooling"  # the usual name is no rule
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").rename(folder / "my_pooling")
    return folder


def write_decoder(folder: Path) -> Path:
    folder.mkdir()
    tiny_models.write_decoder(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return folder


def write_pair_encoder(folder: Path) -> Path:
    write_classifier(folder, "bert")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 50}))
    return folder


KINDS = {
    "encoder": (write_encoder, bert_checkpoint, lambda path: BertEmbedder(path).fingerprint, bert_checkpoint.load),
    "classifier": (write_pair_encoder, bert_checkpoint, lambda path: CrossEncoder(path).weights,
                   bert_checkpoint.load_classifier),
    "decoder": (write_decoder, llama_checkpoint, lambda path: LocalGenerator(path).fingerprint, llama_checkpoint.load),
    "decoder int8": (write_decoder, llama_checkpoint, lambda path: LocalGenerator(path, dtype="int8").fingerprint,
                     lambda path: llama_checkpoint.load(path, int8=True)),
}  # fmt: skip


@pytest.fixture(params=[(kind, sharded) for kind in KINDS for sharded in (False, True)], ids=str)
def checkpoint(request, tmp_path, monkeypatch):
    """(folder, its module, fingerprint of a path, load a path) of a checkpoint with every file that one may have."""
    kind, sharded = request.param
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    write, module, fingerprint, load = KINDS[kind]
    folder = write(tmp_path / "checkpoint")
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    if sharded:
        shard(folder)
    for name, text in _NOT_READ.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder, module, fingerprint, load


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_what_a_loader_opens_is_in_the_fingerprint(checkpoint, monkeypatch):
    folder, module, _, load = checkpoint
    named = set(module.source_files(folder))
    with Opened(folder) as opened:
        conversion_cache.file_digests(sorted(named))
    assert opened.files == named  # the trace sees what is read
    with monkeypatch.context() as patch:
        # which would open all of them
        patch.setattr(
            conversion_cache, "file_digests", lambda sources, fresh=False: [("", "")] * len(sources)
        )
        with Opened(folder) as opened:
            load(folder)
    assert {path.name for path in opened.files} >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert any(path.suffix == ".safetensors" for path in opened.files)
    assert opened.files <= named


def test_an_edit_of_any_file_changes_the_fingerprint_and_what_is_loaded(checkpoint):
    folder, module, fingerprint, load = checkpoint
    files = module.source_files(folder)
    seen = {fingerprint(str(folder))}
    for file in files:
        data = file.read_bytes()
        if file.suffix == ".safetensors":  # the last number of the last tensor
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        elif file.suffix == ".json":
            file.write_bytes(data.rstrip() + b"\n\n")
        else:
            file.write_bytes(data + b"!")
        changed = fingerprint(str(folder))
        assert changed not in seen, file
        seen.add(changed)
        file.write_bytes(data)
    for name in _NOT_READ:
        (folder / name).write_text("something else")
    assert fingerprint(str(folder)) in seen
    load(folder)


def test_a_tokenizer_configuration_that_changed_is_not_found_converted(checkpoint):
    folder, _, _, load = checkpoint
    before = load(folder)[1].spec
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"unk_token": None, "pad_token": "a", "bos_token": "b"})
    )
    after = load(folder)[1].spec
    assert (after.pad_id, after.bos_id) != (before.pad_id, before.bos_id)
    (folder / "chat_template.jinja").rename(folder / "chat_template.old.jinja")
    assert load(folder)[1].spec.chat_template != after.chat_template
