"""The verb: take the distance of pairs of images apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.attribution.result import Attribution
from simexplain.comparison import paired
from simexplain.data.images import PictureSource, read_pictures
from simexplain.data.preprocessing import notes_of, prepared
from simexplain.errors import ComparisonError, ModelError
from simexplain.explanation import versions
from simexplain.graph.inference import Graph, PairGraph, Rows, infer
from simexplain.graph.tiled import gathered
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_options import INFERENCES
from simexplain.models.avsl_runs import expected_avsl, features_and_rows, origin_warnings
from simexplain.networks import full_precision

ROLES = ("positive", "negative", "")
_FLAT_BELOW = 0.01


@typed
def attribute(
    model: nn.Module,
    a: Tensor | PictureSource,
    b: Tensor | PictureSource | Sequence[PictureSource],
    *,
    roles: Sequence[str] | None = None,
    max_batch: int | None = None,
) -> Attribution:
    """Takes the AVSL distance of pairs of images apart into the nodes of all levels (Eq. 11).

    The model is left as it was: modes, gradients, random state, edges.

    Args:
        model: An AVSL model, from ``fit``, from a file or trained.
        a: A picture: a file, a picture of PIL or an array. Or preprocessed images ``(B,3,H,W)``,
            or one ``(3,H,W)`` for all pairs.
        b: One or several pictures that it is compared with; or the image that each is compared
            with, likewise.
        roles: ``positive``, ``negative`` or empty for each pair, for the figures. Two other
            pictures without roles are the positive and the negative of a triplet.
        max_batch: Bounds the images in one forward pass; results do not depend on it.

    Raises:
        ImageError: If a picture cannot be read.
        ModelError: If the model is not an AVSL model.
        ComparisonError: If images or roles do not fit.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _attribute(model, a, b, roles, max_batch)
    others = b if isinstance(b, Sequence) and not isinstance(b, str) else [b]
    if not others:
        raise ComparisonError("Expected at least one picture to compare with, got none.")
    avsl = expected_avsl(model)
    if roles is None and len(others) == 2:
        roles = ("positive", "negative")
    pictures = read_pictures((a, *others))
    views, geometries = prepared(avsl.preprocess, pictures)
    result = _attribute(avsl, views[0], views[1:], roles, max_batch)
    return result.placed(
        notes_of(avsl.preprocess, pictures),
        pictures=tuple((pictures[0], other) for other in pictures[1:]),
        geometries=tuple((geometries[0], other) for other in geometries[1:]),
    )


@full_precision()
def _attribute(
    model: nn.Module,
    a: Tensor,
    b: Tensor,
    roles: Sequence[str] | None,
    max_batch: int | None,
) -> Attribution:
    """Of preprocessed images; see :func:`attribute`."""
    avsl = expected_avsl(model)
    first, second = paired(a, b, one_size=True)
    count = max(len(first), len(second))
    names = _roles(roles, count)
    second = second.expand(count, *second.shape[1:])
    images = torch.cat((first, second))
    features, rows = _run(avsl, images, max_batch)
    splits = [len(first), count]  # one image compared with many is run once
    rows_a, rows_b = _split(rows, splits, count)
    with torch.no_grad():
        graph = avsl.graph().detached()
        known_a, known_b = avsl.unpacked(rows_a), avsl.unpacked(rows_b)
        pairs, edges = _account(avsl, graph, known_a, known_b)
        # The way of model.distance, not the sum of the pairs, or the residual would test nothing.
        own = torch.arange(count, device=rows_a.device).unsqueeze(1)
        distances = gathered(graph, known_a, known_b, own)[:, 0]
    if not bool(distances.isfinite().all()):
        raise ModelError("A distance is not finite; look for NaN in alpha, beta or the edges.")
    units = zip(known_a.embeddings, known_b.embeddings, strict=True)
    return Attribution(
        distances=distances,
        pairs=pairs,
        edges=edges,
        levels=avsl.levels,
        embeddings=tuple(torch.stack(unit, dim=1) for unit in units),
        features=tuple(torch.stack(_split(f, splits, count), dim=1) for f in features),
        heads=tuple(
            (weight.detach(), None if bias is None else bias.detach())
            for weight, bias in avsl.weights
        ),
        images=torch.stack((first.expand_as(second), second), dim=1),
        preprocess=avsl.preprocess,
        roles=names,
        model=avsl.name,
        origin=avsl.origin,
        options=avsl.options.to_json(),
        warnings=_warnings(avsl, pairs.reliabilities),
        versions=versions(),
        regions=dict(zip(avsl.levels, avsl.regions(avsl.levels, images), strict=True)),
    )


def _account(model: AVSL, graph: Graph, a: Rows, b: Rows) -> tuple[PairGraph, tuple[Tensor, ...]]:
    """The graph of the pairs and the edges, as they are reported.

    A mean over levels has no stand-ins. The edges and reliabilities that make the graph compute it
    would be taken for something learned; sensitivities are exact as they are.
    """
    pairs = infer(graph, a, b)
    if model.options.inference != "levels":
        return pairs, graph.edges
    pair = PairGraph(
        nodes=pairs.nodes,
        reliabilities=tuple(torch.ones_like(level) for level in pairs.nodes),
        rectified=pairs.nodes,
        inflows=pairs.sensitivities,
        sensitivities=pairs.sensitivities,
    )
    return pair, tuple(torch.zeros_like(part) for part in graph.edges)


def _roles(roles: Sequence[str] | None, count: int) -> tuple[str, ...]:
    names = ("",) * count if roles is None else tuple(roles)
    if len(names) != count or any(role not in ROLES for role in names):
        raise ComparisonError(
            f"Expected one role of positive, negative or '' for each of {count} pairs, got {names}."
        )
    return names


def _split(rows: Tensor, splits: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    a, b = rows[: splits[0]], rows[splits[0] :]
    return a.expand(count, *a.shape[1:]), b


def _run(model: AVSL, images: Tensor, max_batch: int | None) -> tuple[list[Tensor], Tensor]:
    """Feature maps per level ``(M,C,h,w)`` and rows ``(M,E)``, without any graph."""
    if max_batch is not None and max_batch < 1:
        raise ComparisonError(f"Expected max_batch of at least 1, got {max_batch}.")
    features, row = features_and_rows(model, images, max_batch)
    if not bool(row.isfinite().all()):
        raise ModelError(
            "An embedding is not finite, so its distance is undefined; look for NaN in the weights "
            "or the input."
        )
    return features, row


def _warnings(model: AVSL, reliabilities: Sequence[Tensor]) -> tuple[str, ...]:
    warnings = [*origin_warnings(model, still="the account adds up, but ")]
    inference = model.options.inference
    if inference != "full":
        warnings.append(f"This model measures an ablation: {INFERENCES[inference]}.")
    if len(model.levels) > 1 and int(model.edge_updates) == 0 and inference == "full":
        warnings.append("The edges were never set, so no lower node stands in for a higher one.")
    if alone := [n for n, width in enumerate(model.widths) if width == 1]:
        warnings.append(
            f"Level {alone[0]} has one node, whose unit embedding is 1 or -1 for every picture; "
            "fit more nodes or more pictures."
        )
    learned = reliabilities[1:] if inference in ("full", "reliable") else ()
    upper = [level.std() for level in learned if level[0].numel() > 1]
    if upper and float(max(upper)) < _FLAT_BELOW:
        warnings.append(
            f"Reliabilities hardly differ (standard deviation {float(max(upper)):.1g}), so which "
            "node is called unreliable means little; train alpha and beta, or fit with labels."
        )
    return tuple(warnings)
