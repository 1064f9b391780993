"""Datasets, metrics, statistics and reports."""
