"""The checks of one row of the matrix, each a function that returns nothing or says what is wrong.

``docs/scripts/make_compatibility.py`` runs the same functions and writes their verdicts to a page.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from compat_net import DEPTH, Grid, Net
from compat_probes import (
    as_grid,
    changed,
    followed,
    outputs,
    pictures,
    plain_map,
    ready,
    same_maps,
    unwrapped,
    vector,
)
from torch import Tensor, nn

from simexplain import Comparison, as_similarity_model, explain, match
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import SimexplainError
from simexplain.tracing import trace

SHARE = re.compile(r"\d[\d.]*(e-?\d+)? ?(%|of )")
STEPS = 4
ENOUGH = 12


class Case:
    """A built row: the network, images, and what simexplain makes of them."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.wrapped = ready(net)
        self.module = unwrapped(self.wrapped)
        if net.trains:  # what is right is what eval mode gives
            self.module = unwrapped(ready(replace(net, trains=False)))
        self.images = pictures(net)
        self.pair = Comparison.pair(self.images[:1], self.images[1:2])
        self.triplet = Comparison.triplet(*(self.images[n : n + 1] for n in range(3)))

    @cached_property
    def model(self) -> Any:
        return self.similarity_model(self.wrapped)

    def similarity_model(self, module: nn.Module) -> Any:
        kept = {"output": self.net.output} if self.net.output is not None else {}
        channels = {3: {}}.get(
            self.net.channels,
            {"mean": (0.5,) * self.net.channels, "std": (0.25,) * self.net.channels},
        )
        return as_similarity_model(
            module, preprocess=Preprocess(size=self.net.size, **channels), **kept,
            **self.net.options,
        )  # fmt: skip

    @cached_property
    def sam(self) -> Any:
        """An explanation at simexplain's own default layer."""
        return explain(self.model, self.pair)

    @property
    def layer(self) -> str:
        """simexplain's own choice."""
        return str(self.sam.layers[0])

    @cached_property
    def right(self) -> set[str]:
        """Every name of a right default."""
        return same_maps(self.net, self.module, self.images[:2])

    def grid_of(self, layer: str) -> Grid:
        """The grid of a layer, by hand."""
        others = {**self.net.or_warned, **self.net.also}
        return self.net.grid if layer in self.right else others.get(layer, self.net.grid)


def check_default(case: Case) -> None:
    """The default layer is one of those written down, and its grid is."""
    net, layer = case.net, case.layer
    grid = tuple(case.sam.maps.shape[-2:])
    if layer in net.or_warned and layer not in case.right:
        lines = [text for text in case.sam.warnings if SHARE.search(text)]
        assert lines, f"'{layer}' is bypassed, and no warning names the share: {case.sam.warnings}"
    else:
        allowed = case.right | set(net.also)
        assert layer in allowed, f"default '{layer}' {grid}, right: {', '.join(net.default)}"
    assert grid == case.grid_of(layer), f"grid {grid} of '{layer}', right: {case.grid_of(layer)}"


def check_stages(case: Case) -> None:
    """Stages are ends of blocks: grids as written, in order, the last one that of the default."""
    net = case.net
    result = [c.shape[1:] for c in case.model.layers_for(case.images) if c.stage]
    names = [c.name for c in case.model.layers_for(case.images) if c.stage]
    record = ", ".join(f"{name} {h}x{w}" for name, (h, w) in zip(names, result, strict=True))
    assert result, "no stages"
    assert len(result) <= 4, f"{len(result)} stages: {record}"
    if case.layer not in case.right:
        raise AssertionError(f"the default is wrong, and stages end in it: {record}")
    assert tuple(result[-1]) == net.grid, f"stages do not end in the default: {record}"
    if net.stages == DEPTH:
        assert all(tuple(grid) == net.grid for grid in result), f"not one resolution: {record}"
        assert len(result) >= 2, f"one stage for several blocks: {record}"
        return
    cells = [h * w for h, w in result]
    assert all(a > b for a, b in itertools.pairwise(cells)), f"not falling: {record}"
    if net.stages is not None:
        wanted = tuple(net.stages)
        last = tuple(map(tuple, result[-len(wanted) :]))
        assert last == wanted, f"{record}; right: {wanted}"


def check_maps(case: Case) -> None:
    """The SAM map at the right layer equals plain autograd on each image alone."""
    net = case.net
    layer = case.layer if case.layer in net.or_warned or not net.default else net.default[0]
    result = explain(case.model, case.pair, layer=layer)
    assert tuple(result.maps.shape[-2:]) == case.grid_of(layer), tuple(result.maps.shape)
    weight = result.weights[0]
    for index in range(2):
        image = case.images[index : index + 1]
        direction = weight if weight.dim() == 1 else weight[index]
        own = plain_map(net, case.module, layer, case.grid_of(layer), image, direction)
        gap = float((result.maps[0, index] - own).abs().max() / own.max().clamp(min=1e-12))
        assert gap < net.tolerance, f"map {index + 1} at '{layer}' is {gap:.1e} of its maximum off"
    if float(result.maps.max()) <= 0:
        assert any("empty" in text for text in result.warnings), "empty maps without a warning"


