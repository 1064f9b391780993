"""scripts/export.py: a folder, a GGUF file, and the sentences for mistakes."""

import export
import pytest

from rag.models.llama import checkpoint as llama_checkpoint
from tests.run_script import launch_script
from tests.tiny_models import decoder_gguf, write_gguf

WEIGHTS = "generator.weights=tiny.gguf"


@pytest.fixture
def weights(home, run_main):
    """A tiny GGUF file in the current folder."""
    if not (home / "tiny.gguf").exists():
        write_gguf(home / "tiny.gguf", *decoder_gguf())
    return home / "tiny.gguf"


def test_both_formats_hold_the_weights(weights, home, run_main):
    want = llama_checkpoint.load(weights)[0].layers[1].self_attn.k_proj.weight[...]
    for arguments in (["output.path=folder"], ["output.path=file.gguf", "format=gguf"]):
        out, _ = run_main(export, WEIGHTS, *arguments)
        name = arguments[0].partition("=")[2]
        assert out.startswith("tiny.gguf in float32, 0.0 MB -> ") and out.strip().endswith(name)
        found = llama_checkpoint.load(home / name)[0].layers[1].self_attn.k_proj.weight[...]
        assert (found == want).all()
    run_main(export, WEIGHTS, "output.path=folder", "output.overwrite=true", "dtype=bfloat16")
    assert (home / "folder" / "model.safetensors").stat().st_size < weights.stat().st_size / 2 + 20_000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["output.path=documents"], "documents exists already"),
        (["output.path=new", "dtype=q8_0"], "only GGUF files have dtype=q8_0"),
        (
            ["output.path=new", "dtype=int4"],
            "dtype=int4 is not valid: it must be float32, float16, bfloat16 or q8_0.",
        ),
        (["output.path=new", "format=onnx"], "format=onnx is not valid"),
        (["output.path=new", "generator.adapter=nowhere"], "nowhere"),
        (["output.path=new", "generator.adapter=documents"], "documents is no adapter"),
        (["output.path=new", "generator.dtype=int8"], "There is no setting 'generator.dtype'"),
        (["format=gguf"], "output.path"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    weights, home, monkeypatch, capsys, arguments, says
):
    before = sorted(path.name for path in home.iterdir())
    run_folder = f"hydra.run.dir={home / 'cache' / 'run'}"
    code, out, err = launch_script(monkeypatch, capsys, "export", WEIGHTS, run_folder, *arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and says in err, err
    assert sorted(path.name for path in home.iterdir()) == before
