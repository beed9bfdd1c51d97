"""Methods for transformers: attention, alone and weighed by the gradient of the similarity.

All of them read the probabilities and gradients of one recorded pass
(:mod:`simexplain.attention_recording`). Rows of attention are queries, columns keys; the map of an
image is read from the columns of its patches, in the row of what the embedding is made from: the
class token, the mean over the patches or the probe of an attention pooling, which a gradient finds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain.arguments import typed
from simexplain.attention_recording import UNREACHED, Attention, AttentionTrace, record_attention
from simexplain.comparison import Comparison
from simexplain.errors import ComparisonError, ModelError, check_choice
from simexplain.methods.cams import SCORES
from simexplain.methods.method import (
    AttentionMaps,
    Method,
    Task,
    check_embeddings,
    margin_directions,
)
from simexplain.methods.raw_vectors import RawVectors
from simexplain.models.base import SimilarityModel
from simexplain.models.layers import to_grid
from simexplain.models.moving import WHOLE, Region
from simexplain.networks import at_least_single

_MOST_PREFIX_TOKENS = 16


def token_places(
    model: SimilarityModel, count: int, grids: Sequence[tuple[int, int]], images: Tensor
) -> tuple[Tensor | None, Region]:
    """The token of each cell ``(h,w)``, or None, and the part of the image where the cells lie.

    Taken from the survey of the network; where it has no layer of so many tokens, from their
    number.

    Args:
        model: The model.
        count: Number of tokens.
        grids: Rows and columns of the outputs of convolutions before the attention.
        images: ``(M,C,H,W)``.
    """
    layouts = model.token_layouts(count, images)
    if not layouts:
        pixels = (int(images.shape[-2]), int(images.shape[-1]))
        return token_cells(model, count, grids, pixels), WHOLE
    # Most layers with so many tokens are those of the blocks, not what comes before them.
    ways = Counter(
        (layout.grid, tuple(layout.places.tolist()), layout.region) for layout in layouts
    )
    (grid, order, region), _ = ways.most_common(1)[0]
    return torch.tensor(order).view(grid), region


def token_cells(
    model: SimilarityModel,
    count: int,
    grids: Sequence[tuple[int, int]],
    pixels: tuple[int, int],
) -> Tensor | None:
    """Which token lies where: indices ``(h,w)`` into ``count`` tokens, or None.

    The grid is that of the latest convolution that fits (it cut the image into patches); where no
    convolution ran, what the model makes of so many tokens.

    Args:
        model: Knows how tokens become a grid.
        count: Number of tokens, class and register tokens first.
        grids: Rows and columns of the outputs of convolutions before the attention.
        pixels: Height and width of the images.
    """
    for height, width in reversed(grids):
        prefix = count - height * width
        if 0 <= prefix <= _MOST_PREFIX_TOKENS and height * width > 1:
            return torch.arange(prefix, count).view(height, width)
    if grids:
        return None
    numbers = torch.arange(count, dtype=torch.float32).view(1, count, 1)
    cells = to_grid(numbers, pixels, model.hints)
    return None if cells is None else cells[0, 0].long()


ATTENTION = "attention"
"""The one "layer" of methods that read attention."""

_FOR_CNNS = "sam, focus, similarity_cam and decomposition work on any network"


@dataclass(frozen=True)
class _Block:
    """One call of attention over the tokens of every image.

    Attributes:
        call: What was recorded, an entry a chunk.
        sizes: Images a chunk, fillers included.
        cells: The key at each position of the grid ``(h,w)``; other keys are not patches.
        tokens: Queries and keys.
        region: Where in the image the grid lies.
    """

    call: tuple[Attention, ...]
    sizes: tuple[int, ...]
    cells: Tensor
    tokens: tuple[int, int]
    region: Region

    def joined(self, chunks: Sequence[Tensor]) -> Tensor:
        """Tensors of the chunks as one ``(M,H,T,n)``, in single precision or better."""
        parts = [
            at_least_single(chunk).reshape(size, -1, *chunk.shape[-2:])
            for chunk, size in zip(chunks, self.sizes, strict=True)
        ]
        return torch.cat(parts)

    @property
    def weights(self) -> Tensor:
        """Probabilities ``(M,H,Tq,Tk)``, detached."""
        return self.joined([part.weights.detach() for part in self.call])

    def widened(self, matrix: Tensor, before: _Block) -> Tensor:
        """A matrix of this call ``(M,Tq,Tk)`` with a column for each token of an earlier one.

        A pooling may leave class and register tokens out.
        """
        if self.tokens[1] == before.tokens[1]:
            return matrix
        wide = matrix.new_zeros(*matrix.shape[:2], before.tokens[1])
        wide[:, :, before.cells.flatten()] = matrix[:, :, self.cells.flatten()]
        return wide

    @property
    def square(self) -> bool:
        """Whether the tokens attend to each other."""
        return self.tokens[0] == self.tokens[1]


@dataclass(frozen=True)
class _Reading:
    """A recorded pass and what its attention means.

    Attributes:
        images: The comparison.
        trace: The pass.
        blocks: Its calls over tokens, in order; None stands for a call of another kind.
        rows: The share of each query of the last call in the embedding ``(M,Tq)``.
        probe: A fixed direction of each embedding ``(M,)``.
        model: What to call the model in errors.
    """

    images: Comparison
    trace: AttentionTrace
    blocks: tuple[_Block | None, ...]
    rows: Tensor
    probe: Tensor
    model: str

    def block(self, number: int) -> _Block:
        """One call, counted from the first (0) or the last (-1).

        Raises:
            ModelError: If the call does not exist or is not over tokens.
        """
        if not -len(self.blocks) <= number < len(self.blocks):
            raise ModelError(
                f"{self.model} attends {len(self.blocks)} times, so block is from "
                f"{-len(self.blocks)} to {len(self.blocks) - 1}, got {number}."
            )
        one_block = self.blocks[number]
        if one_block is None:
            raise _not_over_tokens(self.model, self.trace, number)
        return one_block

    def chain(self, end: int = -1) -> list[_Block]:
        """All calls up to one, of which each hands its tokens to the next.

        Raises:
            ModelError: If some are not over the same tokens.
        """
        below = [self.block(index) for index in range(range(len(self.blocks))[end] + 1)]
        *blocks, last = below
        first = below[0]
        # The last may be a pooling: probes that attend to all tokens, or to the patches alone.
        fits = last.tokens == first.tokens or (
            last.tokens[1] in (first.tokens[1], first.cells.numel())
            and last.cells.shape == first.cells.shape
            and not last.square
        )
        if self.trace.hidden:
            raise ModelError(
                f"{self.model} attends {self.trace.hidden} times in a way that could not be "
                "followed (its heads are mixed), so relevance cannot be carried through its "
                "blocks; use method attention or grad_eclip."
            )
        if not fits or any(one.tokens != first.tokens or not one.square for one in blocks):
            counts = dict.fromkeys(block.tokens for block in below)
            shapes = ", ".join(f"{queries}x{keys}" for queries, keys in counts)
            raise ModelError(
                f"The number of tokens changes between the blocks of {self.model} ({shapes}), so "
                "relevance cannot be carried through them; use method attention or grad_eclip."
            )
        if not all(self.trace.reached(self.probe, range(len(below)))):
            raise ModelError(UNREACHED)
        steps = range(len(below) - 1)
        if not all(self.trace.feeds(index, index + 1) for index in steps):
            raise ModelError(
                f"The attention blocks of {self.model} do not follow one upon the other, so "
                "relevance cannot be carried through them; use method attention or grad_eclip "
                "with block= for each way."
            )
        return below

    def warnings(self, number: int) -> tuple[str, ...]:
        """What to know about a map from one call alone."""
        index = range(len(self.blocks))[number]
        if index == 0 or self.trace.feeds(index - 1, index):
            return ()
        return (
            f"Attention {index} of {self.model} does not build on the one before it, so the "
            "network has parallel ways and this map shows one of them; block= chooses another.",
        )

    def rows_of(self, block: _Block) -> Tensor:
        """The share of each query ``(M,Tq)``: all alike where queries are not the last call's."""
        count = block.tokens[0]
        if count == self.rows.shape[1]:
            return self.rows
        return torch.full((len(self.rows), count), 1 / count).to(self.rows)

    def read(self, block: _Block, relevance: Tensor, cells: Tensor) -> Tensor:
        """Maps ``(M,h,w)`` from matrices ``(M,Tq,T)``, whose columns ``cells`` are patches."""
        columns = torch.einsum("mq,mqk->mk", self.rows_of(block), relevance)
        return columns[:, cells.to(columns.device)]

    def answer(
        self,
        maps: Tensor,
        block: _Block,
        directions: Tensor,
        scores: Tensor,
        warnings: tuple[str, ...] = (),
    ) -> AttentionMaps:
        """The result from maps on a block's grid, directions and scores of the images.

        Maps may be of fillers as well.
        """
        count = len(self.trace.embeddings)
        units = F.normalize(self.trace.embeddings.detach(), dim=1)
        stacked = self.images.restacked(maps[:count].to(units.device))
        return AttentionMaps(
            maps=stacked,
            layer_maps={ATTENTION: stacked},
            weights=directions,
            scores=self.images.restacked(scores),
            embeddings=self.images.restacked(units),
            warnings=warnings,
            region=block.region,
        ).detached()


