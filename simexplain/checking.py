"""The check of an explanation: does the claim suffer where the map is hot, and only there?

Hot parts of the pictures are hidden and the model is run again. That is a statement about the
map, not about the truth: a map that marks half of the right object, or an object beside it that
matters too, passes as well, and of two maps the one that loses more need not be the right one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.comparison import Comparison
from simexplain.metrics.curves import blurred, elsewhere, hidden, hottest
from simexplain.metrics.maps import grown
from simexplain.models.base import SimilarityModel
from simexplain.models.frames import FrameSets, present_frames, split_frames, tall
from simexplain.tracing import trace

SEES = 0.8
"""The least ratio of two cosine distances in a network that sees what is in pictures: by how much
blurring all of a picture moves its embedding, over how far different pictures are apart. Chosen on
one half of the scenes of ``benchmarks/believed.py``; the documentation has the rates on the other
("What explain does")."""
CONSTANT = 0.03
"""Where blurring moves no embedding by this cosine distance, they hardly depend on the pictures,
however far they are apart."""
QUANTITIES = ("margin", "distance", "difference", "score")
"""What a comparison claims: a margin of distances; a small distance, of a similar pair; a large
one, of a dissimilar pair; or a score along a direction."""
PROVES = (
    "The check shows whether the claim depends on what a map marks, not that the map is right: a "
    "large fall separates right maps from wrong ones only a little better than chance."
)
"""What the check does not prove, in a line. Measured on scenes of two objects (separating hits from
misses by the fall alone): an area under the ROC curve of 0.63, where 0.5 is chance."""
_MEASURED = ("falls", "controls", "moved")
_NEAR = 0.25
_ALIKE, _PARTLY = 0.5, 0.2
_NONE = (
    ("the map", "the map cannot be believed"),
    ("either map", "neither map can be believed"),
    ("any of the maps", "none of the maps can be believed"),
)
"""How to speak of one, two and more maps."""


@dataclass(frozen=True)
class Check:
    """What became of the claim when part of one image was hidden, the others held.

    Attributes:
        falls: ``(B,K)`` float64: how far the claim weakens when the hottest tenth of the image is
            hidden, in units of the distance; negative where it grows stronger, NaN for empty maps.
        controls: ``(B,K)``: the same for as much of the image elsewhere.
        moved: ``(B,K)``: the cosine distance that blurring all of the image moves its embedding.
            NaN for learned scores, which have no embedding. Of a set of frames all three are at its
            first frame, and NaN at the others.
        spread: ``(B,)``: the mean cosine distance between the images of a comparison or between
            their blurred versions, whichever is larger; NaN for a single image.
        quantity: What is claimed, one of :data:`QUANTITIES`.
        images: How many images went through the network for this check, without those that checks
            of other rows share with it.
    """

    falls: Tensor
    controls: Tensor
    moved: Tensor
    spread: Tensor
    quantity: str
    images: int

    def gain(self, index: int = 0, images: Tensor | None = None) -> float:
        """How much more hiding the map costs than the control; NaN where all maps are empty.

        Args:
            index: Which comparison.
            images: Over which images the mean is taken ``(K,)``, boolean; all unless given.
        """
        gains = (self.falls - self.controls)[index]
        return float((gains if images is None else gains[images]).nanmean())

    def blind(self, index: int = 0) -> bool:
        """Whether the embeddings hardly depend on what can be recognised in the images."""
        return blind(self.moved[index], self.spread[index])

    def says(self, index: int, place: int) -> str:
        """What hiding did to the claim, in words; empty for an empty map."""
        fall, control = float(self.falls[index, place]), float(self.controls[index, place])
        if math.isnan(fall):
            return ""
        word, other = (self._verb(value) for value in (fall, control))
        again = "" if word == other else f" {other} it"
        name = "distance" if self.quantity == "difference" else self.quantity
        return (
            f"hiding this {word} the {name} by {abs(fall):.3f}, hiding as much elsewhere{again} "
            f"by {abs(control):.3f}"
        )

    def at(self, first: Tensor) -> Check:
        """The same for other images ``(F,)``: those of this check where true, else not known."""
        wide: dict[str, Any] = {}
        for name in _MEASURED:
            value = getattr(self, name)
            wide[name] = value.new_full((len(value), len(first)), torch.nan)
            wide[name][:, first] = value
        return replace(self, **wide)

    def to_json(self, index: int) -> dict[str, Any]:
        """The numbers of one comparison, None where there is none."""
        known = {name: list(map(_known, getattr(self, name)[index].tolist())) for name in _MEASURED}
        says = [self.says(index, position) for position in range(self.falls.shape[1])]
        return {
            "quantity": self.quantity, **known, "spread": _known(float(self.spread[index])),
            "says": says, "images": self.images,
        }  # fmt: skip

    def _verb(self, value: float) -> str:
        """Which way the quantity went; what speaks for a similar pair is a small distance."""
        return "lowers" if (value >= 0) == (self.quantity != "distance") else "raises"


@dataclass(frozen=True)
class Agreement:
    """How far two rows of an explanation show the same, and which one its check favours.

    Attributes:
        names: What the rows are called.
        distances: Of each image, how far the peaks are apart, as a share of the side; None where a
            map is empty.
        overlaps: Of each image, the share of the hottest tenth that both rows have in common.
        favours: The name of the row whose hiding weakens the claim more than that of the other, by
            more than hiding elsewhere does; None for a missing row or check.
        gains: By how much hiding what each row marks weakens the claim more than hiding as much
            elsewhere, means over the images; empty without a check.
    """

    names: tuple[str, str]
    distances: tuple[float | None, ...]
    overlaps: tuple[float, ...]
    favours: str | None
    gains: tuple[float, ...]

    @property
    def degree(self) -> str:
        """``agree``, ``agree in part`` or ``disagree``."""
        overlap = sum(self.overlaps) / len(self.overlaps)
        if overlap >= _ALIKE:
            return "agree"
        known = [distance for distance in self.distances if distance is not None]
        near = bool(known) and sum(known) / len(known) <= _NEAR
        return "agree in part" if near and overlap >= _PARTLY else "disagree"

    @property
    def text(self) -> str:
        """One line: whether the rows agree, and which one the check favours."""
        known = [distance for distance in self.distances if distance is not None]
        apart = f"peaks {sum(known) / len(known):.0%} of the side apart, " if known else ""
        overlap = sum(self.overlaps) / len(self.overlaps)
        line = (
            f"\u201c{self.names[0]}\u201d and \u201c{self.names[1]}\u201d {self.degree}: {apart}"
            f"hottest tenths overlap by {overlap:.0%}"
        )
        # An empty map hides nothing.
        if not self.gains or any(map(math.isnan, self.gains)):
            return line
        both = " against ".join(f"{gain:+.3f}" for gain in self.gains)
        favoured = f"\u201c{self.favours}\u201d" if self.favours else "neither"
        return f"{line}. The check favours {favoured} ({both} beyond the control)"


def checked(
    model: SimilarityModel,
    comparison: Comparison,
    embeddings: Tensor,
    heatmaps: Sequence[Tensor],
    max_batch: int | None,
) -> list[Check]:
    """Hides in every image what each of several maps marks, and as much elsewhere.

    ``K (1 + 2R)`` images go through the network for each comparison and ``R`` rows of maps.

    Args:
        model: The model that was explained.
        comparison: The images at the model's own size, and perhaps given vectors.
        embeddings: Rows of all members ``(B,M,E)``.
        heatmaps: For each row of maps its heat ``(B,K,h,w)`` on the images; of sets of frames on
            every frame, of which the hottest tenth of all is hidden together.
        max_batch: Bounds the images in one forward pass.
    """
    stack, places = comparison.stacked(), comparison.places
    rows, sights, shared = [], [], 0
    for index, images in enumerate(stack):
        heats = [heat[index] for heat in heatmaps]
        if isinstance(model, FrameSets):
            variants, empty, count = _of_sets(model, images, heats)
        else:
            variants, empty, count = _of_images(images, heats)
        shared += count
        answers = trace(model, variants.flatten(0, 1), (), max_batch=max_batch).embeddings.detach()
        answers = answers.view(len(variants), len(places), -1)
        members = embeddings[index].to(answers)
        whole = _claim(model, comparison, members[None])
        changed = members.repeat(answers.shape[0], answers.shape[1], 1, 1)
        for number, position in enumerate(places):
            changed[:, number, position] = answers[:, number]
        falls = whole - _claim(model, comparison, changed.flatten(0, 1)).view(answers.shape[:2])
        rows.append(falls[1:].view(len(heats), 2, -1).masked_fill(empty[:, None], torch.nan))
        sights.append(sight(members[list(places)], answers[0]))
    falls = torch.stack(rows)
    moved, spread = (torch.stack(parts) for parts in zip(*sights, strict=True))
    near, far = comparison.positives.shape[1], comparison.negatives.shape[1]
    quantity = "margin" if near and far else "distance" if near else "difference"
    quantity = quantity if comparison.unit else "score"
    return [
        Check(
            falls[:, row, 0], falls[:, row, 1], moved, spread, quantity,
            2 * shared + (0 if row else shared),
        )
        for row in range(len(heatmaps))
    ]  # fmt: skip


def _of_images(images: Tensor, heats: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Images ``(K,C,H,W)`` blurred, and with what each map marks hidden or as much elsewhere.

    Returns:
        All of them for ``R`` maps ``(1+2R,K,C,H,W)``, whether a map is empty ``(R,K)``, and how
        many images there are.
    """
    size = (int(images.shape[-2]), int(images.shape[-1]))
    masks = [hottest(grown(heat, size)) for heat in heats]
    both = [mask.to(images.device) for hot in masks for mask in (hot, elsewhere(hot))]
    veil = blurred(images)
    variants = torch.stack([veil, *(hidden(images, mask, veil) for mask in both)])
    empty = torch.stack([~mask.flatten(1).any(dim=1) for mask in masks]).cpu()
    return variants, empty, len(images)


