"""Similarity mining: what is left when the attended regions are hidden shall decide nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.func import functional_call

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError, ModelError, check_choice
from simexplain.losses.attention import Own, own_maps, scaled_images, soft_mask
from simexplain.losses.objective import (
    Batch,
    Term,
    check_kind,
    safe_sqrt,
    similarity_model,
    unit_embeddings,
)
from simexplain.methods.cams import check_cams
from simexplain.methods.pixel_methods import filled
from simexplain.methods.similarity_attention import scaled_weights, weight_rule
from simexplain.metrics.curves import FILLS
from simexplain.models.base import SimilarityModel
from simexplain.tracing import trace


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """No running statistics of batch norm move while the block runs; modes stay as they are."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum) for norm in norms if norm.training]
    counts = [norm.num_batches_tracked for norm, _ in kept if norm.num_batches_tracked is not None]
    before = [int(count) for count in counts]
    try:
        for norm, _ in kept:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in kept:
            norm.momentum = momentum
        for count, value in zip(counts, before, strict=True):
            count.fill_(value)


HELD_MARGIN = 0.2
"""By how much a masked negative shall stay farther than the positive under the rule ``held``."""

MINING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "absolute": lambda positive, negative: (positive - negative).abs(),
    "printed": lambda positive, negative: positive - negative,
    "reversed": lambda positive, negative: (negative - positive).relu(),
    "held": lambda positive, negative: (positive - negative + HELD_MARGIN).relu(),
}
"""Readings of Eq. 3 from the distances of masked positives and negatives to the masked anchor.

``absolute``: the masked triplet shall be undecided, as in the text. ``printed``: the difference
as it stands, whose minimum is a triplet that still holds. ``held``: the same with an end, a hinge
on the order with a margin. ``reversed``: a hinge on the reversed order."""


def mining_loss(masked: Comparison, rule: str = "absolute") -> Tensor:
    """``L_sm`` of embeddings of masked images: Eq. 3, 4 or 5 by the roles there are.

    With positives and negatives, the rule summed over every (positive, negative) of a comparison:
    one for a triplet (Eq. 3), two for a quadruplet (Eq. 5). With positives alone, minus their
    distance (Eq. 4): what looked alike shall come apart. With negatives alone, which the paper
    does not treat, their distance.

    Args:
        masked: Unit rows ``(E,)``.
        rule: A key of :data:`MINING`.

    Returns:
        The mean over comparisons, a scalar.

    Raises:
        ComparisonError: If the rule does not exist.
    """
    check_choice("mining", rule, MINING)
    positive = _distances(masked.anchor, masked.positives)
    negative = _distances(masked.anchor, masked.negatives)
    if not negative.shape[1]:
        return -positive.sum(dim=1).mean()
    if not positive.shape[1]:
        return negative.sum(dim=1).mean()
    terms = MINING[rule](positive.unsqueeze(2), negative.unsqueeze(1))
    return terms.sum(dim=(1, 2)).mean()


def _distances(anchor: Tensor, others: Tensor) -> Tensor:
    """Euclidean ``(B,n)``, with a defined gradient where two rows are the same."""
    return safe_sqrt((anchor.unsqueeze(1) - others).square().sum(dim=2))


SHAPES = {"siamese": (1, 0), "triplet": (1, 1), "quadruplet": (1, 2)}
"""Positives and negatives of each arrangement that is trained with."""


@dataclass(frozen=True)
class Tuples:
    """Comparisons among the images of a batch.

    Attributes:
        places: Which image is where, ``(T,K)``: anchor, positives, negatives.
        positives: How many of each are positives.
    """

    places: Tensor
    positives: int

    def __len__(self) -> int:
        return len(self.places)

    def of(self, rows: Tensor) -> Comparison:
        """The comparisons of things ``(N,*S)`` that the images have, such as embeddings."""
        return self.arranged(rows[self.places])

    def arranged(self, stack: Tensor) -> Comparison:
        """Comparisons from a stack ``(T,K,*S)``."""
        cut = 1 + self.positives
        return Comparison(stack[:, 0], stack[:, 1:cut], stack[:, cut:])