def _read(task: Task, score: str) -> tuple[_Reading, Tensor, Tensor]:
    """The recorded pass of a comparison, with its directions ``(B,K,E)`` and scores ``(M,)``.

    Raises:
        ModelError: If the model has no attention over the tokens of an image.
    """
    model, images, _, max_batch = task
    source = model if score == "cosine" else RawVectors(model)
    flat = images.stacked().flatten(0, 1)
    trace = record_attention(source, flat, max_batch=max_batch)
    vectors = trace.embeddings.detach()
    units = images.restacked(F.normalize(vectors, dim=1))
    check_embeddings(units, images.roles)
    probe = _probe(trace)
    trace = _without_trailing(trace, probe)
    blocks = _blocks(model, trace, flat)
    last = blocks[-1]
    rows = vectors.new_zeros(len(vectors), 0) if last is None else _rows_read(trace, last, probe)
    reading = _Reading(images, trace, blocks, rows, probe, model.name)
    directions = margin_directions(
        images.like(images.restacked(vectors) if score == "dot" else units)
    )
    with torch.enable_grad():
        scores = (trace.embeddings * directions.flatten(0, 1)).sum(dim=1)
        if score == "held":
            scores = scores / vectors.norm(dim=1)
    return reading, directions, scores


def _blocks(
    model: SimilarityModel, trace: AttentionTrace, images: Tensor
) -> tuple[_Block | None, ...]:
    blocks = []
    for call in trace.calls:
        counts = {tuple(part.weights.shape[-2:]) for part in call}
        tokens = (int(call[0].weights.shape[-2]), int(call[0].weights.shape[-1]))
        cells, region = None, WHOLE
        if len(counts) == 1 and not _is_windowed(call, trace.sizes):
            cells, region = token_places(model, tokens[1], call[0].grids, images)
        blocks.append(None if cells is None else _Block(call, trace.sizes, cells, tokens, region))
    if not blocks:
        raise ModelError(
            f"{model.name} has no attention that could be recorded, so methods for transformers "
            f"have nothing to read; {_FOR_CNNS}."
        )
    if not any(blocks):
        raise _not_over_tokens(model.name, trace, -1)
    return tuple(blocks)


