"""What an index keeps of each picture: its embedding, and what every position adds to it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simexplain.data.folders import Batches, Record, pictures_in
from simexplain.data.images import read_picture
from simexplain.errors import ImageError, ModelError
from simexplain.methods.decomposition import EXACT, PositionParts, position_parts
from simexplain.methods.raw_vectors import trace_vectors
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_runs import features_and_rows
from simexplain.models.base import SimilarityModel
from simexplain.models.moving import WHOLE, Region
from simexplain.networks import at_least_single, lengths_of, preserve_state, unit_rows
from simexplain.tracing import chunks_of, trace

DIGEST = 16


@dataclass(frozen=True)
class Stat:
    """Size and time of change of a picture's file.

    Attributes:
        changed: When it was last changed, in nanoseconds; -1 for a missing file.
        size: In bytes.
    """

    changed: int
    size: int

    @classmethod
    def of(cls, path: str | Path) -> Stat:
        """Stats a file."""
        try:
            stat = Path(path).stat()
        except OSError:
            return cls(-1, -1)
        return cls(stat.st_mtime_ns, stat.st_size)


def digest_of(path: str | Path) -> bytes:
    """A digest of the content of a file, 16 bytes."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.digest()


class Pictures(Batches):
    """Batches of pictures that note the size and the digest of every picture on the way.

    Attributes:
        sizes: ``(height, width)`` of each picture read, by its place in the records.
        digests: 16 bytes each.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes: dict[int, tuple[int, int]] = {}
        self.digests: dict[int, bytes] = {}

    def _read(self, index: int) -> tuple[int, Tensor] | None:
        path = self.records[index].path
        try:
            tensor, geometry = self.preprocess(read_picture(path).pixels)
            self.digests[index] = digest_of(path)
        except ImageError as error:
            self.broken[path] = str(error)
            return None
        except OSError as error:
            self.broken[path] = f"'{path}' cannot be read ({error.strerror or error})."
            return None
        self.sizes[index] = geometry.original
        return index, tensor

    def facts(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Columns ``sizes`` and ``digests`` of pictures that were read."""
        return {
            "sizes": torch.tensor([self.sizes[n] for n in indices], dtype=torch.int32),
            "digests": torch.tensor([list(self.digests[n]) for n in indices], dtype=torch.uint8),
        }


def pictures_of(source: str | Path | Sequence[Record | str | Path]) -> tuple[list[str], str]:
    """The absolute paths of a gallery, each once, and the folder that they are all in."""
    if isinstance(source, (str, Path)):
        records: Sequence[Record | str | Path] = pictures_in(source, labelled=False)
        root = absolute([source])[0]
    else:
        records, root = source, ""
    paths = absolute([record.path if isinstance(record, Record) else record for record in records])
    if not paths:
        raise ImageError("Expected at least one picture to index, got none.")
    if not root:
        folders = [str(Path(path).parent) for path in paths]
        try:
            root = os.path.commonpath(folders)
        except ValueError:  # on different drives
            root = folders[0]
    return paths, root


def absolute(paths: Sequence[str | Path]) -> list[str]:
    """Absolute paths, each once; links stay links."""
    return list(dict.fromkeys(os.path.normpath(Path(path).absolute()) for path in paths))


_AT_ONCE = 64


@dataclass(frozen=True)
class UniformTail:
    """The part of a model above a layer, if that is ``v = W mean(A) + b`` (average pooling).

    Parts then are ``W A_p / (h w)`` for any image: no backward pass, and no second forward pass to
    see what is left without the layer. For a convolutional network that is a third of the time
    that ``position_parts`` takes. Whether it is so is not taken on trust: parts and rest of every
    image must add up to its vector.

    Attributes:
        layer: The layer.
        weight: ``W / (h w)``, ``(E,C)``.
        rest: ``b``, ``(E,)``.
    """

    layer: str
    weight: Tensor
    rest: Tensor

    def parts(self, model: SimilarityModel, images: Tensor) -> PositionParts | None:
        """The parts of preprocessed images ``(M,3,H,W)``; None where they do not add up."""
        traced = trace_vectors(model, images, (self.layer,)).trace
        vectors = at_least_single(traced.embeddings.detach())
        grid = at_least_single(traced.maps[self.layer].detach())
        split = PositionParts(
            parts=torch.einsum("ec,mchw->mehw", self.weight.to(grid), grid),
            rest=self.rest.to(vectors).expand_as(vectors),
            vectors=vectors,
            lengths=lengths_of(vectors),
            steps=0,
        )
        return split if bool((split.residual <= EXACT).all()) else None


