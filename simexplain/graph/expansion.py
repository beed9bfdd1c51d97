"""All pairwise distances of the AVSL graph from matrix products alone, to first order.

Write the doubt ``q = 1 - p`` of each node as its mean over pairs plus a rest, ``q = qbar + eps``.
With the inflows ``t`` and the lower nodes mixed by the edges ``T``, both at ``qbar``, Eq. 8 is

    D = sum of t (1 - q) delta + sum of t eps T + terms with two eps,

summed over all nodes. ``q`` as a polynomial in the product of both certainties makes the first sum
one matrix product. The second is a form of rank ``r`` a level, ``T`` being linear in all lower
nodes; a few directions of it are nearly all, as a mixture of many nodes is nearly its mean. Each
direction is a product of two numbers per pair, each of them one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simexplain.errors import ModelError
from simexplain.graph.coefficients import Coupling, Fit, Form
from simexplain.graph.inference import Graph, Rows
from simexplain.graph.tiled import ExactPairs, check_widths

SAMPLED_PAIRS = 2048
SAMPLED_IMAGES = 64
BLOCK = 1024


@dataclass(frozen=True)
class Expansion:
    """Distances of all pairs of two sets of images as sums and products of matrix products.

    Attributes:
        q: Queries, embeddings centred, certainties at most 1.
        g: Gallery, likewise; the same object where the queries are the gallery.
        main: Forms that add up.
        couplings: Pairs of lists of forms; the sums of both lists are multiplied and added.
        error: Largest difference to the exact distance over sampled pairs, divided by the mean
            distance.
    """

    q: Rows
    g: Rows
    main: tuple[Form, ...]
    couplings: tuple[Coupling, ...]
    error: float

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        graph: Graph,
        q: Rows,
        g: Rows | None = None,
        degree: int = 1,
        rank: int = 1,
        seed: int = 0,
        *,
        pairs: int = SAMPLED_PAIRS,
    ) -> Expansion:
        """Chooses all coefficients by sampled pairs, in float64, and measures the error.

        Args:
            graph: The graph.
            q: Queries, at least one row.
            g: Gallery, at least one row; None for the queries themselves.
            degree: Degree of the polynomials in the certainties, at least 1.
            rank: Directions kept of each level's coupling to the levels below, at least 1:
                without any, changes of ``p`` do not cancel as they should.
            seed: Seed of the sampled pairs; PyTorch's own random state is not used.
            pairs: How many pairs the coefficients are fitted to. The error is measured on all pairs
                of 64 other queries and 64 other gallery images.

        Raises:
            ModelError: If a set of images is empty, or degree or rank is less than 1.
        """
        like = q.embeddings[0]
        gallery = q if g is None or g is q else g.to(like)
        if min(len(q), len(gallery), degree, rank) < 1:
            raise ModelError(
                f"Expected at least 1 query, 1 gallery image, degree 1 and rank 1, got {len(q)}, "
                f"{len(gallery)}, {degree} and {rank}; raise what is 0."
            )
        for rows in (q, gallery):
            check_widths(graph, rows)
        generator = torch.Generator().manual_seed(seed)
        fit, check = (
            [torch.randint(len(rows), (count,), generator=generator) for rows in (q, gallery)]
            for count in (pairs, SAMPLED_IMAGES)
        )
        first, second, scales = _scaled(q, gallery)
        main, couplings = Fit(graph, (first, second), scales, fit, degree).forms(rank)
        expansion = cls(
            first,
            second,
            tuple(form.to(like) for form in main),
            tuple(
                (tuple(f.to(like) for f in one), tuple(f.to(like) for f in other))
                for one, other in couplings
            ),
            0.0,
        )
        return replace(expansion, error=expansion._measured(graph, q, gallery, check))

    @torch.no_grad()
    def rows(self, queries: slice, gallery: slice = slice(None)) -> Tensor:
        """Distances of some queries to some of the gallery, ``(queries, gallery)``, none below 0.

        Nothing but the result and ``r`` numbers an image, for one product at a time, is kept.
        """
        own, other = self.q[queries], self.g[gallery]
        out = _summed(self.main, own, other)
        for one, factor in self.couplings:
            out.addcmul_(_summed(one, own, other), _summed(factor, own, other))
        return out.clamp_min_(0)

    @torch.no_grad()
    def matrix(self, *, block: int = BLOCK) -> Tensor:
        """All distances ``(Q,G)``; where the queries are the gallery, half of them mirrored."""
        out = self.q.embeddings[0].new_empty(len(self.q), len(self.g))
        symmetric = self.g is self.q
        for top in range(0, len(self.q), block):
            rows = slice(top, min(top + block, len(self.q)))
            for left in range(top if symmetric else 0, len(self.g), block):
                columns = slice(left, min(left + block, len(self.g)))
                part = self.rows(rows, columns)
                if symmetric and left == top:
                    part = part.triu() + part.triu(1).T  # both halves round differently
                out[rows, columns] = part
                if symmetric:
                    out[columns, rows] = part.T
        return out.fill_diagonal_(0) if symmetric else out

    def _measured(self, graph: Graph, q: Rows, g: Rows, pairs: Sequence[Tensor]) -> float:
        """Largest error over all pairs of sampled images, relative to the mean distance."""
        left, right = (chosen.to(q.embeddings[0].device) for chosen in pairs)
        part = replace(self, q=self.q[left], g=self.g[right]).rows(slice(None))
        if g is q:
            part = part.masked_fill(left.unsqueeze(1) == right, 0)
        true = torch.empty_like(part)
        exact = ExactPairs(graph, q[left], g[right])
        exact.block(slice(0, len(left)), slice(0, len(right)), true)
        mean = true.mean()
        apart = (part - true).abs().amax()
        return float(apart / mean if mean > 0 else apart)


def _scaled(q: Rows, g: Rows) -> tuple[Rows, Rows, tuple[Tensor, ...]]:
    """Both sets with embeddings around the gallery's mean and certainties at most 1, and scales.

    No difference of embeddings changes; the products lose fewer digits.
    """
    centres = [level.mean(dim=0) for level in g.embeddings]
    scales = []
    for own, other in zip(q.certainties, g.certainties, strict=True):
        top = torch.maximum(own.abs().amax(dim=0), other.abs().amax(dim=0))
        scales.append(torch.where(top > 0, top, 1.0))
    first, second = (
        Rows(
            tuple(e - centre for e, centre in zip(rows.embeddings, centres, strict=True)),
            tuple(c / scale for c, scale in zip(rows.certainties, scales, strict=True)),
        )
        for rows in (q, g)
    )
    return first, first if g is q else second, tuple(scales)


def _summed(forms: tuple[Form, ...], own: Rows, other: Rows) -> Tensor:
    """The sum of forms for all pairs ``(Q,G)``, one matrix product after the other."""
    out = own.embeddings[0].new_zeros(len(own), len(other))
    for form in forms:
        e, c = own.embeddings[form.level], own.certainties[form.level]
        f, d = other.embeddings[form.level], other.certainties[form.level]
        if form.nodes:
            weights = form.powers[0]
            out += (e.square() @ weights).unsqueeze(1) + f.square() @ weights
            out.addmm_(-2 * weights * e, f.T)
        else:
            out += form.powers[0].sum()
        for m, weights in enumerate(form.powers[1:], start=1):
            one, two = weights * c**m, d**m
            if not form.nodes:
                out.addmm_(one, two.T)
                continue
            out.addmm_(one * e.square(), two.T).addmm_(one, (two * f.square()).T)
            out.addmm_(-2 * one * e, (two * f).T)
    return out
