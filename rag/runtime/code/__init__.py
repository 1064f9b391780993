"""Code versions: cache keys of the code that a stage runs, so that edited code never finds an older result."""
