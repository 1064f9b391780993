"""Lexical search: the analyzer, the postings (inverted index), and the weights of BM25 and TF-IDF."""
