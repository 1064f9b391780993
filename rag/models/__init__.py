"""Models and what they are loaded from: weights, checkpoints, tokenizers."""