def disjoint_tuples(
    embeddings: Tensor,
    labels: Tensor,
    arch: str = "triplet",
    *,
    share: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tuples:
    """Comparisons in which no image occurs twice, so that every image is masked at most once.

    Anchors and positives are drawn, as many as leave an image for each negative; a negative is the
    nearest image of another class that is left (hard negatives).

    Args:
        embeddings: Rows ``(N,E)``; read without a gradient.
        labels: ``(N,)``.
        arch: A key of :data:`SHAPES`.
        share: Only the hardest share of the comparisons, in (0, 1]: those that violate their
            condition most, or come closest to it; at least one.
        generator: The only source of chance.

    Raises:
        ComparisonError: If the batch has no such comparison, or an option is out of range.
    """
    check_choice("arch", arch, SHAPES)
    if not 0 < share <= 1:
        raise ComparisonError(f"Expected a share in (0, 1], got {share}.")
    positives, negatives = SHAPES[arch]
    distances = torch.cdist(embeddings.detach().float(), embeddings.detach().float())
    order = torch.randperm(len(labels), generator=generator).tolist()
    tuples = _partition(distances.tolist(), labels.tolist(), order, negatives)
    if not tuples:
        raise ComparisonError(
            f"Expected a batch with a {arch} in it (two images of a class"
            f"{' and one of another' if negatives else ''}), got {len(labels)} images of "
            f"{len(set(labels.tolist()))} classes; sample several images of several classes."
        )
    places = torch.tensor(tuples, device=embeddings.device)
    if share < 1:
        places = places[_hardest(distances, places, share)]
    return Tuples(places, positives)


def _partition(
    distances: list[list[float]], labels: list[int], order: list[int], negatives: int
) -> list[list[int]]:
    """As many anchors with positives as leave enough others, each with its nearest of those."""
    pairs = _pairs(labels, order)
    if not negatives:
        return pairs
    pairs = pairs[: len(order) // (2 + negatives)]
    free = set(order).difference(*pairs)
    tuples: list[list[int]] = []
    for anchor, positive in pairs:
        others = [index for index in free if labels[index] != labels[anchor]]
        if len(others) < negatives:
            continue
        others.sort(key=lambda index: (distances[anchor][index], index))
        tuples.append([anchor, positive, *others[:negatives]])
        free -= set(tuples[-1])
    return tuples


def _pairs(labels: list[int], order: list[int]) -> list[list[int]]:
    """Disjoint pairs of one class each."""
    waiting: dict[int, int] = {}
    pairs = []
    for index in order:
        other = waiting.pop(labels[index], None)
        if other is None:
            waiting[labels[index]] = index
        else:
            pairs.append([other, index])
    return pairs


def _hardest(distances: Tensor, places: Tensor, share: float) -> Tensor:
    """Which comparisons violate their condition most, in their order."""
    anchors = places[:, :1]
    own = distances[anchors, places[:, 1:2]].amax(dim=1)
    other = distances[anchors, places[:, 2:]]
    hardness = own - other.amin(dim=1) if other.shape[1] else own
    count = max(1, round(share * len(places)))
    return hardness.topk(count).indices.sort().values


ZERO = "zero"
"""The fill of the paper: hidden pixels are multiplied by zero."""


@dataclass(frozen=True)
class MiningOptions:
    """How similarity mining is done; the defaults are the paper's where it states one.

    Attributes:
        arch: ``siamese`` (Eq. 4), ``triplet`` (Eq. 3) or ``quadruplet`` (Eq. 5).
        weights: The rule of the weight vector, a key of ``WEIGHTS``.
        rule: How Eq. 3 is read, a key of :data:`MINING`.
        alpha: Steepness of the soft mask.
        beta: Where on the scaled map a pixel is half hidden.
        fill: What hidden pixels show: ``zero``, which is the mean colour of the data that the
            network was trained on, or a key of ``FILLS``, such as ``border`` and ``blur``.
        layer: The layer of the maps, or several with commas between, whose maps are multiplied;
            the model's default layer unless given.
        cam: The formula of the maps at all layers, a key of ``CAMS``; Grad-CAM (Eq. 2) at the
            coarsest and LayerCAM at finer ones unless given.
        share: Mine only the hardest share of the comparisons of a batch, in (0, 1].
        masked_scale: Size of the masked images relative to the images; 0.5 makes them cheaper.
        through_mask: Let the gradient also pass through mask and map, as the paper does.
        through_network: Let the second look train the network as well, as the paper does; without
            it the network that judges hidden images is held, so that attention alone learns.
    """

    arch: str = "triplet"
    weights: str = "paper"
    rule: str = "absolute"
    alpha: float = 10.0
    beta: float = 0.5
    fill: str = ZERO
    layer: str | None = None
    cam: str | None = None
    share: float = 1.0
    masked_scale: float = 1.0
    through_mask: bool = True
    through_network: bool = True

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(MiningOptions).items():
            check_kind(name, getattr(self, name), kind, ComparisonError)
        check_choice("arch", self.arch, SHAPES)
        weight_rule(self.weights)
        check_cams(self.cam)
        check_choice("the mining rule", self.rule, MINING)
        check_choice("fill", self.fill, {ZERO: None, **FILLS})
        if not 0 < self.masked_scale <= 1 or not 0 < self.share <= 1:
            raise ComparisonError(
                f"Expected share and masked_scale in (0, 1], got {self.share} and "
                f"{self.masked_scale}."
            )
        if not self.alpha > 0:
            raise ComparisonError(f"Expected alpha above 0, got {self.alpha}.")
        if not (self.through_mask or self.through_network):
            raise ComparisonError(
                "Expected through_mask or through_network to be true, got false for both, which "
                "would train nothing; leave one of them on."
            )


def mining_options(options: MiningOptions, changes: Mapping[str, Any]) -> MiningOptions:
    """Options with some of them replaced.

    Raises:
        ComparisonError: If the option does not exist, or its value cannot be used.
    """
    known = [field.name for field in fields(MiningOptions)]
    if unknown := [name for name in changes if name not in known]:
        raise ComparisonError(
            f"Expected options of mining among {', '.join(known)}, got {unknown[0]!r}."
        )
    return replace(options, **changes)


class MiningTerm(Term):
    """What terms that hide attention have in common: options, a layer, comparisons of a batch."""

    @typed
    def __init__(self, options: MiningOptions | None = None, **changes: object) -> None:
        """Takes options, or changes to the default ones by name.

        Raises:
            ComparisonError: If the option does not exist, or its value cannot be used.
        """
        super().__init__()
        self.options = mining_options(options or MiningOptions(), changes)

    def layers(self, model: SimilarityModel) -> tuple[str, ...]:
        """The layers of the maps."""
        return named_layers(self.options.layer, model)

    def layers_for(self, model: SimilarityModel, images: Tensor) -> tuple[str, ...]:
        """The layers of the maps for images of this size."""
        return named_layers(self.options.layer, model, images)

    def comparisons(self, batch: Batch) -> Tuples:
        """Those that :func:`disjoint_tuples` finds.

        Raises:
            ComparisonError: If there is none.
        """
        return disjoint_tuples(
            batch.units,
            batch.labels,
            self.options.arch,
            share=self.options.share,
            generator=batch.generator,
        )


class SimilarityMiningLoss(MiningTerm):
    """``L_sm`` as a term of an :class:`Objective`, or alone on a :class:`Comparison` of images.

    As a term it picks disjoint comparisons out of the batch, so it costs one more forward and
    backward pass of the batch and no more. Maps come from the pass that all terms share.
    """

    def forward(self, batch: Batch) -> Tensor:
        """The loss of the comparisons that are found in the batch."""
        return mined(batch, self.comparisons(batch), self.options)

    def on(self, model: nn.Module, images: Comparison) -> Tensor:
        """The loss of comparisons of preprocessed images, in the model's present modes.

        Args:
            model: The model in training, as for :class:`Objective`.
            images: Pairs, triplets, quadruplets or any set of images ``(3,H,W)``.
        """
        model = similarity_model(model)
        flat = images.stacked().flatten(0, 1)
        traced = trace(model, flat, self.layers_for(model, flat), differentiable=True)
        places = torch.arange(len(flat), device=flat.device).view(images.batch, images.count)
        batch = Batch.alone(model, flat, traced)
        return mined(batch, Tuples(places, images.positives.shape[1]), self.options)


def named_layers(
    layer: str | None, model: SimilarityModel, images: Tensor | None = None
) -> tuple[str, ...]:
    """The layers that an option names, with commas between.

    None stands for the model's default layer, for images ``(M,C,H,W)`` where they are given.
    """
    if layer is None:
        layer = model.default_layer if images is None else model.default_for(images)
    return tuple(layer.replace(" ", "").split(","))


def mined(batch: Batch, tuples: Tuples, options: MiningOptions) -> Tensor:
    """The mining loss of given comparisons, whose images each occur at most once."""
    return mined_along(batch, tuples, tuple_weights(batch, tuples, options.weights), options)


def tuple_weights(batch: Batch, tuples: Tuples, rule: str) -> Tensor:
    """The weight vector of its comparison for each image of all comparisons ``(T*K,E)``."""
    weights = scaled_weights(tuples.of(batch.units.detach()), rule)[0]
    return weights.unsqueeze(1).expand(-1, tuples.places.shape[1], -1).flatten(0, 1)


def mined_along(batch: Batch, tuples: Tuples, weights: Tensor, options: MiningOptions) -> Tensor:
    """Hides what the maps of scores ``w . f`` show and takes the mining rule of what is left.

    Args:
        batch: The pass, opened at the layers of the maps.
        tuples: Comparisons whose images each occur at most once.
        weights: The weight vector of each image of all comparisons ``(T*K,E)``, held constant.
        options: How masks are made; its weight rule is not read.
    """
    own = Own.of(batch, tuples.places.flatten())
    with torch.set_grad_enabled(torch.is_grad_enabled() and options.through_mask):
        layers = named_layers(options.layer, batch.model, batch.images)
        maps = own_maps(batch, own, weights, layers, options.cam)
    images = batch.images[own.which]
    masked = soft_mask(
        images, maps, alpha=options.alpha, beta=options.beta, ground=_ground(batch, images, options)
    )
    hidden = batch.units.new_zeros(0, batch.units.shape[1])
    if len(masked):
        looked_at = scaled_images(masked, options.masked_scale)
        hidden = embed_again(batch.model, looked_at, held=not options.through_network)
    stack = own.together(batch, hidden).view(*tuples.places.shape, -1)
    return mining_loss(tuples.arranged(stack), options.rule)


def _ground(batch: Batch, images: Tensor, options: MiningOptions) -> Tensor | None:
    """What shows where images are hidden, in place of zeros."""
    return None if options.fill == ZERO else filled(batch.model, images, options.fill)


class _Look(nn.Module):
    """A model whose call gives embeddings, as ``functional_call`` wants it."""

    @typed
    def __init__(self, model: SimilarityModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.embed(images)


def _held(model: SimilarityModel, images: Tensor) -> Tensor:
    """Embeddings of which no gradient reaches the model's parameters."""
    look = _Look(model)
    fixed = {name: part.detach() for name, part in look.named_parameters()}
    rows: Tensor = functional_call(look, fixed, (images,))
    return rows


def embed_again(model: SimilarityModel, images: Tensor, *, held: bool = False) -> Tensor:
    """Unit embeddings of masked images, which must not move batch-norm statistics.

    Args:
        model: The model in training.
        images: ``(m,3,H,W)``.
        held: Hold its parameters constant: a gradient reaches the images alone.

    Raises:
        ModelError: If the model cannot take images of this size.
    """
    with statistics_kept(model):
        try:
            return unit_embeddings(model, _held(model, images) if held else model.embed(images))
        except RuntimeError as error:
            if "size" not in str(error.__cause__ or error):
                raise
            raise ModelError(
                f"The model does not take masked images of {tuple(images.shape[2:])}; "
                "leave masked_scale at 1."
            ) from error
