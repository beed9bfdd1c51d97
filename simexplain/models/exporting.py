"""Any module as an exported program, which brings its own network along."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError, first_line
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import Embedder, picked
from simexplain.models.exported import runs_autocast
from simexplain.models.pairs import PairModel
from simexplain.models.vetting import refused_part
from simexplain.networks import at_least_single, preserve_state

_TOLERANCE = 1e-4


def exported_bytes(model: Embedder) -> bytes:
    """The content of a ``.pt2`` file whose program gives the model's vectors ``(M,E)``.

    The number of images stays open where the network allows it. Layers keep their names.

    Args:
        model: Any model of PyTorch modules; a copy of its network is exported.

    Raises:
        ModelError: If it cannot be exported, or its program gives other vectors; the error has the
            reason.
    """
    with _said(model.module):
        twin = _twin(model)
        return _exported(twin, (_examples(model, model.batch_size or 2),))


def exported_pair_bytes(pair: PairModel) -> bytes:
    """The content of a ``.pt2`` file whose program gives the scores of two batches of images.

    Args:
        pair: Made from a module whose ``forward`` takes two images.

    Raises:
        ModelError: As for :func:`exported_bytes`.
    """
    assert pair.joint is not None
    with _said(pair.joint):
        twin = copy.deepcopy(pair.joint)
        return _exported(twin, (_examples(pair.first, 2), _examples(pair.second, 2)))


@contextmanager
def _said(module: nn.Module) -> Iterator[None]:
    """Turns whatever torch.export raises into a sentence."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # torch.export raises many kinds of errors
        raise ModelError(
            f"{type(module).__name__} cannot be written as an exported program ({_reason(error)}); "
            "say backbone= if timm or torchvision builds it, rewrite that part without control "
            "flow on values, or keep the module in Python and use as_similarity_model."
        ) from error


def _exported(twin: nn.Module, examples: tuple[Tensor, ...]) -> bytes:
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in examples)
    with _quiet(), torch.no_grad(), preserve_state(twin):
        program = torch.export.export(twin, examples, dynamic_shapes=shapes)
        if runs_autocast(program):
            raise ModelError(
                f"{type(twin).__name__} enters torch.autocast in its forward, and a program keeps "
                "no layers of what runs there; save it without autocast, or keep the module in "
                "Python and use as_similarity_model."
            )
        wanted, got = twin(*examples), program.module()(*examples)
    content = io.BytesIO()
    with _quiet():
        torch.export.save(program, content)
    if not torch.allclose(wanted, got, atol=_TOLERANCE * float(wanted.abs().max()), rtol=0):
        raise ModelError(
            f"The exported program of {type(twin).__name__} gives other results than the module, "
            "which may draw random numbers or change itself; keep it in Python and use "
            "as_similarity_model."
        )
    refused = refused_part(content.getvalue())
    if refused is not None:
        raise ModelError(
            f"The exported program of {type(twin).__name__} holds {refused}, which load_model does "
            "not take without trust; write that part with operators of torch, or keep the module "
            "in Python and use as_similarity_model."
        )
    return content.getvalue()


def _twin(model: Embedder) -> nn.Module:
    """A copy of the network that returns the vectors alone, with the same names inside."""
    reader = copy.deepcopy(model)
    network, readout = reader.module, reader.readout
    whole = network.forward

    def forward(images: Tensor) -> Tensor:
        result = whole(images) if readout is None else readout(network, images)
        vectors = picked(result, reader.output if readout is None else None)
        return at_least_single(vectors.flatten(1) if vectors.dim() > 2 else vectors)

    network.forward = forward
    return network


def _examples(model: SimilarityModel, count: int) -> Tensor:
    """So many different images, at least two since a single one would fix the number."""
    image = model.example()
    shades = torch.linspace(1.0, 0.5, count, device=image.device, dtype=image.dtype)
    return image * shades.view(-1, 1, 1, 1)


def _reason(error: Exception) -> str:
    """The first sentence of an error, short enough for one line."""
    line = first_line(error).strip().rstrip(".:")
    return line if len(line) <= 160 else f"{line[:157]}..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the reports of torch.export away from the terminal; errors come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # It prints the graph that it could not finish.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
