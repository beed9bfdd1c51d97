"""The images of a step's comparisons that are this process's own, and their maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.losses.attention import attention_maps
from simexplain.losses.objective import Batch, unit_rows


@dataclass(frozen=True)
class Own:
    """Which of the images of all comparisons are this process's own.

    Attributes:
        which: Places of its own images in its pass ``(m,)``.
        order: Places of the same images among those of all comparisons ``(m,)``.
        orders: The same of every process, in the order of ranks.
    """

    which: Tensor
    order: Tensor
    orders: tuple[Tensor, ...]

    @classmethod
    def of(cls, batch: Batch, places: Tensor) -> Own:
        """Divides the images of all comparisons ``(T*K,)`` by the process that has them."""
        each = len(batch.images)
        orders = tuple(
            ((places >= rank * each) & (places < (rank + 1) * each)).nonzero().flatten()
            for rank in range(batch.processes.world)
        )
        order = orders[batch.processes.rank]
        return cls(places[order] - batch.start, order, orders)

    def together(self, batch: Batch, rows: Tensor) -> Tensor:
        """Rows of this process's images ``(m,E)`` as those of all comparisons ``(T*K,E)``."""
        gathered = batch.processes.gathered(rows, [len(order) for order in self.orders])
        return gathered[torch.cat(self.orders).argsort()]


def own_maps(
    batch: Batch, own: Own, weights: Tensor, layers: Sequence[str], cam: str | None = None
) -> Tensor:
    """The maps ``(m,h,w)`` of this process's own images for scores ``w . f``, non-negative.

    Args:
        batch: The pass, opened at the layers.
        own: Which images are meant.
        weights: The weight vector of each image of all comparisons ``(T*K,E)``, held constant.
        layers: The layers of the maps.
        cam: Their formula, as in :func:`~simexplain.losses.attention.attention_maps`.
    """
    if not len(own.which):  # the other processes have all images of this step's comparisons
        return batch.traced.maps[layers[0]][own.which].sum(dim=1)
    rows = unit_rows(batch.model, batch.traced.embeddings)
    network = batch.model.network
    return attention_maps(batch.traced, rows, network, layers, own.which, weights[own.order], cam)
