"""Similarity attention and focus from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from simexplain.comparison import Comparison
from simexplain.methods.focus import Focus
from simexplain.methods.method import AttentionMaps
from simexplain.methods.raw_vectors import trace_vectors
from simexplain.methods.similarity_attention import SimilarityAttention
from simexplain.models.base import SimilarityModel
from simexplain.networks import unit_rows

Attending = SimilarityAttention | Focus


def attended(
    model: SimilarityModel,
    images: Comparison,
    methods: Sequence[tuple[Attending, Sequence[str]]],
    *,
    max_batch: int | None = None,
) -> list[AttentionMaps]:
    """What each method finds by itself, from one forward pass for all of them.

    Args:
        model: The model; its unit rows are its vectors at unit length (:func:`shares`).
        images: Images ``(3,H,W)`` in a comparison.
        methods: Each with its layers. Gradients go down to the lowest layer of each.
        max_batch: Bounds the images of one forward pass.

    Raises:
        ModelError: If a layer cannot be used or the embeddings are zero or not finite.
    """
    every = tuple(dict.fromkeys(layer for _, layers in methods for layer in layers))
    flat = images.stacked().flatten(0, 1)
    traced = trace_vectors(model, flat, every, max_batch=max_batch, middle=False, by_rows=True)
    model.measure(flat, traced.recorded, unit_rows)
    return [
        method.follow(model, images, traced.trace.at(layers), max_batch=max_batch)
        if isinstance(method, Focus)
        else method.attend(
            traced.units.at(layers), images, apart=model.apart(layers, flat)
        ).detached()
        for method, layers in methods
    ]


def shares(model: SimilarityModel) -> bool:
    """Whether one pass serves both: the model's rows are its vectors, brought to unit length."""
    return type(model).vectors is not SimilarityModel.vectors
