"""Training of embedding models on lightning: what `simexplain train` does."""
