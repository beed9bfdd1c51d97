"""Similarity models: wrapping, loading, saving and making them faster."""
