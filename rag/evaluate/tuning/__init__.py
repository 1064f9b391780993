"""Tuning of fusion, BM25 and cut-offs, with nested cross-validation."""
