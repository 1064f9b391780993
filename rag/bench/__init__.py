"""Benchmarks of ours beside named peers, one file a benchmark; none imports Hydra."""
