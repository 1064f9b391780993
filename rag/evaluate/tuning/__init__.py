"""Tuning of fusion weights and BM25's parameters with nested cross-validation, over search results computed once."""
