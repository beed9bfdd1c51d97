"""Methods: from a model and a comparison to maps."""

from __future__ import annotations

from collections.abc import Callable

from simexplain.methods.similarity_attention import AttentionMaps, SimilarityAttention

Method = Callable[..., AttentionMaps]

METHODS: dict[str, Callable[..., Method]] = {"sam": SimilarityAttention}
"""Every method by name: called with its options it gives ``(model, images, layers) -> maps``."""
