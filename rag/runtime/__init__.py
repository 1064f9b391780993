"""Services for every stage: the cache and its keys, checksums, clocks, option types, JSON schemas, array sizes."""
