"""The verb: grad-weights of the triplet loss for every image of a labelled folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.data.folders import Batches, Record, StageProgress, pictures_in
from simexplain.errors import ImageError, ModelError
from simexplain.fitting.posthoc import check_numbers, silent
from simexplain.methods.cams import channel_weights
from simexplain.methods.weight_bank import WeightBank, probe_of, usual_distance
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.networks import find_layer, full_precision, split_call, unit_rows
from simexplain.tracing import Trace, trace

LabelledPictures = str | Path | Sequence[Record] | tuple[Tensor, Sequence[object]]
"""A folder of classes, records, or preprocessed images ``(M,3,H,W)`` with a label for each."""

_HALF_SCALE = 1024.0
_READ, _WEIGH = "Reading features", "Weighing"
_REPORTED = ("triplets", "margin", "seed")


@dataclass(frozen=True)
@typed
class BankOptions:
    """How a bank is made; the defaults are choices of ours.

    Attributes:
        layer: The layer of the maps; the model's default unless given.
        triplets: How many triplets are drawn for each image as their anchor.
        margin: Of the triplet loss ``max(0, d(a,p)^2 - d(a,n)^2 + margin)`` on unit rows, as in
            FaceNet (Schroff et al. 2015); squared distances lie in [0, 4].
        seed: Of the triplets; the user's random state is not touched.
        batch_size: Pictures in one forward pass.
        max_cache: Bytes of feature maps to keep between embedding and weighing; for the images
            above it the network runs again.
    """

    layer: str | None = None
    triplets: int = 100
    margin: float = 0.2
    seed: int = 0
    batch_size: int = 32
    max_cache: int = field(default=1 << 29, repr=False)

    def __post_init__(self) -> None:
        check_numbers(self, "triplets", "batch_size")
        if not 0 <= self.margin <= 4:
            raise ModelError(f"Expected a margin between 0 and 4, got {self.margin:g}.")


@typed
@full_precision()
def build_bank(
    model: nn.Module,
    source: LabelledPictures,
    *,
    progress: StageProgress | None = None,
    **options: Any,
) -> WeightBank:
    """Averages the Grad-CAM weights of the triplet loss over many triplets of each image.

    Each image is the anchor ``a`` of triplets drawn with replacement, with a positive of its class
    and a negative of any other. Where the loss is not zero, its gradient at the anchor's embedding
    is ``2 (n - p)``. The weights are minus the gradient of the loss at the anchor's map, averaged
    over positions and over these triplets: positive where more of a channel lowers the loss, so
    that ``relu(sum alpha A)`` shows what supports the match, as Grad-CAM shows what supports a
    class. The gradient at the embedding is all that differs between the triplets of an image, and
    the way back to the map is linear in it: so one backward pass with the mean does for all of
    them, exactly, and for all images of a batch at once.

    Images that are alone in their class, or whose triplets all have a loss of zero, have no weights
    and are left out; ``report`` counts them.

    Args:
        model: Any network or similarity model; nothing of it is changed.
        source: A folder with a sub-folder for each class, records, or images with their labels.
        progress: Called with what is being done, how far it is, and how far it goes.
        **options: Of :class:`BankOptions`, such as ``triplets=50``.

    Raises:
        ImageError: If there are too few pictures or classes, or every loss is zero.
        ModelError: If the model, the layer or an option cannot be used.
    """
    known = BankOptions.__dataclass_fields__
    if unknown := [name for name in options if name not in known]:
        raise ModelError(f"build_bank has the options {', '.join(known)}, got '{unknown[0]}'.")
    chosen, base = BankOptions(**options), as_similarity_model(model)
    pictures = _opened(base, source, chosen.batch_size)
    known_layers = base.layers_for(base.example(pictures.size))
    default = next(candidate.name for candidate in known_layers if candidate.default)
    layer = chosen.layer or default
    find_layer(base.network, split_call(layer)[0])  # before the long work
    # Above an early layer the graph of a pass is far larger than its map.
    budget = chosen.max_cache if layer == default else 0
    passes = _Passes(base, pictures, layer, budget, progress or silent)
    units, places = passes.embedded()
    labels = [pictures.labels[index] for index in places]
    directions, active = _directions(units, labels, chosen)
    if not bool(active.any()):
        raise ImageError(
            f"The loss of every triplet is zero at the margin {chosen.margin:g}: there is nothing "
            "to learn weights from; take a larger margin."
        )
    weights = passes.weighed(directions, places)
    used = active.nonzero().flatten().tolist()
    return WeightBank(
        embeddings=units[used].cpu(),
        weights=weights[used].cpu(),
        labels=tuple(labels[index] for index in used),
        names=tuple(pictures.names[places[index]] for index in used),
        model=base.name,
        layer=layer,
        size=pictures.size,
        probe=probe_of(base, pictures.size).cpu(),
        usual=usual_distance(units[used]),
        report=_report(chosen, active, labels, pictures.broken),
    )


@dataclass(frozen=True)
class _Pictures:
    """Images in batches with the class and the name of each."""

    batches: Batches | list[tuple[list[int], Tensor]]
    labels: list[str]
    names: list[str]
    size: tuple[int, int]

    @property
    def broken(self) -> dict[Path, str]:
        return self.batches.broken if isinstance(self.batches, Batches) else {}

    def over(self, places: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of some of the images only."""
        if isinstance(self.batches, Batches):
            yield from self.batches.over(places)
            return
        wanted = set(places)
        for own, images in self.batches:
            kept = [number for number, index in enumerate(own) if index in wanted]
            if kept:
                yield [own[number] for number in kept], images[kept]


