"""Programs without layers, TorchScript and ONNX: only methods that work on pixels explain them.

Whether a file may be loaded without being trusted:

* TorchScript: no. An archive is a program that runs while it is loaded (``__setstate__``), and its
  language can write and map files (``aten::save``, ``aten::from_file``). PyTorch's security policy
  treats it as executable code (pytorch/pytorch#152336). It needs ``trust_pickle``.
* ONNX: yes. A graph of fixed operators without access to files; custom operators would have to be
  registered by hand, which is not done here.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.data.preprocessing import IMAGENET, Preprocess
from simexplain.errors import ModelError, first_line
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import Embedder, Output
from simexplain.models.layers import Layer

PIXEL_METHODS: dict[str, bool] = {}
"""Methods on pixels by name: whether they need a gradient. Filled by the table of methods above."""

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
}


class BlackBox(SimilarityModel):
    """A program from images to embeddings without visible layers.

    Attributes:
        differentiable: Whether its embeddings have gradients with respect to the pixels.
    """

    def __init__(
        self,
        program: Callable[[Tensor], Any],
        *,
        output: Output = None,
        preprocess: Preprocess = IMAGENET,
        distance: str = "euclidean",
        name: str = "",
        batch_size: int | None = None,
        differentiable: bool = True,
    ) -> None:
        """Wraps a program; it is not changed.

        Args:
            program: Takes images ``(M,3,H,W)`` and returns embeddings ``(M,E)``: a TorchScript
                module or any function.
            output: Where it returns more than a tensor, as for ``as_similarity_model``.
            preprocess: How pictures become input tensors.
            distance: ``euclidean``, ``squared`` or ``cosine``, on unit rows.
            name: What to call it in figures.
            batch_size: The only number of images that one call takes, or None.
            differentiable: Whether it gives gradients with respect to the images.
        """
        super().__init__()
        self.preprocess = preprocess
        self.name = name or getattr(program, "original_name", type(program).__name__)
        self.batch_size = batch_size
        self.differentiable = differentiable
        works = pixel_methods(differentiable)
        self._sealed = _Sealed(
            program,
            f"{self.name} is a black box whose layers cannot be tapped; use a method that works on "
            f"pixels: {', '.join(works)}.",
        )
        self._embedder = Embedder(self._sealed, output=output, distance=distance)

    @property
    def network(self) -> nn.Module:
        """The program as a module, whose parts have no names."""
        return self._sealed

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of the program, if it has any."""
        return self._sealed.parameters(recurse)

    def embed(self, images: Tensor) -> Tensor:
        """Unit rows ``(M,E)``; a zero vector stays zero."""
        return self._embedder.embed(images)

    def vectors(self, images: Tensor) -> Tensor:
        """What the program returns ``(M,E)``, not normalised; float32 or float64."""
        return self._embedder.vectors(images)

    def distance(self, q: Tensor, g: Tensor) -> Tensor:
        """Distances ``(Q,G)`` of unit rows ``(Q,E)`` and ``(G,E)``, as named at construction."""
        return self._embedder.distance(q, g)

    def layers_for(self, images: Tensor) -> tuple[Layer, ...]:
        """A black box has no layers.

        Raises:
            ModelError: Always; names the methods that do work.
        """
        raise ModelError(self._sealed.sealed)


def pixel_methods(differentiable: bool) -> tuple[str, ...]:
    """The names of the methods on pixels that work with a gradient of the pixels, or without."""
    return tuple(name for name, needed in PIXEL_METHODS.items() if differentiable or not needed)


