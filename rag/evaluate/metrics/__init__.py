"""Metrics of retrieval, of evidence spans and of answers."""
