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
from simexplain.errors import ModelError, first_line
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.models.vetting import vetted

_USUAL_SIDE = 224
# Up to here torch neither checks nor relies on a lower limit: it is how 0 and 1 are told apart.
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
    # Read once: what is vetted is what is loaded.
    content = path.read_bytes()
    source = io.BytesIO(content) if trust else vetted(path, content)
    logger = logging.getLogger("torch.export")
    before = logger.disabled
    try:
        logger.disabled = True  # it would print a traceback before our one line
        program = torch.export.load(source)
        network = torch.export.unflatten(program)
        call, output = _call_of(program, path), _only_output(program)
    except ModelError:
        raise
    except Exception as error:  # torch raises anything from KeyError to its own classes here
        raise ModelError(
            f"'{path}' cannot be loaded as an exported program ({first_line(error)}); "
            f"export it again with torch {torch.__version__.split('+')[0]}."
        ) from error
    finally:
        logger.disabled = before
    limits = call.limits
    prepare = replace(IMAGENET, size=call.size, notes=_notes(program, path))
    prepare = prepare.for_channels(call.channels)
    model = as_similarity_model(
        ExportedNetwork(network, call),
        output=output,
        preprocess=prepare,
        name=path.stem,
        distance=distance,
        batch_size=limits.fixed,
    )
    model.largest_batch = limits.largest
    return model


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
        place: Which of them the images are.
        spec: How the inputs are laid out as arguments.
        limits: Of the batch.
        size: ``(height, width)`` of the images.
        channels: Of an image.
    """

    values: tuple[Any, ...]
    place: int
    spec: Any
    limits: _Limits
    size: tuple[int, int]
    channels: int = 3


class ExportedNetwork(nn.Module):
    """An unflattened program, called with the images alone; layers keep their own names."""

    def __init__(self, network: nn.Module, call: _Call) -> None:
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        # Not a submodule: its children are listed above, under the names the user knows.
        object.__setattr__(self, "_program", network)
        self._call = call

    def forward(self, images: torch.Tensor) -> Any:
        """Whatever the program returns for images ``(M,3,H,W)``.

        Raises:
            ModelError: If it does not take that many images at once.
        """
        limits = self._call.limits
        if limits.fixed not in (None, len(images)):
            raise ModelError(
                f"Expected {limits.fixed} images in one pass of the exported program, which takes "
                f"no other number, got {len(images)}."
            )
        if limits.largest is not None and len(images) > limits.largest:
            raise ModelError(
                f"Expected at most {limits.largest} images in one pass of the exported program, "
                f"got {len(images)}; pass max_batch={limits.largest}."
            )
        values = list(self._call.values)
        values[self._call.place] = images
        arguments, options = pytree.tree_unflatten(values, self._call.spec)
        return self._program(*arguments, **options)  # type: ignore[operator]


def _call_of(program: Any, path: Path) -> _Call:
    """The only tensor among the inputs, and the constants that were exported beside it.

    Raises:
        ModelError: If there is not exactly one tensor, or it is not one of images.
    """
    values: list[Any] = []
    shapes: list[Sequence[Any]] = []
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    place = 0
    for spec in program.graph_signature.input_specs:
        if spec.kind.name != "USER_INPUT":
            continue
        held = nodes[spec.arg.name].meta.get("val") if spec.arg.name in nodes else None
        if isinstance(held, torch.Tensor):
            place = len(values)
            shapes.append(held.shape)
        values.append(getattr(spec.arg, "value", None))
    images = [shape for shape in shapes if len(shape) == 4 and isinstance(shape[1], int)]
    # Three or fewer columns are rather the colours of a program with channels last.
    if len(shapes) != 1 or not images or (isinstance(images[0][3], int) and images[0][3] <= 3):
        raise ModelError(
            f"Expected '{path}' to take one batch of images (M,C,H,W), but it takes "
            f"{', '.join(str(tuple(shape)) for shape in shapes) or 'nothing'}."
        )
    batch, channels, height, width = shapes[0]
    sides = (_side(height, program), _side(width, program))
    spec = program.module_call_graph[0].signature.in_spec
    limits = _limits_of(batch, program)
    return _Call(tuple(values), place, spec, limits, sides, channels)


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
    if True in modes:
        notes.append(
            f"'{path}' was exported in training mode, so its results depend on the whole batch; "
            "export it again after .eval()."
        )
    return tuple(notes)
