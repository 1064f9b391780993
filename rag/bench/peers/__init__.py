"""Peers that several benchmarks share."""
