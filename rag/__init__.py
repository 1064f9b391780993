"""A laboratory for retrieval-augmented generation in JAX: files in, grounded and cited answers out."""
