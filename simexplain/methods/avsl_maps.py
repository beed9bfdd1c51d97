"""Maps of an AVSL model: where each image agrees with the others, over all levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simexplain.arguments import typed
from simexplain.comparison import Comparison
from simexplain.errors import check_choice
from simexplain.graph.inference import Rows, directed_cams, infer
from simexplain.methods.cams import at_grid, finest_grid
from simexplain.methods.method import AttentionMaps, Method, Task, check_embeddings
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_runs import expected_avsl, features_and_rows, origin_warnings
from simexplain.models.base import SimilarityModel
from simexplain.models.moving import Region

Towards = Callable[[Tensor, Tensor], Tensor]


EVIDENCE: dict[str, Towards] = {
    "agreement": lambda _, other: other,
    "distance": lambda own, other: other - own,
}
"""From the unit embedding of an image and of the other to the direction that counts as evidence.

``agreement`` counts products of nodes: ``sum of lambda a b`` of a pair, on either image alone.
``distance`` counts the nodes themselves with the sign turned: ``-sum of lambda (a - b)^2``, spread
over both images; all maps together then add up to what the distances of a comparison are.
"""


@dataclass(frozen=True)
@typed
class AVSLMaps(Method):
    """The node CAMs of each image, weighted by sensitivities and summed over nodes and levels.

    AVSL's distance of a pair is ``sum over levels and nodes of lambda (a - b)^2`` with the
    sensitivities ``lambda`` of Eq. 11 (Zhang et al., section 3.4), which is
    ``sum of lambda a^2 + sum of lambda b^2 - 2 s`` with the agreement ``s = sum of lambda a b``.
    A node's embedding is the mean of its CAM (Eq. 2), so ``s`` is a sum over the positions of
    either image, and the map is that sum. With several others each counts with its own
    sensitivities: the anchor's map is the mean over its positives minus the mean over its
    negatives, a positive's map is its part of that mean, a negative's the same with the sign
    turned. Levels are brought to the finest grid bilinearly, with their sums kept (exactly where
    grids are whole multiples). No gradients are needed.

    Attributes:
        evidence: ``agreement`` or ``distance``, see ``EVIDENCE``.
        level: The layer of one level; all levels unless given.
        keep_negative: Leave out the final ReLU.
    """

    uses_layers: ClassVar[bool] = False  # the model's levels are fixed
    joined: ClassVar[str] = "sum"  # of the levels' maps

    evidence: str = "agreement"
    level: str = ""
    keep_negative: bool = False

    def __post_init__(self) -> None:
        check_choice("evidence", self.evidence, EVIDENCE)

    def layers_for(self, model: SimilarityModel, images: Tensor) -> tuple[str, ...]:
        """The layers of the levels, the lowest first.

        Raises:
            ModelError: If the model is not an AVSL model.
            ComparisonError: If it has no such level.
        """
        levels = expected_avsl(model, "for method 'avsl'").levels
        return tuple(levels[number] for number in self._wanted(model))

    def attribute(self, task: Task) -> AttentionMaps:
        """Maps ``(B,K,h,w)`` at the finest level's grid; see :class:`AttentionMaps`.

        ``layer_maps`` has the map of each level at its own grid, whose sums add up to those of the
        maps where nothing is cut off. ``scores`` are the sums of the maps before the ReLU, and
        ``weights`` the directions ``(B,K,E)`` whose product with an embedding row is its score.

        Raises:
            ModelError: If the model is not an AVSL model, or an embedding is not finite.
            ComparisonError: If it has no such level.
        """
        model, images, _, max_batch = task
        avsl, wanted = expected_avsl(model, "for method 'avsl'"), self._wanted(model)
        features, flat = features_and_rows(avsl, images.stacked().flatten(0, 1).detach(), max_batch)
        rows = images.restacked(flat)
        check_embeddings(rows, images.roles)
        with torch.no_grad():
            pulls = self._pulls(avsl, images, rows)
            levels = [
                directed_cams(grid, weight, bias, pull.flatten(0, 1), avsl.options.pooling)
                for grid, (weight, bias), pull in zip(features, avsl.weights, pulls, strict=True)
            ]
            shown = [avsl.levels[number] for number in wanted]
            parts = avsl.apart(shown, images.stacked()[:, 0])
            total = images.restacked(_summed([levels[number] for number in wanted], parts))
            own = {avsl.levels[number]: images.restacked(levels[number]) for number in wanted}
            kept = [
                pull if number in wanted else torch.zeros_like(pull)
                for number, pull in enumerate(pulls)
            ]
            weights = torch.cat(kept, dim=2)
            weights = torch.cat((weights, torch.zeros_like(weights)), dim=2)  # the certainties
            cut = (lambda maps: maps) if self.keep_negative else torch.relu
            return AttentionMaps(
                maps=cut(total),
                layer_maps={layer: cut(maps) for layer, maps in own.items()},
                weights=weights,
                scores=(weights * rows).sum(dim=2),
                embeddings=rows,
                warnings=origin_warnings(avsl),
            )

    def _wanted(self, model: SimilarityModel) -> list[int]:
        levels = expected_avsl(model, "for method 'avsl'").levels
        if not self.level:
            return list(range(len(levels)))
        check_choice("level", self.level, levels)
        return [levels.index(self.level)]

    def _pulls(self, model: AVSL, images: Comparison, rows: Tensor) -> list[Tensor]:
        """The direction of each image at each level ``(B,K,r)``."""
        count = images.count
        known = model.unpacked(rows.flatten(0, 1))
        units, sure = (
            [part.view(images.batch, count, -1) for part in parts]
            for parts in (known.embeddings, known.certainties)
        )
        anchor = Rows(*(tuple(part[:, :1] for part in parts) for parts in (units, sure)))
        others = Rows(*(tuple(part[:, 1:] for part in parts) for parts in (units, sure)))
        pairs = infer(model.graph().detached(), anchor, others)
        near, far = images.positives.shape[1], images.negatives.shape[1]
        signs = rows.new_tensor([1 / max(1, near)] * near + [-1 / max(1, far)] * far)
        towards, pulls = EVIDENCE[self.evidence], []
        for a, b, sensitivity in zip(
            anchor.embeddings, others.embeddings, pairs.sensitivities, strict=True
        ):
            share = sensitivity * signs.view(1, -1, 1)
            own = (share * towards(a.expand_as(b), b)).sum(dim=1, keepdim=True)
            pulls.append(torch.cat((own, share * towards(b, a.expand_as(b))), dim=1))
        return pulls


def _summed(levels: Sequence[Tensor], regions: Sequence[Region]) -> Tensor:
    """Maps ``(M,h,w)`` of several grids as one at the finest, the sum of each map kept."""
    finest = finest_grid(levels, regions)
    total = torch.zeros(())
    for level, region in zip(levels, regions, strict=True):
        grown = at_grid(level, finest, region)
        area = (region[2] - region[0]) * (region[3] - region[1])
        total = total.to(grown) + grown * (level[0].numel() / (math.prod(finest) * area))
    return total
