"""The Llama family of decoders: model, configuration, checkpoint."""
