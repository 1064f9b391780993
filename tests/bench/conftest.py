"""Benchmarks as conf/bench configures them, and models and a dataset of the smallest size for them."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from launch import CONF
from omegaconf import OmegaConf
from settings import build

from rag.bench.questions import QuestionSet
from rag.prompt import PromptTemplate
from tests import tiny_models


@pytest.fixture
def configured() -> Callable:
    """Build the benchmark of conf/bench/NAME.yaml, with other values of some fields: configured(NAME, repeats=1)."""

    def configured(name: str, **fields):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("bench", [f"bench={name}"])
        for key in OmegaConf.missing_keys(config):
            OmegaConf.update(config, key, "missing")
        return replace(build(config.bench), **fields)

    return configured


@pytest.fixture
def embedder_of(tmp_path) -> str:
    """The folder of an encoder of the smallest size."""
    encoder = tiny_models.write_encoder(tmp_path / "encoder")
    tiny_models.write_sentence_files(encoder, {"pooling_mode_mean_tokens": True})
    return str(encoder)


@pytest.fixture
def weights(tmp_path) -> str:
    """The folder of a decoder of the smallest size."""
    folder = tmp_path / "decoder"
    folder.mkdir()
    tiny_models.write_decoder(folder)
    return str(folder)


@pytest.fixture
def questions(tmp_path, embedder_of, configured) -> QuestionSet:
    """Three questions, each answered by one of three documents, which are the passages."""
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    texts = {"seal": "a seal eats fish", "gull": "a gull nests on a cliff", "whale": "a whale eats krill"}
    corpus = [{"_id": name, "text": text} for name, text in texts.items()]
    queries = [
        {"_id": f"q {name}", "text": f"{name} does?", "answers": [text]} for name, text in texts.items()
    ]
    for file, lines in (("corpus", corpus), ("queries", queries)):
        (data / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = "".join(f"q {name}\t{name}\t1\n" for name in texts)
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    prompt = PromptTemplate("{context}\n{question}", "{text}")
    default = configured("question_answering").questions
    return replace(default, prompt=prompt, path=str(data), embedder=embedder_of)
