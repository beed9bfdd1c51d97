"""Learned proxies of classes in the space of every level of an AVSL model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError
from simexplain.graph.cams import pack
from simexplain.graph.inference import Rows

BEYOND = {
    "batch": "the proxies of the batch's classes (AVSL's code)",
    "positive": "those, and each image is only drawn to its own (AVSL's text)",
}
"""What is compared where there are more classes than proxies can be held at once."""


class Proxies(nn.Module):
    """One learned point per class and level, compared like an image.

    Attributes:
        levels: Per level ``(C,r)``; brought to unit length in use.
    """

    def __init__(
        self, classes: int, widths: Sequence[int], *, most: int = 1000, beyond: str = "batch"
    ) -> None:
        """Draws them.

        Args:
            classes: ``C``.
            widths: Nodes per level.
            most: With more classes than this, only some proxies are used in a step.
            beyond: Which, a key of :data:`BEYOND`.

        Raises:
            ModelError: If a number or name does not fit.
        """
        super().__init__()
        if classes < 1 or most < 0:
            raise ModelError(f"Expected at least 1 class and most >= 0, got {classes} and {most}.")
        if beyond not in BEYOND:
            raise ModelError(f"Expected beyond to be one of {', '.join(BEYOND)}, got {beyond!r}.")
        self.classes, self.most, self.beyond = classes, most, beyond
        self.levels = nn.ParameterList(torch.empty(classes, width) for width in widths)
        for level in self.levels:
            nn.init.kaiming_normal_(level, mode="fan_out")

    @property
    def attract_only(self) -> bool:
        """Whether images are only drawn to their own proxies."""
        return self.classes > self.most and self.beyond == "positive"

    def columns(self, labels: Tensor) -> Tensor:
        """The classes ``(K,)`` whose proxies are compared with images of these labels ``(N,)``.

        Raises:
            ModelError: If a label is not the number of a class.
        """
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ModelError(
                f"Expected class numbers from 0 to {self.classes - 1}, got "
                f"{int(labels.min())} to {int(labels.max())}; number the training classes anew."
            )
        if self.classes > self.most:
            present: Tensor = torch.unique(labels)
            return present
        return torch.arange(self.classes, device=labels.device)

    def rows(self, columns: Tensor, batch: Rows) -> Tensor:
        """Proxies as rows ``(K,E)`` of the model.

        A proxy has no CAMs: its certainty is the mean of the batch over images and nodes, level by
        level, as in AVSL's code.

        Args:
            columns: From :meth:`columns`.
            batch: The images they will be compared with.
        """
        chosen = [level[columns].to(batch.embeddings[0]) for level in self.levels]
        sure = [
            level.detach().mean().expand(own.shape)
            for level, own in zip(batch.certainties, chosen, strict=True)
        ]
        return pack(chosen, sure)
