"""The cache on disk: where it is, its keys, entries that are verified when they are read, and its size limit."""
