"""How steady maps are, how alike two of them are, and what is left of them at random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.errors import ComparisonError, ModelError, SimexplainError
from simexplain.metrics.curves import Score, baseline_of
from simexplain.metrics.maps import grown

Explainer = Callable[[Tensor], Tensor]
"""From images ``(M,3,H,W)`` to their heatmaps ``(M,h,w)``."""


@typed
def infidelity(
    score: Score,
    images: Tensor,
    heatmaps: Tensor,
    *,
    baseline: str | Tensor = "mean",
    patch: float = 0.25,
    samples: int = 100,
    scaled: bool = True,
    max_batch: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Infidelity (Yeh et al. 2019) with squares removed: how wrongly heat foretells the loss.

    The mean over random squares of ``(heat inside the square - loss of score)^2``, by captum.

    Args:
        score: Scores ``(M,)`` of single images.
        images: ``(M,3,H,W)``.
        heatmaps: ``(M,h,w)``, signed, upsampled bilinearly.
        baseline: What squares are replaced by, as for ``deletion``.
        patch: Side of the squares as a share of the shorter side.
        samples: Squares for each image.
        scaled: Heat has no unit, so take the scale of each map that fits best; 1 otherwise.
        max_batch: Bounds the images in one call of ``score``.
        seed: Of the squares, the same for every map and method.

    Returns:
        ``(M,)``, at least 0, in squared units of the score; lower is better.
    """
    metrics = _captum()
    size = (int(images.shape[-2]), int(images.shape[-1]))
    heat = grown(heatmaps.to(images.device), size).to(images.dtype)
    if heat.dim() != 3 or len(heat) != len(images):
        raise ComparisonError(
            f"Expected one heatmap (h,w) for each of {len(images)} images, got "
            f"{tuple(heatmaps.shape)}."
        )
    side = max(1, round(patch * min(size)))
    values = []
    for image, own in zip(images.detach(), heat, strict=True):
        generator = torch.Generator().manual_seed(seed)
        ground = baseline_of(image, baseline)
        value = metrics.infidelity(
            score,
            lambda many, generator=generator, ground=ground: _punched(
                many, ground, side, generator
            ),
            image[None],
            # Captum wants an attribution for every value: a third of the heat for each channel.
            (own / len(image)).expand_as(image)[None],
            n_perturb_samples=samples,
            max_examples_per_batch=max_batch,
            normalize=scaled,
        )
        values.append(value.detach().cpu().double())
    return torch.cat(values)