def check_exact(case: Case) -> None:
    """Exact methods add up to the score, or a warning names the share that is missing."""
    parts = explain(case.model, case.pair, method="decomposition", layer=case.layer, steps=STEPS)
    scale = max(0.1, float(parts.scores.abs().max()))
    gap = float((parts.maps.sum((2, 3)) - parts.scores).abs().max()) / scale
    if gap > case.net.exact and not any(SHARE.search(text) for text in parts.warnings):
        raise AssertionError(f"decomposition misses {gap:.1e} of its score: {parts.warnings}")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        result = match(
            case.model, case.images[:1], case.images[1:2], layer=case.layer, jacobians=STEPS
        )
    gap = float(result.residual.abs().max()) / max(0.1, float(result.score.abs().max()))
    if gap > case.net.exact and not any(SHARE.search(text) for text in result.warnings):
        raise AssertionError(f"match misses {gap:.1e} of its score: {result.warnings}")


def check_plain(case: Case) -> None:
    """A network that normalises its own output is explained as the same one that does not."""
    if case.net.plain is None:
        return
    other = case.similarity_model(ready(case.net, plain=True))
    layer = case.net.default[0]
    for method, options in (
        ("decomposition", {}),
        ("similarity_cam", {"score": "held"}),
    ):
        a = explain(case.model, case.pair, method=method, layer=layer, **options).maps
        b = explain(other, case.pair, method=method, layer=layer, **options).maps
        # Both may be empty: similarity_cam shows what raises the score alone.
        gap, scale = float((a - b).abs().max()), float(b.abs().max())
        assert scale > 0 or method != "decomposition", "nothing to compare"
        assert gap <= 1e-4 * scale, f"{method}: {gap:.1e} of {scale:.1e} off the plain network's"
    first, second = case.images[:1], case.images[1:2]
    a = match(case.model, first, second, layer=layer).matrix
    b = match(other, first, second, layer=layer).matrix
    gap = float((a - b).abs().max() / b.abs().max())
    assert gap < 1e-4, f"match: {gap:.1e} of the plain network's matrix off"


def places_followed(case: Case, *, by_hand: bool) -> int:
    """In how many of sixteen places the map of the default layer follows the input."""
    net = case.net
    changes, places = changed(net, case.images[0])
    batch = torch.cat([case.images[:1], changes])
    if by_hand:
        maps = as_grid(net, outputs(net, case.module, batch)[net.default[0]], net.grid)
        assert maps is not None
    else:
        with torch.no_grad():
            maps = trace(case.model, batch, [case.layer]).maps[case.layer].detach()
    return followed(maps, places, net.size)


def check_places(case: Case) -> None:
    """Sixteen places of the input are changed, and the default layer's map follows."""
    if not case.net.tokens:
        return
    own = places_followed(case, by_hand=True)
    result = places_followed(case, by_hand=False)
    least = min(ENOUGH, own - 1)
    assert result >= least, (
        f"the map of '{case.layer}' follows {result} of 16 places (right: {own})"
    )


METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sam", {}),
    ("focus", {}),
    ("similarity_cam", {}),
    ("decomposition", {"steps": STEPS}),
    ("saliency", {}),
)


def check_clear(case: Case) -> None:
    """Every method gives finite maps that are not all empty, or a sentence that says what to do."""
    for method, options in METHODS:
        check_method(case, method, options)


def check_method(case: Case, method: str, options: dict[str, Any]) -> None:
    """One method on a triplet; only focus may refuse, and only for want of stages."""
    try:
        result = explain(case.model, case.triplet, method=method, **options)
    except SimexplainError as error:
        text = str(error)
        assert text.endswith("."), f"{method}: {text}"
        assert "\n" not in text, f"{method}: {text}"
        if method != "focus" or "stage" not in text:
            raise AssertionError(f"{method} refuses: {text}") from error
    except Exception as error:
        raise AssertionError(f"{method}: {type(error).__name__}: {error}") from error
    else:
        assert bool(result.maps.isfinite().all()), f"{method}: not finite"
        empty = float(result.maps.abs().max()) == 0
        assert not empty or result.warnings, f"{method}: empty without a warning"


def check_refused(net: Net) -> str | None:
    """A network that cannot be explained gets a sentence; None where it can be after all."""
    try:
        case = Case(net)
        explain(case.model, case.pair)
    except SimexplainError as error:
        text = str(error)
        assert text.endswith("."), text
        assert "\n" not in text, text
        assert re.search(net.refused, text), f"the sentence does not say why: {text}"
        return text
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    return None


CHECKS: dict[str, Callable[[Case], None]] = {
    "default": check_default,
    "stages": check_stages,
    "maps": check_maps,
    "exact": check_exact,
    "plain": check_plain,
    "places": check_places,
    "clear": check_clear,
}


def checks_of(net: Net) -> list[str]:
    """The checks that mean something for a row."""
    if net.refused:
        return ["refused"]
    left_out = {"plain": net.plain is None, "places": not net.tokens}
    return [name for name in CHECKS if not left_out.get(name, False)]


def agrees(case: Case, images: Tensor) -> Tensor:
    """Unit rows by the network itself."""
    with torch.no_grad():
        return nn.functional.normalize(vector(case.net, case.module, images), dim=1)
