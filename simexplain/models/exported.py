"""``torch.export`` programs (.pt2): vetted before loading, unflattened so layers can be tapped."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simexplain.data.preprocessing import IMAGENET
from simexplain.errors import ModelError, first_line
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.models.vetting import vetted


def load_exported(path: Path, *, trust: bool, distance: str) -> SimilarityModel:
    """Loads a program of ``torch.export.save``; a fixed batch or image size in it is obeyed.

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
    except Exception as error:  # torch raises anything from KeyError to its own classes here
        raise ModelError(
            f"'{path}' cannot be loaded as an exported program ({first_line(error)}); "
            f"export it again with torch {torch.__version__.split('+')[0]}."
        ) from error
    finally:
        logger.disabled = before
    batch, size = _input_shape(program, path)
    preprocess = replace(IMAGENET, size=size, notes=_notes(program, path))
    return as_similarity_model(
        ExportedNetwork(network),
        preprocess=preprocess,
        name=path.stem,
        distance=distance,
        batch_size=batch,
    )


class ExportedNetwork(nn.Module):
    """An unflattened program, called with the images alone; layers keep their own names."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        # Not a submodule: its children are listed above, under the names the user knows.
        object.__setattr__(self, "_program", network)

    def forward(self, images: torch.Tensor) -> Any:
        """Whatever the program returns for images ``(M,3,H,W)``."""
        return self._program(images)  # type: ignore[operator]


def _input_shape(program: Any, path: Path) -> tuple[int | None, tuple[int, int]]:
    """The fixed batch size (None where dynamic) and the image size of the only input."""
    names = program.graph_signature.user_inputs
    shapes = [n.meta["val"].shape for n in program.graph.nodes if n.name in names]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3:
        raise ModelError(
            f"Expected '{path}' to take one batch of images (M,3,H,W), but it takes "
            f"{', '.join(str(tuple(shape)) for shape in shapes) or 'nothing'}."
        )
    batch, _, height, width = shapes[0]
    sides = [side if isinstance(side, int) else 224 for side in (height, width)]
    return (batch if isinstance(batch, int) else None), (sides[0], sides[1])


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