def _punched(
    images: Tensor, ground: Tensor, side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What was removed (ones in the squares) and the images without it, ``(n,3,H,W)`` both."""
    holes = torch.zeros_like(images)
    height, width = images.shape[-2:]
    for hole in holes:
        top = int(torch.randint(height - side + 1, (), generator=generator))
        left = int(torch.randint(width - side + 1, (), generator=generator))
        hole[:, top : top + side, left : left + side] = 1
    return holes, torch.where(holes > 0, ground, images)


@typed
def sensitivity(
    explainer: Explainer,
    images: Tensor,
    *,
    radius: float = 0.02,
    samples: int = 10,
    max_batch: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Max-sensitivity (Yeh et al. 2019): the farthest a map moves under invisible noise.

    ``max |map(x + noise) - map(x)| / |map(x)|`` over uniform noise in [-radius, radius], by captum.

    Args:
        explainer: Maps of images; it may differentiate.
        images: ``(M,3,H,W)``.
        radius: In units of ``images``.
        samples: Noises for each image.
        max_batch: Bounds the images in one call of ``explainer``.
        seed: Of the noise.

    Returns:
        ``(M,)``, at least 0; lower is steadier.
    """
    metrics = _captum()

    def explained(given: Any) -> Any:
        many = isinstance(given, tuple)
        with torch.enable_grad():  # captum calls with gradients switched off
            maps = explainer(given[0] if many else given).detach()
        return (maps,) if many else maps  # which captum takes apart as it gave it

    values = []
    for image in images.detach():
        noisy = _noise(radius, torch.Generator().manual_seed(seed))
        value = metrics.sensitivity_max(
            explained, image[None], perturb_func=noisy, n_perturb_samples=samples,
            max_examples_per_batch=max_batch,
        )  # fmt: skip
        values.append(value.detach().cpu().double())
    return torch.cat(values)


def _noise(radius: float, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    def noisy(images: Tensor) -> Tensor:
        return images + radius * (2 * torch.rand(images.shape, generator=generator) - 1).to(images)

    return noisy


def _captum() -> Any:
    try:
        return import_module("captum.metrics")
    except ImportError as error:
        raise SimexplainError(
            "Infidelity and sensitivity are computed by captum, which is not installed; "
            "say pip install captum."
        ) from error


def spearman(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two heatmaps ``(h,w)``, ties at their mean rank.

    In [-1, 1]; NaN where a map is flat. The coarser map is upsampled bilinearly.
    """
    left, right = (_mean_ranks(values) for values in _paired(one, other))
    return _cosine(left - left.mean(), right - right.mean())


def top_overlap(one: Tensor, other: Tensor, share: float = 0.1) -> float:
    """Which part of the hottest pixels of one heatmap ``(h,w)`` are the hottest of the other.

    In [0, 1]; two random maps reach ``share``. The coarser map is upsampled bilinearly, ties are
    broken by index.

    Args:
        one: ``(h,w)``.
        other: ``(h,w)``.
        share: The share of pixels that count as the hottest, in (0, 1].
    """
    if not 0 < share <= 1:
        raise ComparisonError(f"Expected a share in (0, 1], got {share}.")
    pair = _paired(one, other)
    most = max(1, round(share * len(pair[0])))
    chosen = [set(v.argsort(descending=True, stable=True)[:most].tolist()) for v in pair]
    return len(chosen[0] & chosen[1]) / most


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of two heatmaps ``(h,w)`` as vectors: in [-1, 1], NaN where one is zero."""
    return _cosine(*_paired(one, other))


AGREEMENTS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "spearman": spearman,
    "top_overlap": top_overlap,
    "cosine": cosine,
}
"""How alike two heatmaps are; a new measure is one function and one line here."""


def _paired(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if one.dim() != 2 or other.dim() != 2:
        raise ComparisonError(
            f"Expected two heatmaps (h,w), got {tuple(one.shape)} and {tuple(other.shape)}."
        )
    height, width = (max(one.shape[axis], other.shape[axis]) for axis in (0, 1))
    left, right = (grown(m, (height, width)).flatten().cpu().double() for m in (one, other))
    return left, right


def _mean_ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    counts = counts.double()
    ranks: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return ranks[inverse]


def _cosine(left: Tensor, right: Tensor) -> float:
    product = left.norm() * right.norm()
    return float((left @ right) / product) if bool(product > 0) else float("nan")


def randomisable(network: nn.Module) -> tuple[str, ...]:
    """The names of all modules with float values of their own, from the last to the first.

    The order is that of registration, which is the order of execution in networks written down
    from input to output.
    """
    named = [name for name, module in network.named_modules() if _own(module)]
    return tuple(reversed(named))


@contextmanager
def randomised(
    network: nn.Module, how_far: int, seed: int = 0, layers: Sequence[str] | None = None
) -> Iterator[tuple[str, ...]]:
    """Forgets the last ``how_far`` layers while the block runs (Adebayo et al. 2018).

    The cascading parameter randomisation: a map that explains the network must change with it.
    Parameters and buffers are initialised anew by ``reset_parameters`` where a layer without parts
    has it; what that leaves alone is permuted. A constant cannot be permuted away, and integers,
    which are counters and index tables, stay unless ``reset_parameters`` sets them. Every layer
    draws from a seed of its own, so a block that goes further has the same values in the layers of
    one that goes less far.

    Afterwards, also after an exception, every value is what it was, bit for bit, and the random
    state, gradients and hooks are untouched.

    Args:
        network: Changed in place inside.
        how_far: How many layers, from the last on.
        seed: Of the new values.
        layers: Names from the last to the first; :func:`randomisable` by default.

    Yields:
        The names of the forgotten layers.

    Raises:
        ModelError: If the layer does not exist, or the network has fewer layers.
    """
    names = tuple(layers) if layers is not None else randomisable(network)
    modules: dict[str, nn.Module] = dict(network.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown or not 0 <= how_far <= len(names):
        what = f"has no layer '{unknown[0]}'" if unknown else f"has {len(names)} layers to forget"
        raise ModelError(f"The network {what}; randomisable lists them (got {how_far}).")
    chosen = [modules[name] for name in names[:how_far]]
    kept = [
        (holder, dict(holder), _copies(holder))
        for module in chosen
        for holder in (module._parameters, module._buffers)
    ]
    try:
        _forget(chosen, seed)
        yield names[:how_far]
    finally:
        _restore(kept)


def _forget(modules: Sequence[nn.Module], seed: int) -> None:
    devices = {t.device.index for module in modules for t in _own(module) if t.is_cuda}
    on = [index for index in devices if index is not None]
    with torch.random.fork_rng(devices=on), torch.no_grad():
        for number, module in enumerate(modules):
            torch.default_generator.manual_seed(seed * 1_000_003 + number)
            for index in on:
                torch.cuda.default_generators[index].manual_seed(seed * 1_000_003 + number)
            before = [tensor.clone() for tensor in _own(module)]
            reset = getattr(module, "reset_parameters", None)
            # A module with parts may reset those too, which then were never kept.
            if callable(reset) and next(module.children(), None) is None:
                reset()
            for old, tensor in zip(before, _own(module), strict=True):
                if torch.equal(old, tensor):
                    order = torch.randperm(tensor.numel()).to(tensor.device)
                    tensor.copy_(old.flatten()[order].view_as(old))


def _copies(holder: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone()
        for name, tensor in holder.items()
        if tensor is not None and _writable(tensor)
    }


def _restore(kept: Sequence[tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]]) -> None:
    with torch.no_grad():
        for holder, objects, values in kept:
            holder.clear()
            holder.update(objects)
            for name, value in values.items():
                holder[name].copy_(value)


def _writable(tensor: Any) -> bool:
    """Whether it can be written to: neither still without a shape nor one value seen many times."""
    if not isinstance(tensor, Tensor) or nn.parameter.is_lazy(tensor):
        return False
    return all(step or side < 2 for side, step in zip(tensor.shape, tensor.stride(), strict=True))


def _own(module: nn.Module) -> list[Tensor]:
    """Float parameters and buffers of a module itself, without those of its parts."""
    held = (*module._parameters.values(), *module._buffers.values())
    usable = [tensor for tensor in held if tensor is not None and _writable(tensor)]
    return [tensor.detach() for tensor in usable if tensor.is_floating_point()]
