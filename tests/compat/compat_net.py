"""One row of the matrix: how a network is built, and what is right for it, written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Grid = tuple[int, int]
DEPTH = "depth"


@dataclass(frozen=True)
class Net:
    """A network and the answers that its source code gives; nothing here comes from simexplain.

    Attributes:
        name: Unique in the matrix.
        package: Where the architecture comes from; the row is skipped where it is not installed.
        build: Makes the network, small and random; the seed is set before.
        size: ``(height, width)`` of the images: small, legal, not square where the network allows.
        default: Layers that are right, best name first. They give the same map or one that a
            position-wise operation (a norm, an activation) makes of it; other names of the very
            same tensor are found by a hook and need not be written down.
        grid: ``(h, w)`` of the default.
        stages: Grids of the ends of blocks, coarsest last, at most four; ``DEPTH`` where the
            network has one resolution; None where its main path does not say. A found list may
            begin with a finer grid of the stem.
        tokens: Whether the default is a sequence of tokens or comes of one: then sixteen places of
            the input are changed and the map must follow.
        prefix: Class, distillation and register tokens before those of the patches.
        middle: The prefix stands in the middle, after half of the patches.
        order: ``(h, w) -> permutation`` of cells that are not in raster order.
        output: What to pass as ``output=``: a key or a function.
        forward: How the network embeds images, where calling it with them does not.
        channels: Channels of an image.
        also: Other layers that are as right, with their grids.
        or_warned: Other layers that are right if a warning names the share that bypasses them, with
            their grids.
        refused: Instead of all else: a clear error whose sentence matches this pattern is right.
        spread: Weights are drawn anew so that signals keep their size: with those that it starts
            with, a change at one place is drowned by what mixes all places.
        trains: It is given in training mode, and must be explained as in eval mode.
        plain: The same network without its own normalisation: results must agree with it.
        route: How it goes through a file: ``save``, ``export`` or ``state`` (None: not tried).
        backbone: For ``state``: the name that rebuilds it.
        options: More arguments of ``as_similarity_model``.
        tolerance: Of maps against plain autograd, as a share of the maximum.
        exact: What exact methods may miss of a score without a warning.
        quick: Part of ``make test``.
        why: What makes the default right, or what is special.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    size: Grid
    default: tuple[str, ...]
    grid: Grid
    stages: tuple[Grid, ...] | str | None = None
    tokens: bool = False
    prefix: int = 0
    middle: bool = False
    order: Callable[[Grid], Tensor] | None = None
    output: Any = None
    forward: Callable[[nn.Module, Tensor], Any] | None = None
    channels: int = 3
    also: Mapping[str, Grid] = field(default_factory=dict)
    or_warned: Mapping[str, Grid] = field(default_factory=dict)
    refused: str = ""
    spread: bool = False
    trains: bool = False
    plain: Callable[[], nn.Module] | None = None
    route: str | None = None
    backbone: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-4
    exact: float = 1e-5
    quick: bool = False
    why: str = ""


def halving(last: Grid, count: int = 4) -> tuple[Grid, ...]:
    """Grids of a pyramid that halves its sides from stage to stage, coarsest last."""
    return tuple((last[0] << n, last[1] << n) for n in reversed(range(count)))