def uniform_tail(
    model: SimilarityModel, layer: str, image: Tensor, rest: Tensor
) -> UniformTail | None:
    """The matrix of such a tail, by its Jacobian on one image ``(1,3,H,W)``; None for any other."""
    if model.batch_size is not None:
        return None  # which may be written out in the network above the layer
    traced = trace_vectors(model, image, (layer,)).trace
    output = traced.outputs[layer][0]
    count, rows = traced.embeddings.shape[1], []
    for start in range(0, count, _AT_ONCE):
        planes = torch.eye(count, device=output.device, dtype=traced.embeddings.dtype)
        planes = planes[start : start + _AT_ONCE].unsqueeze(1)
        try:
            (gradient,) = torch.autograd.grad(
                traced.embeddings, output, planes, retain_graph=True, is_grads_batched=True
            )
        except RuntimeError:  # an operator that takes one gradient at a time
            return None
        grid = at_least_single(traced.to_grid(layer, gradient.flatten(0, 1)))
        mean = grid.mean(dim=(2, 3))
        if bool((grid - mean[:, :, None, None]).abs().amax() > EXACT * grid.abs().amax()):
            return None
        rows.append(mean)
    return UniformTail(layer, torch.cat(rows), rest.detach())


PARTS, LEVELS, NOTHING = "parts", "levels", "nothing"
"""What is kept beside the embeddings: parts of the vectors, maps of AVSL's levels, or nothing."""

_TOP = 14
"""The largest number of an image is stored between 2^14 and 2^15; float16 ends at 2^16."""


@dataclass(frozen=True)
class IndexSpec:
    """How pictures become rows of an index.

    Attributes:
        kind: ``parts``, ``levels`` or ``nothing``.
        layer: The layer of the parts; empty for other kinds.
        steps: Jacobians averaged for each image where the tail above the layer is not linear.
        normalised: Whether embeddings are the vectors at unit length.
        reason: Why nothing is kept, for the user to read.
        held: Share of the squared length of all parts of a sample that lies in the basis.
        region: Where in the network's view the positions of the layer lie: top, left, bottom and
            right as shares.
        bypass: The share of the embedding that bypasses the layer; None where that is not known.
        basis: Orthonormal columns ``(E,D)`` on which parts are projected; None to keep them whole.
        tail: The network above the layer, where that is a matrix; it only saves time.
    """

    kind: str
    layer: str = ""
    steps: int = 16
    normalised: bool = True
    reason: str = ""
    held: float = 1.0
    region: Region = WHOLE
    bypass: float | None = None
    basis: Tensor | None = field(default=None, repr=False)
    tail: UniformTail | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """All but tensors, as plain JSON."""
        return {k: value for k, value in vars(self).items() if k not in ("basis", "tail")}

    @classmethod
    def of_json(cls, metadata: Mapping[str, Any], basis: Tensor | None) -> IndexSpec:
        """The counterpart of :meth:`to_json`; older indexes say less."""
        return cls(**{**metadata, "region": tuple(metadata.get("region", WHOLE))}, basis=basis)

    def __call__(self, model: SimilarityModel, images: Tensor) -> dict[str, Tensor]:
        """Columns of an index for preprocessed images ``(M,3,H,W)``, on the CPU."""
        if self.kind == LEVELS:
            assert isinstance(model, AVSL)
            features, rows = features_and_rows(model, images, len(images))
            halves = [_halved(grid.detach()) for grid in features]
            levels = {f"level_{number}": half for number, (half, _) in enumerate(halves)}
            levels["level_scales"] = torch.stack([scale for _, scale in halves], dim=1)
            return {"embeddings": _plain(rows), **levels}
        if self.kind == NOTHING:
            return {"embeddings": _plain(trace(model, images, ()).embeddings)}
        return self._of_parts(self.parts(model, images))

    def parts(self, model: SimilarityModel, images: Tensor) -> PositionParts:
        """What every position adds to the vectors of images ``(M,3,H,W)``; see the function."""
        image_parts = None if self.tail is None else self.tail.parts(model, images)
        if image_parts is not None:
            return image_parts
        return position_parts(model, images, self.layer, steps=self.steps, max_batch=len(images))

    def _of_parts(self, position_parts: PositionParts) -> dict[str, Tensor]:
        vectors, parts = position_parts.vectors, position_parts.parts.detach()
        if self.basis is not None:
            parts = torch.einsum("ed,mehw->mdhw", self.basis.to(parts), parts)
        both = torch.cat((parts.flatten(1), position_parts.rest.detach()), dim=1)
        half, scales = _halved(both)
        wide = parts[0].numel()
        rows = unit_rows(vectors) if self.normalised else vectors
        lengths = (
            position_parts.lengths if self.normalised else torch.ones_like(position_parts.lengths)
        )
        return {
            "embeddings": _plain(rows),
            "parts": half[:, :wide].reshape(parts.shape),
            "rest": half[:, wide:],
            "scales": scales,
            "lengths": _plain(lengths),
            "residuals": _plain(position_parts.residual),
        }