def _opened(model: SimilarityModel, source: LabelledPictures, batch_size: int) -> _Pictures:
    size = model.batch_size or batch_size
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Tensor):
        images, given = source
        if images.dim() != 4 or len(images) != len(given):
            raise ImageError(
                f"Expected images (M,3,H,W) with a label for each, got {tuple(images.shape)} and "
                f"{len(given)} labels."
            )
        places = torch.split(torch.arange(len(images)), size)
        parts = [(part.tolist(), images[part]) for part in places]
        sides = (images.shape[-2], images.shape[-1])
        return _Pictures(parts, [str(label) for label in given], [""] * len(images), sides)
    root = Path(source) if isinstance(source, (str, Path)) else None
    records = pictures_in(root, labelled=True) if root else [*source]  # type: ignore[misc]
    if unlabelled := [record for record in records if record.label is None]:
        raise ImageError(
            f"Expected a label for each picture of a bank, got none for '{unlabelled[0].path}'."
        )
    names = [str(r.path.relative_to(root) if root else r.path) for r in records]
    batches = Batches(records, model.preprocess, size)
    height, width = model.preprocess.size
    return _Pictures(batches, [str(r.label) for r in records], names, (height, width))


class _Passes:
    """Embeds all images, then weighs them: from the passes that were kept, else from new ones."""

    def __init__(
        self,
        model: SimilarityModel,
        pictures: _Pictures,
        layer: str,
        budget: int,
        progress: StageProgress,
    ) -> None:
        self.model, self.pictures, self.layer = model, pictures, layer
        self.progress, self._budget = progress, budget
        self._kept: list[tuple[list[int], Trace]] = []

    def embedded(self) -> tuple[Tensor, list[int]]:
        """Unit rows ``(M,E)`` and the places of the images that could be read."""
        rows, order, total = [], [], len(self.pictures.labels)
        for places, images in self.pictures.over(range(total)):
            traced = trace(self.model, images, (self.layer,) if self._budget > 0 else ())
            rows.append(unit_rows(traced.embeddings.detach()))
            order += places
            for chunks in traced.outputs.values():
                self._budget -= sum(chunk.numel() * chunk.element_size() for chunk in chunks)
                if self._budget > 0:
                    self._kept.append((places, traced))
            self.progress(_READ, len(order), total)
        if len(order) < 3:
            raise ImageError(
                f"Expected at least three pictures that can be read, two of them of one class, got "
                f"{len(order)}."
            )
        embeddings = torch.cat(rows)
        if bool((~embeddings.isfinite()).any() or (embeddings == 0).all(dim=1).any()):
            raise ModelError("An embedding is zero or not finite; look for NaN or dead weights.")
        return embeddings, order

    def weighed(self, directions: Tensor, places: Sequence[int]) -> Tensor:
        """Channel weights ``(M,C)`` of the scores ``direction . unit row``."""
        row_of = {index: row for row, index in enumerate(places)}
        weights: dict[int, Tensor] = {}
        for own, traced in self._traces(places):
            aims = directions[[row_of[index] for index in own]]
            with torch.enable_grad():
                units = unit_rows(traced.embeddings)
                score = (units * aims.to(units)).sum() * _HALF_SCALE
            gradient = traced.gradients(score)[self.layer].to(directions) / _HALF_SCALE
            weights.update(zip(own, channel_weights(gradient), strict=True))
            self.progress(_WEIGH, len(weights), len(places))
        return torch.stack([weights[index] for index in places])

    def _traces(self, places: Sequence[int]) -> Iterator[tuple[list[int], Trace]]:
        known = {index for own, _ in self._kept for index in own}
        while self._kept:
            yield self._kept.pop(0)
        rest = [index for index in places if index not in known]
        for own, images in self.pictures.over(rest) if rest else ():
            yield own, trace(self.model, images, (self.layer,))


