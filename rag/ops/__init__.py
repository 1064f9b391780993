"""Array functions: pure functions on jax.Array, without I/O or classes with state."""
