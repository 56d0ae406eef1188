"""Scores of a model on rows: likelihood, generation, metrics."""