def _of_sets(
    model: FrameSets, images: Tensor, heats: Sequence[Tensor]
) -> tuple[Tensor, Tensor, int]:
    """The same of sets of frames as tall images, with heats ``(F,h,w)`` of all their frames."""
    frames = split_frames(images, model.frames)
    present = present_frames(frames)
    counts = present.sum(dim=1).tolist()
    parts = zip(*(torch.split(heat, counts) for heat in heats), strict=True)
    variants, empty = [], []
    for own, count, marked in zip(frames, counts, parts, strict=True):
        shown = own[:count]
        whole = tall(shown)
        size = (int(shown.shape[-2]), int(shown.shape[-1]))
        masks = [hottest(grown(heat, size).flatten(0, 1)) for heat in marked]
        both = [mask.to(images.device) for hot in masks for mask in (hot, elsewhere(hot))]
        veil = tall(blurred(shown))
        varied = torch.stack([veil, *(hidden(whole, mask, veil) for mask in both)])
        missing = images.new_full((*varied.shape[:-2], images.shape[-2] - whole.shape[-2], size[1]),
                                  torch.nan)  # fmt: skip
        variants.append(torch.cat((varied, missing), dim=-2))
        empty.append(torch.tensor([not bool(mask.any()) for mask in masks]))
    return torch.stack(variants, dim=1), torch.stack(empty, dim=1), int(present.sum())


