"""``torch.export`` programs (.pt2): vetted before loading, unflattened so layers can be tapped."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from simexplain.data.preprocessing import IMAGENET
from simexplain.errors import ModelError, TwoImagesError, first_line
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import Embedder, as_similarity_model
from simexplain.models.vetting import vetted

_USUAL_SIDE = 224
# Up to here torch neither checks nor relies on a lower limit, which only separates 0 from 1.
_UNCHECKED = 2


def load_exported(path: Path, *, trust: bool, distance: str) -> SimilarityModel:
    """Loads a program of ``torch.export.save``; limits of batch and image size in it are obeyed.

    Args:
        path: The .pt2 file.
        trust: Load it even if it holds more than tensors and known operators.
        distance: As for ``as_similarity_model``.

    Raises:
        ModelError: If it is damaged, could run code, or does not take one batch of images.
    """
    program, network, call = _read(path, trust=trust, images=1)
    limits = call.limits
    prepare = replace(IMAGENET, size=call.sizes[0], notes=_notes(program, path))
    prepare = prepare.for_channels(call.channels)
    model = as_similarity_model(
        network,
        output=_only_output(program),
        preprocess=prepare,
        name=path.stem,
        distance=distance,
        batch_size=limits.fixed,
    )
    model.largest_batch = limits.largest
    return model


def load_exported_pair(path: Path, *, trust: bool) -> tuple[Embedder, Embedder]:
    """Loads a program of two images that gives their score, once for each of the two inputs.

    Raises:
        ModelError: As for :func:`load_exported`, or if it does not take two images.
    """
    program, network, call = _read(path, trust=trust, images=2)
    notes = _notes(program, path)
    first, second = (
        Embedder(
            network,
            preprocess=replace(IMAGENET, size=size, notes=notes).for_channels(call.channels),
            name=path.stem,
            batch_size=call.limits.fixed,
        )
        for size in call.sizes
    )
    first.largest_batch = second.largest_batch = call.limits.largest
    return first, second


def _read(path: Path, *, trust: bool, images: int) -> tuple[Any, ExportedNetwork, _Call]:
    """A program, what runs it, and how it is called with so many images."""
    # Read once: what is vetted is what is loaded.
    content = path.read_bytes()
    source = io.BytesIO(content) if trust else vetted(path, content)
    logger = logging.getLogger("torch.export")
    before = logger.disabled
    try:
        logger.disabled = True  # it would print a traceback before our one line
        program = torch.export.load(source)
        network = torch.export.unflatten(program)
        call = _call_of(program, path, images)
    except ModelError:
        raise
    except Exception as error:  # torch raises anything from KeyError to its own classes here
        raise ModelError(
            f"'{path}' cannot be loaded as an exported program ({first_line(error)}); "
            f"export it again with torch {torch.__version__.split('+')[0]}."
        ) from error
    finally:
        logger.disabled = before
    return program, ExportedNetwork(network, call), call


@dataclass(frozen=True)
class _Limits:
    """How many images one pass takes: one number only, at most some number, or any."""

    fixed: int | None = None
    largest: int | None = None


@dataclass(frozen=True)
class _Call:
    """How a program is called with images alone.

    Attributes:
        values: What each input gets, None for the images, in the order of the program.
        places: Which of them the images are, one or two.
        spec: How the inputs are laid out as arguments.
        limits: Of the batch.
        sizes: ``(height, width)`` of each of the images.
        channels: Of an image.
    """

    values: tuple[Any, ...]
    places: tuple[int, ...]
    spec: Any
    limits: _Limits
    sizes: tuple[tuple[int, int], ...]
    channels: int = 3


class ExportedNetwork(nn.Module):
    """An unflattened program, called with the images alone; layers keep their own names."""

    def __init__(self, network: nn.Module, call: _Call) -> None:
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        # Not a submodule: its children are listed above, under the user's names.
        object.__setattr__(self, "_program", network)
        self._call = call

    def forward(self, *images: torch.Tensor) -> Any:
        """Whatever the program returns for images ``(M,3,H,W)``, or for two of them.

        Raises:
            ModelError: If it does not take that many images at once.
        """
        limits, count, channels = self._call.limits, len(images[0]), self._call.channels
        if images[0].shape[1] != channels:
            raise ModelError(
                f"Expected images of {channels} channel{'s' * (channels != 1)}, as the exported "
                f"program takes, got {images[0].shape[1]}; leave --channels (channels=) away."
            )
        if limits.fixed not in (None, count):
            raise ModelError(
                f"Expected {limits.fixed} images in one pass of the exported program, which takes "
                f"no other number, got {count}."
            )
        if limits.largest is not None and count > limits.largest:
            raise ModelError(
                f"Expected at most {limits.largest} images in one pass of the exported program, "
                f"got {count}; pass max_batch={limits.largest}."
            )
        values = list(self._call.values)
        for position, image in zip(self._call.places, images, strict=True):
            values[position] = image
        arguments, options = pytree.tree_unflatten(values, self._call.spec)
        return self._program(*arguments, **options)  # type: ignore[operator]


def _call_of(program: Any, path: Path, images: int) -> _Call:
    """The tensors among the inputs, and the constants that were exported beside them.

    Raises:
        ModelError: If there are not so many tensors, or one is not one of images.
        TwoImagesError: If there are two of images where one is wanted.
    """
    values: list[Any] = []
    shapes: list[Sequence[Any]] = []
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    places: list[int] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind.name != "USER_INPUT":
            continue
        held = nodes[spec.arg.name].meta.get("val") if spec.arg.name in nodes else None
        if isinstance(held, torch.Tensor):
            places.append(len(values))
            shapes.append(held.shape)
        values.append(getattr(spec.arg, "value", None))
    # Three or fewer columns are rather the colours of a program with channels last.
    fitting = [
        len(shape) == 4
        and isinstance(shape[1], int)
        and not (isinstance(shape[3], int) and shape[3] <= 3)
        for shape in shapes
    ]
    if len(shapes) != images or not all(fitting):
        two = len(shapes) == 2 and all(fitting)
        number = "one batch" if images == 1 else "two batches"
        raise (TwoImagesError if two else ModelError)(
            f"Expected '{path}' to take {number} of images (M,C,H,W), but it takes "
            f"{', '.join(str(tuple(shape)) for shape in shapes) or 'nothing'}"
            f"{'; pairs are explained by simexplain explain (load_pair_model)' if two else ''}."
        )
    batch, channels = shapes[0][:2]
    sizes = tuple((_side(shape[2], program), _side(shape[3], program)) for shape in shapes)
    spec = program.module_call_graph[0].signature.in_spec
    limits = _limits_of(batch, program)
    return _Call(tuple(values), tuple(places), spec, limits, sizes, channels)


def _range_of(size: Any, program: Any) -> tuple[int, int | None]:
    """The least and the most that a dynamic size may be."""
    limits = program.range_constraints.get(size.node.expr)
    if limits is None:
        return 0, None
    least, most = (
        int(limit) if getattr(limit, "is_Integer", False) else None
        for limit in (limits.lower, limits.upper)
    )
    return least or 0, most


def _limits_of(batch: Any, program: Any) -> _Limits:
    if isinstance(batch, int):
        return _Limits(fixed=batch)
    if not batch.node.expr.is_Symbol:  # a multiple of something, of which one is known to do
        return _Limits(fixed=int(batch.node.hint))
    least, most = _range_of(batch, program)
    if least > _UNCHECKED:  # what is missing to the least is filled up, as for a fixed number
        return _Limits(fixed=least)
    return _Limits(largest=most)


def _side(side: Any, program: Any) -> int:
    """The usual side where the program takes it, else the one it was exported with."""
    if isinstance(side, int):
        return side
    least, most = _range_of(side, program)
    usual = side.node.expr.is_Symbol and least <= _USUAL_SIDE and (most or 2**31) >= _USUAL_SIDE
    return _USUAL_SIDE if usual or side.node.hint is None else int(side.node.hint)


def _only_output(program: Any) -> int | str | None:
    """Where the embedding is if the program returns a container of a single tensor."""
    spec = program.module_call_graph[0].signature.out_spec
    if spec.num_leaves != 1 or spec.num_nodes != 2:
        return None
    key: int | str = spec.context[0] if spec.type is dict else 0
    return key


def runs_autocast(program: Any) -> bool:
    """Whether part of a program runs under ``autocast``, which is one piece without layers."""
    whole = torch.ops.higher_order.wrap_with_autocast
    graphs = (part.graph for part in program.graph_module.modules() if hasattr(part, "graph"))
    return any(node.target is whole for graph in graphs for node in graph.nodes)


def _notes(program: Any, path: Path) -> tuple[str, ...]:
    """What is assumed of the program or odd about it."""
    notes = [
        f"'{path}' does not say how pictures are prepared; the values usual for ImageNet are used."
    ]
    modes = {
        bool(node.args[5])
        for node in program.graph.nodes
        if str(node.target) == "aten.batch_norm.default" and len(node.args) > 5
    }
    if runs_autocast(program):
        notes.append(
            f"'{path}' was exported with torch.autocast entered in its forward, so the layers that "
            "run there cannot be looked into; export it without autocast, or use a method on "
            "pixels such as occlusion."
        )
    if True in modes:
        notes.append(
            f"'{path}' was exported in training mode, so its results depend on the whole batch; "
            "export it again after .eval()."
        )
    return tuple(notes)
