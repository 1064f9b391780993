"""scripts/bench.py: a table, then one JSON line that ends stdout."""

import json
from dataclasses import dataclass

import bench
from omegaconf import OmegaConf

from rag.measure import Row


@dataclass(frozen=True)
class Fake:
    repeats: int = 3

    def run(self) -> list[Row]:
        return [Row(f"{self.repeats} repeats", {"ms": 1.0}, {"peer": {"ms": 2.0}}, {"peer": 2.0})]


def test_the_last_line_is_the_record(capsys):
    config = OmegaConf.create({"bench": {"_target_": f"{__name__}.Fake", "repeats": 5}})
    bench.main(config)
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record["bench"] == "test_bench"
    assert record["machine"]["versions"]["jax"]
    assert record["rows"] == [
        {"case": "5 repeats", "ours": {"ms": 1.0}, "peers": {"peer": {"ms": 2.0}}, "ratio": {"peer": 2.0}}
    ]
    assert any("5 repeats" in line for line in lines[:-1])