def joined_checks(checks: Sequence[Check]) -> Check:
    """Checks of some comparisons as one of all."""
    tensors: dict[str, Any] = {
        name: torch.cat([getattr(check, name) for check in checks])
        for name in (*_MEASURED, "spread")
    }
    return replace(checks[0], images=sum(check.images for check in checks), **tensors)


def agreement_of(
    names: tuple[str, str],
    heatmaps: tuple[Tensor, Tensor],
    peaks: tuple[Sequence[tuple[float, float] | None], Sequence[tuple[float, float] | None]],
    checks: tuple[Check | None, Check | None],
    index: int,
) -> Agreement:
    """Compares two rows of one comparison.

    Args:
        names: What they are called.
        heatmaps: Of each ``(K,H,W)`` on the images.
        peaks: Of each image, in pixels of ``heatmaps``.
        checks: Of each.
        index: Which comparison the checks are read at.
    """
    side = math.sqrt(heatmaps[0].shape[-2:].numel())
    distances = tuple(
        None if one is None or other is None else math.dist(one, other) / side
        for one, other in zip(*peaks, strict=True)
    )
    first, second = (hottest(heat).flatten(1) for heat in heatmaps)
    most = torch.maximum(first.sum(dim=1), second.sum(dim=1)).clamp(min=1)
    overlaps = tuple(((first & second).sum(dim=1) / most).tolist())
    favours: str | None = None
    gains: tuple[float, ...] = ()
    one, other = checks
    if one is not None and other is not None:
        # Of the images on which both have a map, or the means were not of the same thing.
        both = (one.falls + other.falls)[index].isfinite()
        gains = (one.gain(index, both), other.gain(index, both))
        noise = float(torch.stack((one.controls[index], other.controls[index])).abs().nanmean())
        best = 0 if gains[0] >= gains[1] else 1
        clear = gains[best] > 0 and abs(gains[0] - gains[1]) > noise
        favours = names[best] if clear and not one.blind(index) else None
    return Agreement(names, distances, overlaps, favours, gains)


