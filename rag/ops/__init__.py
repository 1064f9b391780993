"""Pure functions on jax.Array: no I/O, no classes with state."""
