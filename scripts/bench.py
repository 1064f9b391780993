"""Run a benchmark of ours beside named peers, and print a table, then one JSON line.

    python scripts/bench.py bench=attention
    python scripts/bench.py bench=search bench.repeats=3 | tail -1 | python -m json.tool
    python scripts/bench.py bench=search keep=results/bench && python scripts/tables.py

A ratio above 1 means that ours is better. Peers that are not installed are named and left out (`make bench-setup`). The
run's folder, and the folder `keep`, get NAME.jsonl, to which the line is appended, NAME.md and NAME.png.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra_run import overrides, run_dir
from launch import launch
from settings import Part, Shared, build

from rag.bench.peak_throughput import best_peak, measure_peaks, with_shares
from rag.bench.record import bench_json, print_table
from rag.runtime.files import atomic_file
from rag.runtime.options import Filled


@dataclass(frozen=True, kw_only=True)
class BenchSettings(Shared):
    """The settings of conf/bench.yaml."""

    bench: Part
    keep: Filled | None
    name: Filled | None


def main(config) -> None:
    from rag.bench import page

    benchmark = build(config.bench)
    name = type(benchmark).__module__.rpartition(".")[2]
    load_before, before = [round(load, 2) for load in os.getloadavg()], measure_peaks()
    rows = benchmark.run()
    peaks = best_peak(before, measure_peaks())
    try:
        rows = with_shares(rows, peaks)
    except RuntimeError:  # a bug, unless the machine was busy both times: measure it once more
        print_table(rows, title=f"{name}, without the shares of peaks")
        peaks = best_peak(peaks, measure_peaks())
        rows = with_shares(rows, peaks)
    print("peaks: " + ", ".join(_peak_text(name, rate) for name, rate in peaks.items()))
    print_table(rows, title=name)
    line = bench_json(name, rows, peaks, command=command(overrides()), load_before=load_before)
    picture = getattr(benchmark, "picture", page.ratios)(rows)
    for folder in [run_dir(), *([Path(config.keep).expanduser()] if config.keep else [])]:
        write(folder / (config.name or name), line, picture)
        print(f"table and picture: {folder}", file=sys.stderr)
    print(line)


def _peak_text(name: str, rate: float) -> str:
    units = {
        "gemm_flops": "GFLOP/s of float32 matrix products",
        "bf16_flops": "GFLOP/s of bfloat16 ones",
        "int8_ops": "GOP/s of int8 ones",
        "read_bytes_per_s": "GB/s read from memory",
    }
    size = name.removeprefix("read_bytes_per_s of ")
    return f"{rate / 1e9:.4g} {units.get(name, f'GB/s of {size} read repeatedly')}"


def command(given: Sequence[str]) -> str:
    """Return the command that repeats this run: of paths only the last name, and neither `keep` nor `name`."""
    settings = [
        re.sub(r"=('?)[~/]\S*/", r"=\1.../", text) for text in given if not re.match(r"(keep|name)=", text)
    ]
    environment = ["RAG_NATIVE=0"] if os.environ.get("RAG_NATIVE") == "0" else []
    return " ".join([*environment, "python scripts/bench.py", *settings])


def write(stem: Path, line: str, picture: bytes | None) -> None:
    """Append the line to stem.jsonl; replace stem.md and stem.png."""
    from rag.bench.page import markdown
    from rag.bench.record import read_records

    stem.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{stem}.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    if picture is not None:
        with atomic_file(f"{stem}.png") as file:
            file.write(picture)
    with atomic_file(f"{stem}.md", "w") as file:
        name = f"{stem.name}.png" if picture is not None else None
        file.write(markdown(stem.name, read_records(Path(f"{stem}.jsonl")), name))


if __name__ == "__main__":
    launch(main, "bench", BenchSettings)
