"""AVSL: a distance from several levels of a network that can be taken apart exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.errors import ModelError
from simexplain.graph.distances import distances
from simexplain.graph.inference import (
    CERTAINTIES,
    Graph,
    PairGraph,
    Rows,
    infer,
    node_cams,
    overlap,
    pack,
    pooled,
    unpack,
)
from simexplain.graph.neighbours import Neighbours, Surrogate, neighbours
from simexplain.models.avsl_options import ORIGINS, AVSLOptions, avsl_options
from simexplain.models.avsl_parts import (
    checked_widths,
    eta_moments,
    eta_scale,
    found_levels,
    new_head,
    shared_graph,
)
from simexplain.models.base import DISTANCES, SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.models.layers import Layer
from simexplain.models.surveyed import Surveyed
from simexplain.networks import at_least_single
from simexplain.tracing import trace


class AVSL(SimilarityModel):
    """Attributable visual similarity learning (Zhang et al., section 3) over any network.

    Every level has a linear head that gives ``r`` nodes; a node of a pair is the squared
    difference of one dimension of its unit embeddings. Nodes whose CAMs are not focused are
    corrected from the level below along edges, so the distance is a sum of nodes of all levels,
    each with a known weight; ``attribute`` reports them.

    An embedding is one row ``(2 * sum of r)``: the unit embeddings of all levels from the lowest,
    then the certainties of all levels. Only :meth:`distance` and its relatives look inside.

    Attributes:
        base: The plain model that this one is built on, with its own embedding and distance.
        levels: The layers, lowest first.
        options: How the graph is computed.
        origin: A key of ``ORIGINS``: how heads, edges and reliabilities came to be.
        report: What is known about that, as plain JSON values.
        edges_0, ...: Momentum buffers ``(r_low,r_high)`` of Eq. 4, part of the state_dict.
        eta_0, ...: Mean and deviation of ``eta``, where the options standardise it.
    """

    edge_updates: Tensor

    @typed
    def __init__(
        self,
        backbone: nn.Module,
        *,
        levels: Sequence[str] | None = None,
        nodes: int | Sequence[int] = 512,
        preset: str | AVSLOptions = "paper",
        origin: str = "untrained",
        report: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Heads, reliabilities and empty edges over a network, which is not changed.

        Args:
            backbone: Any network or similarity model.
            levels: Layers from ``layers``, in any order; the last three stages unless given.
            nodes: ``r``, for all levels or for each from the lowest.
            preset: ``paper``, ``official`` or your own options.
            origin: A key of ``ORIGINS``.
            report: Kept and saved with the model.
            size: ``(height, width)`` of the images it will get, if not that of the preprocessing.

        Raises:
            ModelError: If a level is unknown or a number does not fit.
        """
        super().__init__()
        self.base = as_similarity_model(backbone)
        self.options = avsl_options(preset)
        self.preprocess, self.batch_size = self.base.preprocess, self.base.batch_size
        self.largest_batch = self.base.largest_batch
        self.backbone = self.base.backbone
        layers = found_levels(self.base, levels, size)
        self.levels = tuple(layer.name for layer in layers)
        self.widths = checked_widths(nodes, len(layers))
        self.name = f"{self.base.name} AVSL"
        self.origin, self.report = origin, dict(report or {})
        if origin not in ORIGINS:
            raise ModelError(f"Expected origin to be one of {', '.join(ORIGINS)}, got {origin!r}.")
        self.heads = nn.ModuleList(
            new_head(layer.shape[0], width, bias=self.options.bias)
            for layer, width in zip(layers, self.widths, strict=True)
        )
        self.alphas = nn.ParameterList(torch.ones(width) for width in self.widths[1:])
        self.betas = nn.ParameterList(torch.zeros(width) for width in self.widths[1:])
        for number, (low, high) in enumerate(pairwise(self.widths)):
            self.register_buffer(f"edges_{number}", torch.zeros(low, high))
            if self.options.eta == "standardised":
                self.register_buffer(f"eta_{number}", torch.tensor([0.0, 1.0]))
        # In the state_dict, so that training resumed continues the average instead of replacing it.
        self.register_buffer("edge_updates", torch.zeros((), dtype=torch.long))
        if (reference := next(self.base.parameters(), None)) is not None:
            self._place(reference)

    def _place(self, reference: Tensor) -> None:
        """Heads live where the network does, in at least single precision."""
        exact = torch.float64 if reference.dtype == torch.float64 else torch.float32
        for part in (self.heads, self.alphas, self.betas):
            part.to(reference.device, exact)
        for name, buffer in list(self.named_buffers(recurse=False)):
            kind = exact if buffer.is_floating_point() else buffer.dtype
            setattr(self, name, buffer.to(reference.device, kind))

    @property
    def network(self) -> nn.Module:
        """The user's own module."""
        return self.base.network

    @property
    def edges(self) -> tuple[Tensor, ...]:
        """The averaged correlations of Eq. 4 per pair of adjacent levels ``(r_low,r_high)``."""
        return tuple(getattr(self, f"edges_{number}") for number in range(len(self.widths) - 1))

    def layers_for(self, images: Tensor) -> tuple[Layer, ...]:
        """The layers of the plain model."""
        return self.base.layers_for(images)

    def is_surveyed(self, images: Tensor) -> bool:
        """That of the plain model."""
        return self.base.is_surveyed(images)

    def _survey_of(self, shape: tuple[int, int, int]) -> Surveyed:
        """That of the plain model."""
        return self.base._survey_of(shape)

    def bypass(self, layers: Sequence[str], images: Tensor) -> dict[str, float]:
        """Nothing: every level's head reads its layer."""
        return {}

    def cautions(
        self, layers: Sequence[str], images: Tensor, rows: Tensor | None = None
    ) -> tuple[str, ...]:
        """None, for the same reason."""
        return ()

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """One pass: the feature map ``(M,C,h,w)`` of every level, float32 or 64, in the graph."""
        maps = trace(self.base, images, self.levels, differentiable=True).maps.values()
        return [at_least_single(grid) for grid in maps]

    def rows(self, maps: Sequence[Tensor], cams: Sequence[Tensor] | None = None) -> Tensor:
        """Feature maps of all levels as embedding rows ``(M, 2 * sum of r)``.

        No gradient passes through the certainties, nor through anything that builds edges.
        ``cams`` are those of the maps, where they were made already.
        """
        embeddings = [
            head(pooled(grid, self.options.pooling))
            for head, grid in zip(self.heads, maps, strict=True)
        ]
        with torch.no_grad():
            rule = CERTAINTIES[self.options.certainty]
            certainties = [rule(grid) for grid in (self.cams(maps) if cams is None else cams)]
        return pack(embeddings, certainties)

    def cams(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The CAM of every node of every level (Eq. 2), ``(M,r,h,w)``, signed."""
        return [
            node_cams(grid, weight, bias, self.options.pooling)
            for (weight, bias), grid in zip(self.weights, maps, strict=True)
        ]

    @property
    def weights(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """Each level's head: its weight ``(r,C)`` and its bias ``(r,)`` or None."""
        heads = [head for head in self.heads if isinstance(head, nn.Linear)]
        return tuple((head.weight, head.bias if self.options.bias else None) for head in heads)

    def embed(self, images: Tensor) -> Tensor:
        """Rows ``(M, 2 * sum of r)`` of images ``(M,3,H,W)``; edges stay as they are."""
        return self.rows(self.feature_maps(images))

    def forward(self, images: Tensor) -> Tensor:
        """The same as :meth:`embed`; in training mode the batch also updates the edges."""
        maps = self.feature_maps(images)
        if not self.training:
            return self.rows(maps)
        with torch.no_grad():
            cams = self.cams(maps)
        self.update_edges(maps, cams=cams)
        rows = self.rows(maps, cams)
        self.update_scales(rows)
        return rows

    @torch.no_grad()
    def update_edges(
        self,
        maps: Sequence[Tensor],
        momentum: float | None = None,
        cams: Sequence[Tensor] | None = None,
        across: Callable[[Tensor], Tensor] = lambda own: own,
    ) -> None:
        """Moves the edges towards those of a batch (Eq. 3 and 4); the first batch sets them.

        Args:
            maps: From :meth:`feature_maps`.
            momentum: In place of the option: the share of the old edges that is kept.
            cams: Those of the maps, where they were made already.
            across: The mean of a tensor over all processes that train together.
        """
        kept = self.options.momentum if momentum is None else momentum
        if int(self.edge_updates) == 0:
            kept = 0.0
        cams = self.cams(maps) if cams is None else cams
        for edges, low, high in zip(self.edges, cams, cams[1:], strict=False):
            edges.mul_(kept).add_(across(overlap(low, high)), alpha=1 - kept)
        self.edge_updates += 1

    @torch.no_grad()
    def update_scales(self, rows: Tensor) -> None:
        """Moves the scale of ``eta`` towards that of a batch of rows ``(M,E)``, by momentum.

        Does nothing unless the options standardise ``eta``. The first batch sets it.
        """
        if self.options.eta != "standardised":
            return
        for scale, level in zip(self._scales, self.unpacked(rows).certainties[1:], strict=True):
            untouched = bool(scale[0] == 0)  # a mean of standard deviations is above 0
            kept = 0.0 if untouched else self.options.momentum
            scale.mul_(kept).add_(eta_scale(eta_moments(level)), alpha=1 - kept)

    @property
    def _scales(self) -> tuple[Tensor, ...]:
        if self.options.eta == "standardised":
            return tuple(getattr(self, f"eta_{number}") for number in range(len(self.widths) - 1))
        return tuple(edges.new_tensor([0.0, 1.0]) for edges in self.edges)

    def graph(self) -> Graph:
        """What all pairs share: normalised edges, and alpha and beta as Eq. 6 uses them."""
        return shared_graph(
            self.options, self.edges, self.alphas, self.betas, self._scales, self.widths[0]
        )

    def unpacked(self, rows: Tensor) -> Rows:
        """Embedding rows level by level."""
        return unpack(rows, self.widths)

    def distance(
        self, q: Tensor, g: Tensor, *, accuracy: float | None = None, tile: int | None = None
    ) -> Tensor:
        """Overall distances ``(Q,G)`` of embedding rows (Eq. 9); smaller is closer.

        Differentiable in the rows; in alpha and beta as well while the model is in training mode.

        Args:
            q: ``(Q,E)``.
            g: ``(G,E)``; the same tensor as ``q`` halves the work.
            accuracy: None for exact values. Else the error allowed, relative to the mean distance,
                for a much faster form; where it cannot keep that, values are exact all the same.
            tile: How many pairs are worked on at a time, which bounds the memory beside the
                result; None for a choice by device.
        """
        query, gallery = self._both(q, g)
        return distances(self._current(), query, gallery, accuracy=accuracy, tile=tile)

    def level_distances(self, q: Tensor, g: Tensor) -> Tensor:
        """The distance of each level alone ``(L,Q,G)``, the sum of its nodes; for training."""
        pairs = zip(self.unpacked(q).embeddings, self.unpacked(g).embeddings, strict=True)
        return torch.stack([DISTANCES["squared"](a, b) for a, b in pairs])

    def neighbours(self, q: Tensor, g: Tensor, k: int, **options: Any) -> Neighbours:
        """The ``k`` nearest gallery rows of each query, exact and proven.

        See ``simexplain.graph.neighbours.neighbours`` for the options and the result.
        """
        query, gallery = self._both(q, g)
        return neighbours(self.graph().detached(), query, gallery, k, **options)

    def surrogate(self, g: Tensor) -> Surrogate:
        """Vectors for any index of Euclidean distances, from the rows ``(G,E)`` of a gallery."""
        return Surrogate.build(self.graph().detached(), self.unpacked(g))

    def _both(self, q: Tensor, g: Tensor) -> tuple[Rows, Rows]:
        """Rows of queries and gallery; the same object where they are the same tensor."""
        query = self.unpacked(q)
        return query, query if g is q else self.unpacked(g)

    def _current(self) -> Graph:
        """The graph, with a gradient for alpha and beta only while they are trained."""
        return self.graph() if self.training else self.graph().detached()

    def pairs(self, a: Tensor, b: Tensor) -> PairGraph:
        """The whole graph of pairs ``(a[i], b[i])`` of rows ``(B,E)``."""
        return infer(self._current(), self.unpacked(a), self.unpacked(b))

    def to_json(self) -> dict[str, Any]:
        """Everything beside tensors that is needed to build this model again over its network."""
        return {
            "levels": list(self.levels),
            "nodes": list(self.widths),
            "options": self.options.to_json(),
            "origin": self.origin,
            "report": self.report,
        }
