"""Ours beside named peers: a table, then one JSON line.

    python scripts/bench.py bench=attention
    python scripts/bench.py bench=search bench.repeats=3 | tail -1 | python -m json.tool

A ratio above 1: ours is better. Peers that are not installed are named and left out (`make bench-setup`).
"""

from launch import build, launch

from rag.measure import bench_json, print_table, roofs


def main(config) -> None:
    benchmark = build(config.bench)
    machine = roofs()
    rows = benchmark.run()
    name = type(benchmark).__module__.rpartition(".")[2]
    print(
        f"roofs: {machine['gemm_flops'] / 1e9:.4g} GFLOP/s of float32 matrix products, "
        f"{machine['read_bytes_per_s'] / 1e9:.4g} GB/s read from memory"
    )
    print_table(rows, title=name)
    print(bench_json(name, rows, machine))


if __name__ == "__main__":
    launch(main, "bench")
