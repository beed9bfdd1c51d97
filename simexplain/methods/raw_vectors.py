"""The vectors that a network compares, before they are brought to unit length by it or by us."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from simexplain.methods.held_norms import Holding, Norm, find_norms, freed_norms, holding
from simexplain.methods.short_tails import ShortTail, short_tail
from simexplain.models.base import SimilarityModel
from simexplain.networks import preserve_state, unit_rows
from simexplain.tapes import Tape
from simexplain.tracing import Trace, rerun, trace

_AT_ONCE = 32
_SAME = 1e-4
"""Relative difference below which a tail that was run again gave what it gave before."""


@dataclass(frozen=True)
class RawVectors:
    """What ``trace`` needs of a model, with ``model.vectors`` in the place of its unit rows."""

    model: SimilarityModel

    @property
    def network(self) -> nn.Module:
        """The user's own module."""
        return self.model.network

    @property
    def batch_size(self) -> int | None:
        """The only batch of one forward pass, or None."""
        return self.model.batch_size

    def pass_size(self, count: int, limit: int | None = None, *, together: bool = False) -> int:
        """Images in one forward pass over ``count`` of them."""
        return self.model.pass_size(count, limit, together=together)

    def embed(self, images: Tensor) -> Tensor:
        """Vectors ``(M,E)`` that are not normalised."""
        return self.model.vectors(images)

    def to_grid(self, layer: str, output: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The output of a layer as a feature map ``(M,C,h,w)``."""
        return self.model.to_grid(layer, output, image_size)


@dataclass(frozen=True)
class VectorTrace:
    """One forward pass up to the vectors ``v`` that are explained, opened at some layers.

    Many networks normalise inside: ``v = u / |u|``, a layer norm, parts that are normalised one by
    one. Then ``v`` does not change when what was normalised grows, its gradient is orthogonal to
    it, and positions cancel however much they matter. So every normalisation above the layers is
    held: its divisor is a constant, namely the one that this image has, just as the length of ``v``
    is held where a cosine is explained. The vectors, and so all scores, are what they were; as
    functions of the layers they are linear wherever the network without its normalisations is.

    Where a divisor is a factor of the whole vector (``F.normalize(net(x))``, also with a linear
    layer without bias behind it), it is left out altogether: ``v`` then is the vector before the
    normalisation, of the same direction, and all results are those of the network without it.

    Attributes:
        trace: The pass. ``embeddings`` are the vectors ``(M,E)``, with normalisations held.
        model: What was run.
        images: ``(M,3,H,W)``.
        size: Images of each chunk; the last one is filled up where the model takes no other
            number.
        recorded: The pass as the network made it, with no normalisation held.
        norms: How many normalisations are held or left out.
    """

    trace: Trace
    model: RawVectors
    images: Tensor
    size: int
    recorded: Trace
    norms: int = 0
    _tails: tuple[Tail, ...] = field(default=(), repr=False)

    @property
    def vectors(self) -> Tensor:
        """``(M,E)``, without a graph."""
        return self.trace.embeddings.detach()

    @property
    def units(self) -> Trace:
        """The pass as the network made it, with unit rows in the place of its vectors."""
        with torch.enable_grad():
            rows = unit_rows(self.recorded.embeddings)
        return replace(self.recorded, embeddings=rows)

    def rerun(self, layer: str, chunk: int, output: Tensor, *, last: bool = False) -> Tensor:
        """The vectors ``(n,E)`` of a chunk when a layer gives another output, differentiable in it.

        Only what follows the layer is run, where that was recorded; what does not depend on it, and
        the divisors that are held, are as they were.

        Args:
            layer: A traced layer.
            chunk: Which of its outputs.
            output: What it shall give, shaped as what it gave.
            last: Hold only normalisations that nothing but affine functions follow. Others then
                act, as the network does, on what they get.
        """
        if self._tails and layer in self._tails[chunk].sources:
            with preserve_state(self.model.network):
                return self._tails[chunk].run(layer, output, last=last)
        return rerun(self.model, self._chunk(chunk, len(output)), layer, output)

    def short(self, layer: str, chunk: int) -> ShortTail | None:
        """What follows a layer for the few tokens that vectors read, if that is enough."""
        if not self._tails or layer not in self._tails[chunk].sources:
            return None
        tail = self._tails[chunk]
        axes = self._axes(layer, tail.sources[layer])
        if axes is None:
            return None
        with preserve_state(self.model.network):
            return short_tail(tail.tape, tail.sources[layer], axes, tail.norms, tail.freed)

    def _axes(self, layer: str, source: Tensor) -> tuple[int, int] | None:
        """The axes of images and of channels in the output of a layer."""
        found: list[int] = []
        for along in (0, 1):
            for axis, size in enumerate(source.shape):
                marks = torch.arange(size, device=source.device, dtype=torch.float32)
                spread = marks.view(-1, *[1] * (source.dim() - axis - 1)).expand(source.shape)
                grid = self.trace.to_grid(layer, spread).movedim(along, 0)
                alone = grid[:, :1, :1, :1].expand_as(grid)
                if len(grid) == size and axis not in found and torch.equal(grid, alone):
                    found.append(axis)
                    break
        return (found[0], found[1]) if len(found) > 1 else None

    def _chunk(self, chunk: int, count: int) -> Tensor:
        images = self.images[chunk * self.size : (chunk + 1) * self.size]
        filling = images[-1:].expand(count - len(images), *images.shape[1:])
        return torch.cat((images, filling))


@dataclass(frozen=True)
class Tail:
    """What a network does above some layers, for one chunk of images.

    Attributes:
        tape: All that it does.
        sources: What the layers gave, as it was recorded.
        norms: The normalisations in it that are held.
        freed: Numbers of the calls among them that are left out.
        hold: Which of its calls are therefore run in another way.
    """

    tape: Tape
    sources: Mapping[str, Tensor]
    norms: tuple[Norm, ...]
    freed: tuple[int, ...]
    hold: Holding

    def run(self, layer: str, output: Tensor, *, last: bool) -> Tensor:
        """The vectors ``(n,E)`` when a layer gives another output."""
        held = self.hold.last if last else self.hold.every
        return self._result(self.tape.replay({id(self.sources[layer]): output.clone()}, held))

    def again(self) -> tuple[dict[str, Tensor], Tensor]:
        """All layers and the vectors once more, normalisations held, in a graph of their own."""
        leaves = {
            id(source): source.detach().requires_grad_()
            for source in self.sources.values()
            if self.tape.is_source(source)
        }
        replayed = self.tape.replay(leaves, self.hold.every)
        return {name: replayed[id(source)] for name, source in self.sources.items()}, self._result(
            replayed
        )

    def _result(self, replayed: Mapping[int, Tensor]) -> Tensor:
        assert self.tape.result is not None
        return replayed.get(id(self.tape.result), self.tape.result)


def trace_vectors(
    model: SimilarityModel,
    images: Tensor,
    layers: Sequence[str],
    *,
    max_batch: int | None = None,
    middle: bool = True,
    by_rows: bool = False,
) -> VectorTrace:
    """Runs a model once up to the vectors that are explained, and opens it at some layers.

    Args:
        model: The model.
        images: Preprocessed images ``(M,3,H,W)``.
        layers: Names of layers.
        max_batch: Bounds the images in one forward pass; results do not depend on it.
        middle: Hold normalisations that cannot be left out; else they act as they do.
        by_rows: As for :func:`~simexplain.tracing.trace`.

    Raises:
        ModelError: If a layer cannot be used.
    """
    raw = RawVectors(model)
    size = model.pass_size(len(images), min(max_batch or _AT_ONCE, _AT_ONCE))
    traced = trace(raw, images, layers, max_batch=size, taped=True, by_rows=by_rows)
    plain = VectorTrace(traced, raw, images, size, recorded=traced)
    if not layers or not all(
        tape.replays(traced.outputs[layer][chunk])
        for chunk, tape in enumerate(traced.tapes)
        for layer in layers
    ):
        return plain
    norms = _common(traced)
    with preserve_state(model.network):
        return _held(plain, norms, middle=middle)


def _common(traced: Trace) -> list[tuple[Norm, ...]]:
    """The normalisations of each chunk; none where chunks differ in them."""
    listed = [find_norms(tape, n) for tape, n in zip(traced.tapes, traced.counts, strict=True)]
    calls = [[norm.call for norm in norms] for norms in listed]
    return listed if all(one == calls[0] for one in calls) else [() for _ in listed]


def _held(plain: VectorTrace, norms: Sequence[tuple[Norm, ...]], *, middle: bool) -> VectorTrace:
    """The pass with normalisations held or left out, if it comes out as it did."""
    traced = plain.trace
    results = [tape.result for tape in traced.tapes if tape.result is not None]
    with torch.no_grad():
        # One answer for all images, so that it does not depend on how they were batched.
        freed = set.intersection(
            *(
                set(freed_norms(tape, own_norms, rows.detach()))
                for tape, own_norms, rows in zip(traced.tapes, norms, results, strict=True)
            )
        )
    if not middle:
        norms = [tuple(norm for norm in own_norms if norm.call in freed) for own_norms in norms]
    tails = tuple(
        Tail(
            tape,
            {layer: traced.outputs[layer][chunk] for layer in traced.outputs},
            own_norms,
            tuple(sorted(freed)),
            holding(tape, own_norms, sorted(freed)),
        )
        for chunk, (tape, own_norms) in enumerate(zip(traced.tapes, norms, strict=True))
    )
    if not norms[0]:
        return replace(plain, _tails=tails)
    again = [tail.again() for tail in tails]
    rows = [row for _, row in again]
    if not all(
        row.requires_grad and _alike(row.detach(), old.detach(), freed=bool(freed))
        for row, old in zip(rows, results, strict=True)
    ):
        return plain
    outputs = {layer: tuple(own_norms[layer] for own_norms, _ in again) for layer in traced.outputs}
    with torch.enable_grad():
        embeddings = torch.cat(rows)[: len(plain.images)]
    held = replace(traced, embeddings=embeddings, outputs=outputs)
    return replace(plain, trace=held, norms=len(norms[0]), _tails=tails)


def _alike(rows: Tensor, old: Tensor, *, freed: bool) -> bool:
    """Whether vectors ``(n,E)`` that were made again are what they were, but for their length."""
    rows, old = rows.double(), old.double()
    if freed:
        factor = (rows * old).sum(dim=1, keepdim=True) / old.square().sum(dim=1, keepdim=True)
        old = old * factor.nan_to_num(1.0)
    return bool(((rows - old).norm(dim=1) <= _SAME * old.norm(dim=1)).all())
