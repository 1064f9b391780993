"""Benchmarks of ours beside named peers; none imports Hydra, so each also runs where it is not installed."""
