"""The index of a corpus: chunks, vectors and postings, on disk (store, writer) or in memory; search and fusion."""