def _is_windowed(call: Sequence[Attention], sizes: Sequence[int]) -> bool:
    """Whether a row of the batch is not an image (or a head of one)."""
    for part, size in zip(call, sizes, strict=True):
        first, axes = len(part.weights), part.weights.dim()
        if axes not in (3, 4) or (axes == 4 and first != size) or first % size:
            return True
    return False


def _not_over_tokens(model: str, trace: AttentionTrace, number: int) -> ModelError:
    """Why a call gives no map; the calls of hierarchical networks are all within windows."""
    queries, keys = trace.calls[number][0].weights.shape[-2:]
    kind = f"attends from {queries} to {keys} tokens, which do not make up a grid over the image,"
    if any(_is_windowed(call, trace.sizes) for call in trace.calls):
        kind = "attends within windows"
    return ModelError(
        f"{model} {kind} and gives no attention map over the whole image; {_FOR_CNNS}."
    )


def _probe(trace: AttentionTrace) -> Tensor:
    """A fixed random direction of each embedding ``(M,)``, whatever it is compared with."""
    direction = torch.randn(trace.embeddings.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        return trace.embeddings @ direction.to(trace.embeddings)


def _without_trailing(trace: AttentionTrace, probe: Tensor) -> AttentionTrace:
    """The pass up to the last call on which the embedding depends; later ones serve other outputs.

    Where no gradient arrives anywhere all calls stay.
    """
    for number in reversed(range(len(trace.calls))):
        if all(trace.reached(probe, [number])):
            return replace(trace, calls=trace.calls[: number + 1])
    return trace


def _rows_read(trace: AttentionTrace, last: _Block, probe: Tensor) -> Tensor:
    """The share of each query of the last call in the embedding ``(M,Tq)``.

    A query that the embedding does not read has no gradient, whatever the comparison: a class token
    network has one that does, mean pooling has all patches. Where both are read, patches and other
    tokens share by the length of their gradients; within either all count alike.
    """
    (slopes,) = trace.gradients(probe, [[part.weights for part in last.call]])
    lengths = last.joined(slopes).square().sum(dim=(1, 3)).sqrt()
    lengths = lengths[: len(trace.embeddings)]
    patches = torch.zeros(last.tokens[0], dtype=torch.bool)
    if last.square:
        patches[last.cells.flatten()] = True
    rows = torch.zeros_like(lengths)
    for group in (patches, ~patches):
        inside = lengths * group.to(lengths)
        read = (inside > 0).to(lengths)
        rows += read * (inside.sum(1) / read.sum(1).clamp(min=1)).unsqueeze(1)
    total = rows.sum(dim=1, keepdim=True)
    if bool((total == 0).any()):
        raise ModelError(
            "The embedding does not depend on the network's last attention, so its maps would be "
            "empty; use a method that needs no attention."
        )
    return rows / total


def _joined_heads(weights: Tensor, heads: str) -> Tensor:
    """Probabilities ``(M,H,Tq,Tk)`` as one matrix ``(M,Tq,Tk)``."""
    if heads == "mean":
        return weights.mean(dim=1)
    if heads == "max":
        return weights.amax(dim=1)
    count = weights.shape[1]
    if int(heads) >= count:
        raise ModelError(f"The block has heads 0 to {count - 1}, got heads='{heads}'.")
    return weights[:, int(heads)]


class _OnAttention(Method):
    """What methods that read attention share: they have one layer, which is not named."""

    uses_layers: ClassVar[bool] = False

    def layers_for(self, model: SimilarityModel, images: Tensor) -> tuple[str, ...] | None:
        """Attention, whatever the network."""
        return (ATTENTION,)


@dataclass(frozen=True)
@typed
class RawAttention(_OnAttention):
    """The attention of what the embedding is made from, or attention rollout.

    With ``A`` the probabilities of a block, the map is the row of the class token (mean over the
    patches where the embedding is their mean, or over the probes of an attention pooling). With
    ``rollout`` it is that row of ``A^_L ... A^_1`` with ``A^ = (A + I) / 2``, its rows summing to
    one (Abnar and Zuidema 2020, arXiv 2005.00928). It does not depend on the images compared with:
    it shows where the network looks, not what makes two images alike.

    Attributes:
        block: Which call of attention, from the first (0) or the last (-1); with rollout the last
            one that is multiplied.
        heads: ``mean`` or ``max`` over the heads, or the number of one.
        rollout: Multiply all blocks up to ``block``.
    """

    block: int = -1
    heads: str = "mean"
    rollout: bool = False

    def __post_init__(self) -> None:
        if self.heads not in ("mean", "max") and not str(self.heads).isdigit():
            raise ComparisonError(
                f"Expected heads to be mean, max or the number of a head, got '{self.heads}'."
            )

    def attribute(self, task: Task) -> AttentionMaps:
        """The row of the embedding's own attention, on the grid of the patches."""
        reading, directions, scores = _read(task, "cosine")
        block = reading.block(self.block)
        matrix = _joined_heads(block.weights[: len(scores)], str(self.heads))
        first = block
        if self.rollout:
            chain = reading.chain(self.block)
            matrix, first = self._rolled(chain, len(scores)), chain[0]
        maps = reading.read(block, matrix, first.cells)
        warnings = () if self.rollout else reading.warnings(self.block)
        return reading.answer(maps, first, directions, scores.detach(), warnings)

    def _rolled(self, chain: Sequence[_Block], count: int) -> Tensor:
        """The product of all blocks ``(M,Tq,Tk)``, the last on the left."""
        rolled: Tensor | None = None
        for block in chain:
            mixed = _joined_heads(block.weights[:count], str(self.heads))
            mixed = block.widened(mixed, chain[0])
            if block.square:
                mixed = mixed + torch.eye(mixed.shape[-1]).to(mixed)
            mixed = mixed / mixed.sum(dim=-1, keepdim=True)
            rolled = mixed if rolled is None else mixed @ rolled
        assert rolled is not None  # a chain has at least its end
        return rolled


@dataclass(frozen=True)
@typed
class AttentionRelevance(_OnAttention):
    """Gradient-weighted attention relevance (Chefer, Gur and Wolf 2021, arXiv 2103.15679).

    ``R`` begins as the identity. Every block adds ``A- R`` with ``A- = mean over heads of
    max(0, ds/dA * A)`` (Eq. 5 and 6), where ``s`` is the score of the image: its similarity to the
    positives minus that to the negatives, all others held. An attention pooling at the end is cross
    attention, ``A- (I + (R - I) / row sums)`` (Eq. 8 to 10). The map is the row of the class token
    (mean over the patches, or over the probes); of patches the identity is left out, since it only
    maps each patch to itself.

    Attributes:
        score: ``cosine``, ``dot`` or ``held``, see ``SCORES``.
        first_block: Where ``R`` begins, counted from the first (0) or the last (-1): the paper's
            own account of CLIP begins at the last.
    """

    score: str = "cosine"
    first_block: int = 0

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)

    def attribute(self, task: Task) -> AttentionMaps:
        """The row of the relevance, on the grid of the patches."""
        reading, directions, scores = _read(task, self.score)
        reading.block(self.first_block)
        blocks = reading.chain()
        start = range(len(blocks))[self.first_block]
        blocks = blocks[start:]
        slopes = reading.trace.gradients(
            scores, [[part.weights for part in block.call] for block in blocks]
        )
        gained: Tensor | None = None  # R - I
        for block, slope in zip(blocks, slopes, strict=True):
            step = (block.joined(slope) * block.weights).relu().mean(dim=1)[: len(scores)]
            step = block.widened(step, blocks[0])
            if gained is None:
                gained = step
            elif block.square:
                gained = gained + step + step @ gained
            else:
                sums = gained.sum(dim=-1, keepdim=True)
                shares = gained / torch.where(sums > 0, sums, torch.ones_like(sums))
                gained = step + step @ shares
        assert gained is not None  # a chain has at least its end
        maps = reading.read(blocks[-1], gained, blocks[0].cells)
        return reading.answer(maps, blocks[0], directions, scores.detach())


