"""How much of a score no position of a layer accounts for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from simexplain.models.surveyed import RELEVANT

LARGE = 0.5
"""Above this share less than half of a score comes from positions, so that a map of it is mostly an
even spread of what is not in the image; a warning reports it."""


def unexplained_share(scores: Tensor, explained: Tensor) -> Tensor:
    """The share of scores that is not explained, in [0, 1], whatever its sign.

    A score is what positions add to it, plus biases, plus what passes by the layer, plus what an
    integration misses. The share is ``|s - p| / (|p| + |s - p|)`` with ``p`` the sum over
    positions: the usual share where both have one sign, and still one of a whole where they cancel
    and the score is near zero.

    Args:
        scores: Of any shape.
        explained: What the positions alone add up to, no bias spread over them; likewise.
    """
    rest = (scores - explained).abs().double()
    whole = explained.abs().double() + rest
    share: Tensor = (rest / whole.clamp_min(1e-300)).to(scores.dtype)
    return share


def bypass_warning(bypass: Mapping[str, float]) -> tuple[str, ...]:
    """What to say of a layer that a large share of the embedding bypasses."""
    return tuple(
        f"{share:.0%} of the embedding bypasses layer '{layer}' (measured on two pictures; it "
        "varies with them), which maps of it cannot show."
        for layer, share in bypass.items()
        if share > RELEVANT
    )


def unexplained_share_warning(share: float, layer: str) -> tuple[str, ...]:
    """What to say of the largest share, if it is large."""
    if not share > LARGE:
        return ()
    return (
        f"The positions of layer {layer} account for only {1 - share:.0%} of a score; the rest "
        "(biases, what passes by the layer, functions that are not linear) belongs to no place in "
        "the image.",
    )
