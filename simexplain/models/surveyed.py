"""What one survey of a model found for images of one shape, remembered with the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError, SimexplainError, first_line
from simexplain.models.choosing import Maps, depth, usable_layers
from simexplain.models.layers import GridHints, Layer, Layout
from simexplain.models.moving import moved
from simexplain.networks import split_call
from simexplain.surveying import LAYOUTS, Survey, survey, swapped
from simexplain.tracing import Traceable

RELEVANT = 0.1
"""The share of an embedding from which on results warn that it bypasses the layer."""

_SHALLOW, _DEEP = 0.25, 12


class Surveyable(Traceable, Protocol):
    """What a survey needs of a model."""

    @property
    def hints(self) -> GridHints:
        """What the network says about its token grid."""

    def parameters(self, recurse: bool = True) -> Any:
        """Those of the network."""


class Surveyed:
    """Layers, layouts and shares of a model for images ``(C,H,W)``."""

    def __init__(self, model: Surveyable, shape: tuple[int, int, int]) -> None:
        """Runs the survey.

        Raises:
            ModelError: If the network does not run on such images.
        """
        self.model, self.shape = model, shape
        self._shares: dict[str, float] = {}
        pictures = self._pictures()
        with _expecting(shape):
            found = survey(model, pictures.picture, pictures.replaced)
        maps = Maps(found, pictures, model.hints).found
        self._embedding = found.embedding
        self._layouts: dict[str, Layout] = {one.run.name: one.layout for one in maps}
        self._error = ""
        self._layers: tuple[Layer, ...] = ()
        self._shallow = ""
        try:
            self._layers = usable_layers(found, maps, shape[1:], self.bypass)
            self._shallow = self._early(found)
        except ModelError as error:
            self._error = str(error)

    def usable(self) -> tuple[Layer, ...]:
        """Every usable layer in order of execution.

        Raises:
            ModelError: If there is none.
        """
        if self._error:
            raise ModelError(self._error)
        return self._layers

    def grid(self, layer: str, output: Tensor) -> Tensor | None:
        """The output of a layer as a map ``(M,C,h,w)``; None where it is not one."""
        layout = self._layout(layer)
        return None if layout is None else layout(output)

    def _layout(self, layer: str) -> Layout | None:
        name, call = split_call(layer)
        known = self._layouts.get(layer)
        return self._layouts.get(name) if known is None and call == 0 else known

    def bypass(self, layer: str) -> float:
        """The share of the embedding that reaches it past the cells of a layer.

        The first picture is run with the cells of the second; the share is how far the embedding
        then stays from that of the second, over how far the two are apart.
        """
        layout = self._layout(layer)
        if layout is None:
            return 1.0
        if layer not in self._shares:
            pictures = self._pictures()
            both = torch.cat((pictures.picture, pictures.other))
            axis = LAYOUTS[layout.kind][1]
            rows = swapped(self.model, both, layer, axis, layout.cells_of)
            apart = float((self._embedding.to(rows) - rows[1]).norm())
            behind = float((rows[0] - rows[1]).norm())
            self._shares[layer] = min(1.0, behind / apart) if apart > 0 else 0.0
        return self._shares[layer]

    def known(self, names: Sequence[str]) -> list[Layer]:
        """Those of the usable layers that have these names."""
        return [layer for layer in self._layers if layer.name in names]

    def cautions(self, layers: Sequence[str]) -> tuple[str, ...]:
        """Sentences on layers that part of the embedding bypasses, and on early ones."""
        used, found = self.known(layers), []
        worst = max(used, key=lambda layer: layer.bypass, default=None)
        if worst is not None and worst.bypass > RELEVANT:
            found.append(self._bypassed(worst))
        if self._shallow and any(layer.default for layer in used):
            found.append(self._shallow)
        if len({layer.region for layer in used}) > 1:
            found.append(
                "The layers look at different parts of the image, so their joined map is drawn as "
                "if all looked at the whole; explain them one by one."
            )
        return tuple(found)

    def _bypassed(self, layer: Layer) -> str:
        layout = self._layouts[layer.name]
        way = "through a class token or the like" if layout.beside else "through parallel layers"
        return (
            f"{layer.bypass:.0%} of the embedding bypasses layer '{layer.name}' ({way}), which its "
            "map cannot show; an earlier layer or a method on pixels, such as occlusion, sees more."
        )

    def _early(self, found: Survey) -> str:
        name = next(layer.name for layer in self._layers if layer.default)
        done, total = depth(found, name)
        if total < _DEEP or done > _SHALLOW * total:
            return ""
        return (
            f"The last map that the whole embedding comes from is layer '{name}', after {done} of "
            f"{total} operations, so maps show early features; name a later layer with layer= to "
            "see one of the ways that part there."
        )

    def _pictures(self) -> Any:
        reference = next(iter(self.model.parameters()), torch.zeros(()))
        kind = reference.dtype if reference.is_floating_point() else torch.float32
        return moved(torch.zeros((1, *self.shape), dtype=kind, device=reference.device))


@contextmanager
def _expecting(shape: tuple[int, int, int]) -> Iterator[None]:
    """Turns what a network raises on images of a size into a sentence."""
    try:
        yield
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, SimexplainError):
            raise
        channels, height, width = shape
        raise ModelError(
            f"The model does not run on images of {channels}x{height}x{width} "
            f"({type(error).__name__}: {first_line(error).rstrip('.')}); give it the size and "
            "the inputs that its forward expects."
        ) from error


def is_convolutional(network: nn.Module) -> bool:
    """Whether a network has no attention, whose tables could be taken for maps."""
    names = (f"{name} {type(module).__name__}".lower() for name, module in network.named_modules())
    return not any("attn" in name or "attention" in name for name in names)
