"""Embedding models: training, evaluation, and the quickstart that shows both on small real data."""
