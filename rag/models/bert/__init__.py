"""The BERT family of encoders: model, configuration, checkpoint."""
