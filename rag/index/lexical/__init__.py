"""Lexical search: analyzer, inverted index, BM25 and TF-IDF."""