def keeping_for(
    model: SimilarityModel,
    layer: str | None = None,
    *,
    steps: int = 0,
    basis: bool = True,
) -> IndexSpec:
    """Finds out, on one image of noise, what can be kept for a model.

    A tail above the layer that is not linear has its parts kept only with ``steps`` Jacobians to
    average. A layer that was named and cannot be used raises a ModelError.
    """
    if isinstance(model, AVSL):
        if layer is not None:
            raise ModelError(
                "Expected no layer for an AVSL model, whose index keeps the maps of its levels "
                f"({', '.join(model.levels)}), got '{layer}'; leave it away."
            )
        none = IndexSpec(NOTHING, reason="it was made without a basis.")
        return IndexSpec(LEVELS) if basis else none
    if not basis:
        return IndexSpec(NOTHING, reason="it was made without a basis (--no-basis).")
    try:
        chosen = layer or model.default_layer
        image = model.example()
        parts = position_parts(model, image, chosen, steps=1)
    except ModelError as error:
        if layer is not None:
            raise
        return IndexSpec(NOTHING, reason=str(error))
    if parts.steps and not steps:
        return IndexSpec(
            NOTHING,
            reason=(
                f"The network above layer '{chosen}' is not linear, so its embedding is not a sum"
                " over positions; simexplain index --jacobians 16 (jacobians=16) keeps an"
                " approximate one."
            ),
        )
    normalised = _normalised(model, image, parts.vectors)
    if normalised is None:
        why = "The model's embeddings are neither its vectors nor those at unit length."
        return IndexSpec(NOTHING, reason=why)
    return surveyed_keeping(IndexSpec(PARTS, chosen, steps or 16, normalised), model)


def surveyed_keeping(keeping: IndexSpec, model: SimilarityModel) -> IndexSpec:
    """The same with where its layer looks, and what share of the embedding bypasses it."""
    layers, image = (keeping.layer,), model.example()
    return replace(
        keeping,
        region=model.region(layers, image),
        bypass=model.usual_bypass(keeping.layer),
    )


def with_tail(keeping: IndexSpec, model: SimilarityModel) -> IndexSpec:
    """The same made quick, where the network above the layer is a matrix."""
    if keeping.kind != PARTS:
        return keeping
    image = model.example()
    parts = position_parts(model, image, keeping.layer, steps=1)
    if parts.steps:
        return keeping
    return replace(keeping, tail=uniform_tail(model, keeping.layer, image, parts.rest[0]))


def _normalised(model: SimilarityModel, image: Tensor, vectors: Tensor) -> bool | None:
    """Whether rows are vectors at unit length (True), the vectors (False) or neither (None)."""
    row = trace(model, image, ()).embeddings.detach()
    for answer, like in ((True, unit_rows(vectors)), (False, vectors)):
        if row.shape == like.shape and bool((row - like).norm() <= EXACT * row.norm()):
            return answer
    return None


def common_basis(
    keeping: IndexSpec, model: SimilarityModel, images: Iterable[Tensor], width: int
) -> IndexSpec:
    """The same with the basis of ``width`` columns that holds most of what these images' parts are.

    The principal axes of all positions' vectors, not centred: the squared length lost is least.
    At the width of the embedding or more everything is kept, exactly. ``images`` are batches
    ``(M,3,H,W)`` of a sample of the gallery.
    """
    total: Tensor | None = None
    for batch in images:
        parts = keeping.parts(model, batch).parts.detach().cpu().double()
        if width >= parts.shape[1]:
            return keeping
        rows = parts.transpose(0, 1).flatten(1)
        total = rows @ rows.T if total is None else total + rows @ rows.T
    if total is None:
        return keeping  # no picture can be read, which is reported later
    values, axes = torch.linalg.eigh(total)
    # The sign of an axis is arbitrary; this makes it a matter of the numbers alone.
    axes = axes.flip(1)[:, :width]
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    held = float(values.flip(0)[:width].sum() / values.sum().clamp_min(1e-300))
    return replace(keeping, basis=(axes * signs).float().contiguous(), held=held)


def run_rows(
    keeping: IndexSpec, model: SimilarityModel, images: Tensor, batch_size: int
) -> dict[str, Tensor]:
    """Columns for a batch; the model is left as it was.

    Matrix products round an image differently depending on how many images they cover, so all
    groups are of one size (see ``pass_size``), and the last one is filled up.
    """
    size = model.pass_size(batch_size, batch_size)
    with preserve_state(model):
        groups = [keeping(model, chunk) for chunk in chunks_of(images, size, fixed=True)]
    return {name: torch.cat([g[name] for g in groups])[: len(images)] for name in groups[0]}


def _halved(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers ``(M,...)`` as float16 and a power of two to multiply each image's with ``(M,)``."""
    flat = at_least_single(tensor).flatten(1)
    _, exponents = torch.frexp(flat.abs().amax(dim=1).cpu())
    scales = torch.exp2((exponents - 1 - _TOP).clamp(-120, 120).float())
    half = flat / scales.to(flat).unsqueeze(1)
    return half.half().cpu().reshape(tensor.shape), scales


def doubled(half: Tensor, scales: Tensor) -> Tensor:
    """The counterpart: float16 ``(M,...)`` with scales ``(M,)`` as float32."""
    # In place: half becomes a new tensor here, and a second one of its size costs as much again.
    return half.to(torch.float32, copy=True).mul_(scales.view(-1, *[1] * (half.dim() - 1)))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()