def doubt_of(checks: Sequence[Check], index: int) -> str | None:
    """Why none of the rows of a comparison can be believed; None if nothing speaks against one."""
    if not checks:
        return None
    whose, none = _NONE[min(len(checks), 3) - 1]
    if checks[0].blind(index):
        moved, spread = (
            float(value[index].nanmean()) for value in (checks[0].moved, checks[0].spread)
        )
        others = "" if math.isnan(spread) else f", where different pictures are {spread:.3f} apart"
        return (
            "Blurring the pictures beyond recognition moves their embeddings by a cosine distance "
            f"of {moved:.3f}{others}, so this network hardly uses what is in them (random "
            f"weights, a collapsed embedding?); {none}."
        )
    gains = [gain for check in checks if not math.isnan(gain := check.gain(index))]
    if gains and max(gains) <= 0:
        return (
            f"Hiding what {whose} marks weakens the claim no more than hiding as much elsewhere; "
            f"{none}."
        )
    return None


def sight(rows: Tensor, blurs: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a network's output for ``K`` images depends on their contents.

    Args:
        rows: Their embeddings ``(K,E)``.
        blurs: Those of the images :func:`~simexplain.metrics.curves.blurred`.

    Returns:
        ``moved`` ``(K,)`` and ``spread`` ``()`` as in :class:`Check`, float64 on the CPU.
    """
    own, veiled = (F.normalize(part.to("cpu", torch.float64), dim=1) for part in (rows, blurs))
    return 1 - (own * veiled).sum(dim=1), torch.maximum(_apart(own), _apart(veiled))


def blind(moved: Tensor, spread: Tensor, least: float = SEES) -> bool:
    """Whether embeddings hardly depend on what can be recognised in the images.

    Blurring keeps the colours of a picture and takes its contents. In a network that sees contents
    it therefore moves an embedding about as far as another picture is away.

    Args:
        moved: Of each image ``(K,)``; see :func:`sight`.
        spread: ``()``.
        least: See :data:`SEES`.
    """
    known = moved[moved.isfinite()]
    if not len(known):
        return False
    return bool((known < CONSTANT).all() or known.mean() < least * spread)


def _apart(rows: Tensor) -> Tensor:
    """The mean cosine distance between different unit rows ``(K,E)``; NaN for a single one."""
    count = len(rows)
    away = 1 - rows @ rows.T
    return away.sum() / (count * (count - 1)) if count > 1 else away.new_tensor(math.nan)


def _known(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return None if math.isnan(value) else value


def _claim(model: SimilarityModel, comparison: Comparison, members: Tensor) -> Tensor:
    """How well what is claimed holds ``(n,)``, from rows of all members ``(n,M,E)``; float64."""
    near = comparison.positives.shape[1]
    with torch.no_grad():
        if not comparison.unit:
            return (members[:, 0] * members[:, 1]).sum(dim=1).to("cpu", torch.float64)
        each = torch.cat([model.distance(row[:1], row[1:]) for row in members])
    distances = each.to("cpu", torch.float64)
    close, far = distances[:, :near], distances[:, near:]
    if not far.shape[1]:
        return -close.mean(dim=1)
    return far.mean(dim=1) if not near else far.amin(dim=1) - close.amax(dim=1)
