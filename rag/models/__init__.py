"""Define the models, and load their checkpoints: weights, configurations, tokenizers."""
