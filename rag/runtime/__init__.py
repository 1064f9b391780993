"""What every stage needs of the machine: the cache and its keys, checksums, clocks, option types, JSON schemas."""
