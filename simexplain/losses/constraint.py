"""A person's word on where evidence may lie: attention on the wrong side of a mask costs."""

from __future__ import annotations

import torch
from torch import Tensor

from simexplain.arguments import typed
from simexplain.errors import ComparisonError, ModelError, check_choice
from simexplain.losses.attention import Own, own_maps
from simexplain.losses.mining import SHAPES, disjoint_tuples, named_layers, tuple_weights
from simexplain.losses.objective import Batch, Term
from simexplain.methods.cams import at_grid
from simexplain.methods.similarity_attention import weight_rule
from simexplain.models.base import SimilarityModel
from simexplain.networks import at_least_single


def wrong_energy(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of a map's energy where it must not be: ``sum(M * (1 - mask)) / sum(M)``.

    Maps are brought to the masks' size, bilinearly as for soft-masking and as in
    :func:`simexplain.metrics.maps.energy`: on masks of zeros and ones it is 1 minus that metric,
    so that training lowers what is measured.

    Args:
        maps: ``(M,h,w)``, non-negative; any scale.
        masks: ``(M,H,W)`` in [0, 1]: 1 where evidence is allowed, 0 where it is not.

    Returns:
        ``(M,)`` in [0, 1]; 0 for a map that is zero everywhere. Differentiable in the maps.

    Raises:
        ComparisonError: If there is not one mask for each map.
    """
    if maps.dim() != 3 or masks.dim() != 3 or len(maps) != len(masks):
        raise ComparisonError(
            f"Expected maps (M,h,w) and as many masks (M,H,W), got {tuple(maps.shape)} and "
            f"{tuple(masks.shape)}."
        )
    grown = at_grid(maps, (int(masks.shape[1]), int(masks.shape[2])))
    total = grown.sum(dim=(1, 2))
    wrong: Tensor = (grown * (1 - masks)).sum(dim=(1, 2))
    return wrong / total.where(total > 0, total.new_ones(()))


class AttentionMaskLoss(Term):
    """The human in the loop: attention outside what a person allows costs its share of energy.

    The paper on similarity attention leaves it to future work. Images may come with masks of the
    object, or with regions that a person has crossed out; of every masked image in the comparisons
    that mining would take, the share of attention on the wrong side is made small. The mean over
    these images is the loss; images without a mask do not count.

    An image whose mask leaves no pixel allowed, or allows all, has a constant share and teaches
    nothing. The share does not change with the scale of a map, so that weak attention does not
    lower the loss; a map that is zero everywhere has the share 0.
    """

    @typed
    def __init__(
        self,
        *,
        inside: bool = True,
        arch: str = "triplet",
        weights: str = "paper",
        layer: str | None = None,
    ) -> None:
        """Takes the options.

        Args:
            inside: The batch's masks are 1 where evidence is allowed. If false they are 1 where a
                person has crossed it out.
            arch: The comparisons that maps explain: ``siamese``, ``triplet`` or ``quadruplet``.
            weights: The rule of the weight vector, a key of ``WEIGHTS``.
            layer: The layer of the maps, or several with commas between, whose maps are
                multiplied; the model's default layer unless given.

        Raises:
            ComparisonError: If an option is unknown.
        """
        super().__init__()
        weight_rule(weights)
        check_choice("arch", arch, SHAPES)
        self.inside, self.arch, self.weights, self.layer = inside, arch, weights, layer

    def layers(self, model: SimilarityModel) -> tuple[str, ...]:
        """The layers of the maps."""
        return named_layers(self.layer, model)

    def layers_for(self, model: SimilarityModel, images: Tensor) -> tuple[str, ...]:
        """The layers of the maps for images of this size."""
        return named_layers(self.layer, model, images)

    def forward(self, batch: Batch) -> Tensor:
        """The mean share over the images with a mask, of all processes; 0 where there is none.

        Raises:
            ComparisonError: If the batch has no such comparison.
            ModelError: If a mask leaves [0, 1].
        """
        tuples = disjoint_tuples(batch.units, batch.labels, self.arch, generator=batch.generator)
        own = Own.of(batch, tuples.places.flatten())
        weights = tuple_weights(batch, tuples, self.weights)
        maps = at_least_single(
            own_maps(batch, own, weights, self.layers_for(batch.model, batch.images))
        )
        allowed, known = self._allowed(batch, own.which, maps)
        shares = wrong_energy(maps, allowed) * known
        shares_known = own.together(batch, torch.stack((shares, known), dim=1))
        return shares_known[:, 0].sum() / shares_known[:, 1].detach().sum().clamp_min(1)

    def _allowed(self, batch: Batch, which: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Where evidence may be ``(m,H,W)``, and which images have a mask at all ``(m,)``."""
        if batch.masks is None:
            return like.new_ones(like.shape), like.new_zeros(len(like))
        masks = batch.masks[which].to(like)
        known = ~masks.isnan().flatten(1).any(dim=1)
        masks = masks.where(known[:, None, None], masks.new_zeros(()))
        if bool(((masks < 0) | (masks > 1)).any()):
            raise ModelError(
                f"Expected masks in [0, 1] or all NaN, got {float(masks.min()):g} to "
                f"{float(masks.max()):g}; divide by their maximum."
            )
        return masks if self.inside else 1 - masks, known.to(like)