@dataclass(frozen=True)
@typed
class GradECLIP(_OnAttention):
    """Grad-ECLIP (Zhao et al. 2024, ICML; arXiv 2502.18816), on any transformer.

    At one block the class token's attention gives ``o = sum_i a_i v_i`` (all heads in a row, before
    their projection). Patch ``i`` gets ``max(0, sum_c w_c l_i v_ic)`` with ``w = ds/do``, the
    gradient of the score, and ``l_i`` the cosine of the class token's query and the patch's key,
    scaled over the patches to the range from 0 to 1: attention itself is too sparse to show a
    whole object. Where the embedding is made from several queries, such as the mean of the patches,
    the sum runs over these as well.

    Attributes:
        score: ``cosine``, ``dot`` or ``held``, see ``SCORES``.
        block: Which call of attention, from the first (0) or the last (-1).
        keep_negative: Leave out the final ReLU.
    """

    score: str = "cosine"
    block: int = -1
    keep_negative: bool = False

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)

    def attribute(self, task: Task) -> AttentionMaps:
        """What each patch's value adds to the score, on the grid of the patches."""
        reading, directions, scores = _read(task, self.score)
        block = reading.block(self.block)
        queries, keys, values = (
            _known(block, name, task.model.name) for name in ("queries", "keys", "values")
        )
        outputs = [part.output for part in block.call if part.output is not None]
        (slopes,) = reading.trace.gradients(scores, [outputs])
        pull = torch.einsum("mhqd,mhkd->mqk", block.joined(slopes), values)
        # With the heads side by side, (M,T,H*d).
        queries, keys = (heads.transpose(1, 2).flatten(2) for heads in (queries, keys))
        near = F.normalize(queries, dim=2) @ F.normalize(keys, dim=2).mT
        patches = block.cells.flatten().to(near.device)
        pull, near = pull[:, :, patches], near[:, :, patches]
        low, high = near.amin(dim=2, keepdim=True), near.amax(dim=2, keepdim=True)
        loose = (near - low) / torch.where(high > low, high - low, torch.ones_like(high))
        maps = (pull * loose).sum(dim=1).view(-1, *block.cells.shape)
        maps = maps if self.keep_negative else maps.relu()
        return reading.answer(
            maps, block, directions, scores.detach(), reading.warnings(self.block)
        )


def _known(block: _Block, name: str, model: str) -> Tensor:
    """Queries, keys or values of a block ``(M,H,T,d)``.

    Raises:
        ModelError: If they could not be seen.
    """
    parts = []
    for part in block.call:
        known = None if part.output is None else getattr(part, name)
        if known is None:
            raise ModelError(
                f"{model} computes its attention in a way that hides its {name}, so Grad-ECLIP "
                "cannot be computed; use method attention_relevance."
            )
        # One learned query may serve all images.
        parts.append(known.expand(*part.weights.shape[:-2], *known.shape[-2:]))
    return block.joined(parts)
