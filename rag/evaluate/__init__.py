"""Evaluation: datasets, metrics, statistics, tuning, context ablation and numerical sensitivity."""