class _Sealed(nn.Module):
    """A module around a program: its parts can be moved and switched, but not found by name.

    Hooks in TorchScript never fire, so no layer may be offered; ``sealed`` reports it.
    """

    def __init__(self, program: Callable[[Tensor], Any], sealed: str) -> None:
        super().__init__()
        self.sealed = sealed
        # Not a submodule, which would give its parts names.
        object.__setattr__(self, "program", program)

    @property
    def _inner(self) -> nn.Module | None:
        program = self.__dict__["program"]
        return program if isinstance(program, nn.Module) else None

    def forward(self, images: Tensor) -> Any:
        """Whatever the program returns."""
        return self.__dict__["program"](images)

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """This module and all parts of the program, so that their modes are kept and restored."""
        yield self
        if self._inner is not None:
            yield from self._inner.modules()

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of the program, which tell its device and number type."""
        if self._inner is not None:
            yield from self._inner.parameters(recurse)

    def train(self, mode: bool = True) -> _Sealed:
        """Switches all parts."""
        super().train(mode)
        if self._inner is not None:
            self._inner.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Sealed:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._inner is not None:
            self._inner._apply(fn)  # type: ignore[no-untyped-call]
        return self


class OnnxProgram:
    """An ONNX graph, run by onnxruntime on the CPU; it gives no gradients.

    Attributes:
        batch_size: The fixed number of images, or None.
        channels: Of an image; 3 where the graph leaves it open.
        size: The fixed ``(height, width)``; None where the graph leaves a side open.
    """

    def __init__(self, path: Path) -> None:
        """Reads a graph.

        Raises:
            ModelError: If onnxruntime is missing, or the file is damaged or takes no images.
        """
        self._session = _session(path)
        inputs = self._session.get_inputs()
        shape = list(inputs[0].shape) if inputs else []
        # Three or fewer columns are rather the colours of a graph with channels last.
        if len(inputs) != 1 or len(shape) != 4 or (_fixed(shape[3]) or 224) <= 3:
            shapes = ", ".join(str(tuple(one.shape)) for one in inputs) or "nothing"
            raise ModelError(
                f"Expected '{path}' to take one batch of images (M,C,H,W), but it takes {shapes}."
            )
        if inputs[0].type not in _TYPES:
            raise ModelError(
                f"Expected '{path}' to take floating-point images, but it takes {inputs[0].type}; "
                "export the network without its preprocessing or quantised input."
            )
        self._input, self._dtype = inputs[0].name, _TYPES[inputs[0].type]
        self.batch_size, self.channels = _fixed(shape[0]), _fixed(shape[1]) or 3
        sides = (_fixed(shape[2]), _fixed(shape[3]))
        self.size = (sides[0], sides[1]) if sides[0] and sides[1] else None
        self._path = path

    def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the graph returns for images ``(M,3,H,W)``, on their device.

        Raises:
            ModelError: If the graph does not take images of this size.
        """
        array = images.detach().to("cpu", self._dtype).contiguous().numpy()
        try:
            outputs = self._session.run(None, {self._input: array})
        except Exception as error:  # onnxruntime has a dozen classes of its own
            fixed = f", its size is {self.size[0]}x{self.size[1]}" if self.size else ""
            raise ModelError(
                f"'{self._path}' does not take images of shape {tuple(images.shape)}{fixed} "
                f"({first_line(error)})."
            ) from error
        tensors = tuple(torch.from_numpy(one).to(images.device) for one in outputs)
        return tensors[0] if len(tensors) == 1 else tensors


def load_blackbox(
    path: Path,
    *,
    kind: str,
    distance: str = "euclidean",
    trust: bool = False,
    output: Output = None,
    batch_size: int | None = None,
) -> BlackBox:
    """Loads a program whose layers cannot be tapped.

    Args:
        path: The file.
        kind: ``torchscript`` or ``onnx``, as returned by ``kind_of``.
        distance: As for ``as_similarity_model``.
        trust: Run a TorchScript program, which may do to files what the user may.
        output: Which of several outputs is the embedding.
        batch_size: The only number of images one call takes; an ONNX graph may tell.

    Raises:
        ModelError: If the file is damaged or not trusted, or onnxruntime is missing.
    """
    note = (
        f"'{path}' does not say how pictures are prepared; the values usual for ImageNet are used."
    )
    prepare = replace(IMAGENET, notes=(note,))
    program: Callable[[Tensor], Any]
    if kind == "onnx":
        program = OnnxProgram(path)
        batch_size = program.batch_size or batch_size
        prepare = replace(prepare, size=program.size or prepare.size).for_channels(program.channels)
    elif kind == "torchscript":
        program = _scripted(path, trust)
    else:
        raise ModelError(f"Expected a kind of torchscript or onnx, got '{kind}'.")
    return BlackBox(
        program,
        output=output,
        preprocess=prepare,
        distance=distance,
        name=path.stem,
        batch_size=batch_size,
        differentiable=kind == "torchscript",
    )


def _scripted(path: Path, trust: bool) -> nn.Module:
    if not trust:
        raise ModelError(
            f"'{path}' is a TorchScript program, which runs while it is loaded and can write "
            "files; export the network with torch.export (.pt2), or pass --trust-pickle "
            "(trust_pickle=True) if you trust where the file comes from."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # we are aware that TorchScript is deprecated
            file = io.BytesIO(path.read_bytes())
            program: nn.Module = torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        raise ModelError(
            f"'{path}' cannot be loaded as TorchScript ({first_line(error)}); save it again."
        ) from error
    return program.eval()


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            f"'{path}' is an ONNX graph, which needs onnxruntime: pip install 'simexplain[onnx]'."
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors come as exceptions; warnings would go to the terminal
    try:
        # By its path: weights may lie in a file beside it.
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen classes of its own
        raise ModelError(
            f"'{path}' cannot be loaded as an ONNX graph ({first_line(error)}); export it again."
        ) from error


def _fixed(side: Any) -> int | None:
    """A dimension of a graph's input if it is a number; open ones have a name or nothing."""
    return side if isinstance(side, int) and side > 0 else None
