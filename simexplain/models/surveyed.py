"""The survey of a model for images of one shape, remembered with the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError, SimexplainError, first_line
from simexplain.models.choosing import Map, Maps, depth, feeds, is_picture, usable_layers
from simexplain.models.layers import GridHints, Layer, Layout
from simexplain.models.moving import WHOLE, Moved, Region, moved
from simexplain.networks import preserve_state, split_call
from simexplain.surveying import Input, Survey, survey, swapped
from simexplain.tracing import Trace, Traceable, embed_alike

RELEVANT = 0.1
"""The share of an embedding from which on results warn that it bypasses the layer."""

_MOVES = (
    "Layer '{}' lies elsewhere in every image, since the network computes from the image which "
    "part of it to look at, so its map cannot be believed; name an earlier layer with layer=, or "
    "use a method on pixels such as occlusion."
)
_DRAWS = (
    "The network draws random numbers although it is in eval mode, as F.dropout does without "
    "training=False, so embeddings and maps are others in every call; switch that off in its "
    "forward."
)
_SHALLOW, _DEEP, _LATER = 0.25, 12, 3


class Surveyable(Traceable, Protocol):
    """What a survey needs of a model."""

    @property
    def hints(self) -> GridHints:
        """Hints of the network about its token grid."""

    def parameters(self, recurse: bool = True) -> Any:
        """Those of the network."""


@dataclass(frozen=True, eq=False)
class AtHand:
    """Two images ``(2,C,H,W)`` and the embedding ``(E,)`` of the first."""

    both: Tensor
    row: Tensor


_TRIED = 2
"""Inputs of layers that are tried at most."""

_TOKENS = 3
"""Axes of tokens: images, positions, channels."""


class Surveyed:
    """Layers, layouts and shares of a model for images ``(C,H,W)``."""

    def __init__(self, model: Surveyable, shape: tuple[int, int, int]) -> None:
        """Runs the survey.

        Raises:
            ModelError: If the network does not run on such images or has no gradients.
        """
        self.model, self.shape = model, shape
        self._shares: dict[tuple[str, bool], float] = {}
        self._at_hand: AtHand | None = None
        pictures = self._pictures()
        survey = _surveyed(model, pictures)
        looked = Maps(survey, pictures, model.hints)
        maps = self._with_last_input(looked.candidates, pictures)
        self._embedding = survey.embedding
        self._draws = survey.draws
        self._moving = {run.name for run in survey.runs if run.moves}
        self._layouts: dict[str, Layout] = {one.run.name: one.layout for one in maps}
        self._error = ""
        self._layers: tuple[Layer, ...] = ()
        self._on_default: tuple[str, ...] = ()
        try:
            self._layers = usable_layers(survey, maps, shape[1:], self.bypass, self._of_noise)
            self._on_default = (
                *self._early(survey), *self._doubted(survey, looked), *self._computed(survey)
            )  # fmt: skip
        except ModelError as error:
            self._error = self._constant(pictures) or str(error)

    def _with_last_input(self, maps: Sequence[Map], pictures: Moved) -> list[Map]:
        """The maps that layers return, and the last one that layers are called with."""
        inputs = [one for one in maps if isinstance(one.run.module, Input) and feeds(one)]
        inputs = [one for one in inputs if not is_picture(one, self.shape[1:])]
        tried = reversed(inputs[-_TRIED:])
        last = next((one for one in tried if self._reached(one, pictures)), None)
        return [one for one in maps if one is last or not isinstance(one.run.module, Input)]

    def _reached(self, one: Map, pictures: Moved) -> bool:
        """Whether all that follows takes what takes the place of a layer's input.

        A view of it that was made before does not.
        """
        both = torch.cat((pictures.pictures[:1], pictures.other))
        axis = one.layout.images
        rows = swapped(self.model, both, one.run.name, axis, lambda _, other: other)
        return torch.allclose(rows[0], rows[1], rtol=0, atol=1e-4 * float(rows[1].abs().max()))

    def _constant(self, pictures: Moved) -> str:
        """What to say of an embedding that is the same for two pictures, or nothing."""
        if self._embedding.numel() < 2 or not bool(self._embedding.ne(0).any()):
            return ""
        other = embed_alike(self.model, pictures.other, 1)[0]
        if not torch.allclose(other, self._embedding.to(other), rtol=0, atol=1e-7):
            return ""
        return (
            "The embedding is the same for every image, so nothing in it can be explained; look "
            "for dead weights or activations, or a part of the model that ignores its input."
        )

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

    def region(self, layer: str) -> Region:
        """Where in the image the cells of a layer lie."""
        layout = self._layout(layer)
        return WHOLE if layout is None else layout.region

    def of_tokens(self, layers: Sequence[str]) -> bool:
        """Whether any of these layers gives tokens; also if one of them is not known."""
        layouts = [self._layout(layer) for layer in layers]
        return any(layout is None or len(layout.kind) == _TOKENS for layout in layouts)

    def token_layouts(self, count: int) -> tuple[Layout, ...]:
        """How layers of so many tokens lie over the image, in the order of execution."""
        return tuple(
            layout
            for layout in self._layouts.values()
            if layout.tokens == count and len(layout.kind) == _TOKENS
        )

    def _layout(self, layer: str) -> Layout | None:
        name, call = split_call(layer)
        known = self._layouts.get(layer)
        return self._layouts.get(name) if known is None and call == 0 else known

    def meet(self, images: Tensor, rows: Tensor) -> int | None:
        """Notes two images, with which shares are measured from now on; the first ones count.

        Args:
            images: ``(M,C,H,W)``.
            rows: Their embeddings ``(M,E)``.

        Returns:
            The place of the second one, if they were noted now.
        """
        if self._at_hand is not None or rows.shape[1:] != self._embedding.shape:
            return None
        others = range(1, len(images))
        other = next((n for n in others if not torch.equal(images[n], images[0])), None)
        if other is not None:
            both = torch.stack((images[0], images[other])).detach().clone()
            self._at_hand = AtHand(both, rows[0].detach().clone())
        return other

    def unmeasured(self, layers: Sequence[str]) -> bool:
        """Whether the share that bypasses one of these layers waits for the first images."""
        return self._at_hand is None and any(one.measure for one in self.known(layers))

    def measure(self, images: Tensor, traced: Trace, finish: Callable[[Tensor], Tensor]) -> None:
        """Measures shares on the first images, from a pass that was recorded.

        Args:
            images: ``(M,C,H,W)``.
            traced: Their pass.
            finish: Makes embeddings of what was recorded as its result.
        """
        rows = finish(traced.embeddings.detach())
        other = self.meet(images, rows)
        if other is None or self._at_hand is None:
            return
        size = traced.counts[0]
        for layer in (one.name for one in self.known(traced.layers) if one.measure):
            layout, source = self._layouts[layer], traced.outputs[layer][0]
            tape, axis = traced.tapes[0], layout.images
            if tape.result is None or not tape.replays(source):
                continue
            own, rest = torch.split(source.detach(), [1, size - 1], dim=axis)
            cells = traced.outputs[layer][other // size].detach().narrow(axis, other % size, 1)
            mixed = torch.cat((layout.cells_of(own, cells), rest), dim=axis)
            try:
                with preserve_state(self.model.network):
                    result = tape.replay({id(source): mixed})[id(tape.result)].detach()
            except ModelError:  # it has to be run as a whole
                continue
            self._shares[layer, True] = _share(rows[0], rows[other], finish(result)[0])

    def bypass(self, layer: str) -> float:
        """The share of the embedding that reaches it past the cells of a layer.

        An image is run with the cells of another one; the share is how far the embedding then
        stays from that of the other, over how far the two are apart. The images are the first two
        different ones that were explained, or pictures of noise where none were.
        """
        return self._of_noise(layer) if self._at_hand is None else self._share(layer, self._at_hand)

    def usual_bypass(self, layer: str) -> float:
        """The same on pictures of noise, whatever was explained before."""
        known = self.known((layer,))
        passed = bool(known) and known[0].measure is None
        return 0.0 if passed else self._of_noise(layer)

    def _of_noise(self, layer: str) -> float:
        pictures = self._pictures()
        both = torch.cat((pictures.pictures[:1], pictures.other))
        return self._share(layer, AtHand(both, self._embedding))

    def _share(self, layer: str, images: AtHand) -> float:
        layout, key = self._layout(layer), (layer, images is self._at_hand)
        if layout is None:
            return 1.0
        if key not in self._shares:
            rows = swapped(self.model, images.both, layer, layout.images, layout.cells_of)
            self._shares[key] = _share(images.row.to(rows), rows[1], rows[0])
        return self._shares[key]

    def known(self, names: Sequence[str]) -> list[Layer]:
        """Those of the usable layers that have these names."""
        return [layer for layer in self._layers if layer.name in names]

    def cautions(self, layers: Sequence[str]) -> tuple[str, ...]:
        """Sentences on layers that part of the embedding bypasses, and on early ones."""
        used, notes = self.known(layers), [_MOVES.format(x) for x in layers if x in self._moving]
        if self._draws:
            notes.append(_DRAWS)
        worst = max(used, key=lambda layer: layer.bypass, default=None)
        if worst is not None and worst.bypass > RELEVANT:
            notes.append(self._bypassed(worst))
        if any(layer.default for layer in used):
            notes += self._on_default
        return tuple(notes)

    def _bypassed(self, layer: Layer) -> str:
        layout = self._layouts[layer.name]
        way = "through a class token or the like" if layout.beside else "through parallel layers"
        on = "two pictures of noise" if self._at_hand is None else "the first two images explained"
        return (
            f"{layer.bypass:.0%} of the embedding bypasses layer '{layer.name}' ({way}; measured "
            f"on {on}, it varies with the images), which its map cannot show; an earlier layer or "
            "a method on pixels, such as occlusion, sees more."
        )

    @property
    def _default(self) -> str:
        return next(layer.name for layer in self._layers if layer.default)

    def _doubted(self, survey: Survey, looked: Maps) -> list[str]:
        names = [run.name for run in survey.runs]
        later = names[names.index(self._default) + 1 :]
        doubted = [(name, grid) for name, grid in looked.doubted.items() if name in later]
        if not doubted:
            return []
        name, (rows, columns) = doubted[-1]
        return [
            f"Layer '{name}', after the default layer '{self._default}', has as many positions as "
            f"a grid of {rows}x{columns}, but they do not follow the parts of an image, so it was "
            "not taken for a map."
        ]

    def _computed(self, survey: Survey) -> list[str]:
        """What to know where forward makes the last map of several, and no layer gives it."""
        layouts = list(self._layouts.values())
        for slope in survey.computed:
            grids = (layout(slope) for layout in layouts if layout.images < slope.dim())
            if any(grid is not None and _spread(grid) for grid in grids):
                done, total = depth(survey, self._default)
                return [
                    "The last map of the image is computed in the network's forward, and no layer "
                    f"gives it, so maps show layer '{self._default}', after {done} of {total} "
                    "operations, and nothing of what follows it; hand that map through a layer of "
                    "its own, such as nn.Identity(), to have it explained."
                ]
        return []

    def _early(self, survey: Survey) -> list[str]:
        name = self._default
        done, total = depth(survey, name)
        names = [layer.name for layer in self._layers]
        later = len(names) - 1 - names.index(name)
        if done > _SHALLOW * total or (total < _DEEP and later < _LATER):
            return []
        return [
            f"The last map that the whole embedding comes from is layer '{name}', after {done} of "
            f"{total} operations, so maps show early features; name a later layer with layer= to "
            "see one of the ways that part there."
        ]

    def _pictures(self) -> Moved:
        reference = next(iter(self.model.parameters()), torch.zeros(()))
        kind = reference.dtype if reference.is_floating_point() else torch.float32
        return moved(torch.zeros((1, *self.shape), dtype=kind, device=reference.device))


def _spread(grid: Tensor) -> bool:
    """Whether more than one cell of a gradient ``(M,C,h,w)`` is not zero."""
    return int(grid.ne(0).any(dim=1).sum()) > len(grid)


def _surveyed(model: Surveyable, pictures: Moved) -> Survey:
    try:
        return survey(model, pictures.pictures)
    except RuntimeError as error:  # of autograd, say where something was overwritten
        if isinstance(error, SimexplainError) or "memory" in str(error):
            raise
        raise ModelError(
            f"The network has no gradients at its layers ({first_line(error).rstrip('.')}); change "
            "its forward, or use occlusion, sbsm or random_masks, which need none."
        ) from error


def _share(first: Tensor, second: Tensor, mixed: Tensor) -> float:
    """How far an embedding ``(E,)`` stays from the second one, over how far the first is."""
    apart = float((first - second).norm())
    return min(1.0, float((mixed - second).norm()) / apart) if apart > 0 else 0.0


def is_convolutional(network: nn.Module) -> bool:
    """Whether a network has no attention, whose tables could be taken for maps."""
    names = (f"{name} {type(module).__name__}".lower() for name, module in network.named_modules())
    return not any("attn" in name or "attention" in name for name in names)