def _directions(
    units: Tensor, labels: Sequence[str], options: BankOptions
) -> tuple[Tensor, Tensor]:
    """Minus the mean gradient of the loss at each anchor ``(M,E)``, and its active triplets."""
    generator = torch.Generator().manual_seed(options.seed)
    order = sorted(range(len(labels)), key=labels.__getitem__)
    places = torch.tensor(order)
    spans = _spans([labels[index] for index in order])
    if len(spans) < 2 or all(high - low < 2 for low, high in spans):
        raise ImageError(
            f"Expected at least two classes, one of them with two pictures, got {len(spans)} "
            f"of at most {max(high - low for low, high in spans)}."
        )
    directions = torch.zeros_like(units)
    active = torch.zeros(len(units), dtype=torch.long)
    for low, high in spans:
        for own in range(low, high if high - low > 1 else low):
            outside, drawn = len(order) - (high - low), (options.triplets,)
            near = torch.randint(low, high - 1, drawn, generator=generator)
            far = torch.randint(0, outside, drawn, generator=generator)
            # Past the anchor itself, past its class.
            positives, negatives = near + (near >= own), far + (high - low) * (far >= low)
            gaps = units[places[negatives]] - units[places[positives]]
            # On unit rows d(a,p)^2 - d(a,n)^2 is 2 a.(n - p).
            hit = 2 * gaps @ units[order[own]] + options.margin > 0
            active[order[own]] = int(hit.sum())
            if bool(hit.any()):
                directions[order[own]] = -2 * gaps[hit].mean(dim=0)
    return directions, active


def _spans(labels: Sequence[str]) -> list[tuple[int, int]]:
    """Where each class begins and ends among sorted labels."""
    starts = [n for n, label in enumerate(labels) if n == 0 or label != labels[n - 1]]
    return list(zip(starts, [*starts[1:], len(labels)], strict=True))


def _report(
    options: BankOptions, active: Tensor, labels: Sequence[str], broken: dict[Path, str]
) -> dict[str, Any]:
    """How the bank was made; ``active`` is the mean share of triplets with a loss."""
    used = active > 0
    report: dict[str, Any] = {name: getattr(options, name) for name in _REPORTED}
    report |= {
        "images": int(used.sum()),
        "classes": len({label for label, kept in zip(labels, used.tolist(), strict=True) if kept}),
        "left_out": int((~used).sum()),
        "active": round(float(active[used].float().mean()) / options.triplets, 4),
    }
    if broken:
        report["skipped"] = [str(path) for path in broken]
    return report
