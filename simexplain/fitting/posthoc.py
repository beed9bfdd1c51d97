"""The verb: AVSL over a network that is already trained and stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain.arguments import typed
from simexplain.data.folders import Batches, Record, StageProgress, pictures_in
from simexplain.errors import ImageError, ModelError
from simexplain.graph.inference import Graph, Rows, broadcast, pooled
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_options import AVSLOptions, avsl_options
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.networks import at_least_single, full_precision, preserve_state, unit_rows
from simexplain.renaming import takes_old_names, todays
from simexplain.tracing import trace


def check_numbers(options: Any, *positive: str) -> None:
    """Raises a ModelError unless these options are at least 1 and the seed fits a generator."""
    for name in positive:
        if not getattr(options, name) >= 1:
            raise ModelError(f"Expected {name} of at least 1, got {getattr(options, name)}.")
    if not -(2**63) <= options.seed < 2**63:
        raise ModelError(f"Expected a seed of at most 63 bits, got {options.seed}.")


def _check_features(layer: str, rows: Tensor, records: Sequence[Record]) -> None:
    """Refuses features ``(N,C)`` of a layer from which nothing can be fitted."""
    bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ModelError(
            f"Expected finite features of layer '{layer}', but those of '{records[bad[0]].path}' "
            "are not; check the model."
        )
    if float((rows - rows[0]).abs().max()) <= 1e-6 * float(rows.abs().max()):
        raise ImageError(f"All pictures look alike to layer '{layer}'; give different ones.")


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


class FeaturePasses:
    """Passes over the feature maps of some levels of a frozen network.

    The first pass keeps the maps while they fit into ``budget`` bytes; later passes run the network
    again only for the rest. The network is left as it was: no gradients, no modes, no statistics.
    """

    def __init__(
        self,
        model: SimilarityModel,
        batches: Batches,
        levels: Sequence[str],
        *,
        budget: int,
        progress: StageProgress,
    ) -> None:
        self.model, self.batches, self.levels = model, batches, tuple(levels)
        self.progress = progress
        self._budget = budget
        self._kept: list[tuple[list[int], list[Tensor]]] = []
        self._complete = False

    def __call__(self, what: str) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Yields the places of the pictures and their maps ``(M,C,h,w)`` level by level."""
        total = len(self.batches.records)
        done = 0
        for places, maps in self._maps():
            yield places, maps
            done += len(places)
            self.progress(what, done, total)

    def _maps(self) -> Iterator[tuple[list[int], list[Tensor]]]:
        kept = {index for places, _ in self._kept for index in places}
        yield from list(self._kept)
        if self._complete:
            return
        filling = not kept
        rest = [n for n in range(len(self.batches.records)) if n not in kept]
        for places, images in self.batches.over(rest):
            maps = self._run(images)
            size = sum(level.numel() * level.element_size() for level in maps)
            if filling and size <= self._budget:
                self._budget -= size
                self._kept.append((places, maps))
            else:
                filling = False
            yield places, maps
        self._complete = filling

    def _run(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad(), preserve_state(self.model.network):
            maps = trace(self.model, images, self.levels, differentiable=True).maps.values()
        return [at_least_single(level) for level in maps]


_TEMPERATURE = 16.0
_BATCH = 512
_LEAST_STEPS = 200


@dataclass(frozen=True)
class Head:
    """A linear head.

    Attributes:
        weight: ``(r,C)``.
        bias: ``(r,)`` or None.
    """

    weight: Tensor
    bias: Tensor | None


def pca_head(vectors: Tensor, width: int) -> Head:
    """The ``width`` directions in which pooled features ``(M,C)`` vary most, centred.

    Fewer where the features have fewer: nodes that never differ would explain nothing.
    """
    exact = vectors.double()
    mean = exact.mean(dim=0)
    _, strength, directions = torch.linalg.svd(exact - mean, full_matrices=False)
    rank = int((strength > strength[0] * 1e-6).sum()) if len(strength) else 0
    weight = directions[: max(1, min(width, rank))].to(vectors)
    return Head(weight, -(weight @ mean.to(vectors)))


def trained_head(
    vectors: Tensor,
    labels: Tensor,
    width: int,
    *,
    bias: bool,
    epochs: int,
    generator: torch.Generator,
    learning_rate: float = 3e-3,
) -> Head:
    """A head that draws classes together: cross-entropy over cosines with learned proxies.

    Args:
        vectors: Pooled features ``(M,C)``.
        labels: Class numbers ``(M,)``.
        width: ``r``.
        bias: Whether the head has one.
        epochs: Passes over the vectors in batches of 512; at least 200 batches.
        generator: The only source of chance.
        learning_rate: Of Adam, falling to zero along a cosine.
    """
    scale = vectors.std().clamp_min(1e-12)
    inputs = vectors / scale
    classes = int(labels.max()) + 1
    weight = _start(inputs, width, generator).requires_grad_()
    offset = torch.zeros(width, device=vectors.device, requires_grad=bias)
    proxies = _class_means(inputs @ weight.detach().T, labels, classes).requires_grad_()
    learned = [weight, proxies, *([offset] if bias else [])]
    optimiser = torch.optim.Adam(learned, lr=learning_rate)
    steps = max(_LEAST_STEPS, epochs * -(-len(inputs) // _BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.enable_grad():
        for _ in range(steps):
            chosen = torch.randint(len(inputs), (_BATCH,), generator=generator)
            chosen = chosen.to(labels.device)
            rows = unit_rows(inputs[chosen] @ weight.T + offset)
            cosines = rows @ unit_rows(proxies).T
            loss = F.cross_entropy(_TEMPERATURE * cosines, labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return Head((weight / scale).detach(), offset.detach() if bias else None)


def _start(inputs: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """The principal directions, then random mixtures of them where more are needed."""
    first = pca_head(inputs, width).weight
    if len(first) == width:
        return first.clone()
    mixture = torch.randn((width - len(first), len(first)), generator=generator)
    mixture = (mixture / len(first) ** 0.5).to(first)
    return torch.cat((first, mixture @ first))


def _class_means(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    sums = torch.zeros((classes, rows.shape[1]), device=rows.device, dtype=rows.dtype)
    return unit_rows(sums.index_add(0, labels, unit_rows(rows)))


_PAIRS = 4096
_CLASSES, _EACH = 24, 4


@dataclass(frozen=True)
class Scale:
    """Where the products of two certainties of one level lie.

    Attributes:
        mean: Their mean over nodes and pairs.
        deviation: Their standard deviation.
    """

    mean: float
    deviation: float


def certainty_scales(rows: Rows, generator: torch.Generator) -> list[Scale]:
    """The scale of ``eta`` (Eq. 5) of every level but the lowest, over random pairs of images."""
    first, second = torch.randint(len(rows), (2, _PAIRS), generator=generator)
    scales = []
    for level in rows.certainties[1:]:
        eta = level[first.to(level.device)] * level[second.to(level.device)]
        scales.append(Scale(float(eta.mean()), float(eta.std().clamp_min(1e-12))))
    return scales


def slopes_and_offsets(
    scales: Sequence[Scale], steepness: Sequence[Tensor], shift: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Eq. 6 written for standardised ``eta``: ``p = sigmoid(steepness * z + shift)``.

    Raw ``eta`` spans about a thousandth, so alpha would have to grow to hundreds to matter. In
    units of its own spread one learning rate fits every level.
    """
    parts = list(zip(scales, steepness, shift, strict=True))
    slopes = tuple(a / s.deviation for s, a, _ in parts)
    offsets = tuple(b - a * s.mean / s.deviation for s, a, b in parts)
    return slopes, offsets


def trained_reliability(
    graph: Graph,
    rows: Rows,
    labels: Tensor,
    scales: Sequence[Scale],
    *,
    steps: int,
    generator: torch.Generator,
    learning_rate: float = 0.03,
) -> Graph:
    """Learns alpha and beta alone, from the overall distance, as in Eq. 10.

    Alpha is kept from becoming negative, which the paper leaves open: reliable shall mean focused.
    Left free, half of a top level's nodes turned it round without finding more images.

    Args:
        graph: Edges, and offsets that are infinite for nodes which stay their own.
        rows: Of all images.
        labels: Class numbers ``(M,)``.
        scales: From :func:`certainty_scales`.
        steps: Batches of some images of each of some classes.
        generator: The only source of chance.
        learning_rate: Of Adam.

    Returns:
        The graph with what was learned.
    """
    if not graph.slopes:  # one level: nothing stands in, nothing to learn
        return graph
    always = [torch.isinf(offset) for offset in graph.offsets]
    steepness = [torch.ones_like(part, requires_grad=True) for part in graph.slopes]
    shift = [torch.zeros_like(part, requires_grad=True) for part in graph.slopes]
    optimiser = torch.optim.Adam([*steepness, *shift], lr=learning_rate)

    def current() -> Graph:
        slopes, offsets = slopes_and_offsets(scales, steepness, shift)
        infinite = zip(offsets, always, strict=True)
        kept = tuple(part.masked_fill(own, torch.inf) for part, own in infinite)
        return replace(graph, slopes=slopes, offsets=kept)

    with torch.enable_grad():
        for _ in range(steps):
            chosen = _balanced(labels.cpu(), generator).to(labels.device)
            part = rows[chosen]
            loss = _same_class_nearer(broadcast(current(), part, part), labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            with torch.no_grad():
                for learned in steepness:
                    learned.clamp_(min=0.0)
    return current().detached()


def _same_class_nearer(distance: Tensor, labels: Tensor) -> Tensor:
    """The probability that a neighbour drawn by distance has the same class, as a loss."""
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = (labels[:, None] == labels[None]) & ~own
    scores = (-_TEMPERATURE / 2 * distance).masked_fill(own, -torch.inf)
    drawn = F.log_softmax(scores, dim=1).masked_fill(~same, -torch.inf)
    return -torch.logsumexp(drawn[same.any(dim=1)], dim=1).mean()


def _balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A few images of each of a few classes that have at least two."""
    classes, counts = torch.unique(labels, return_counts=True)
    usable = classes[counts > 1]
    drawn = usable[torch.randperm(len(usable), generator=generator)[:_CLASSES]]
    if len(usable) == 1:  # single pictures of other classes are all there is to tell it from
        single = classes[counts == 1]
        order = torch.randperm(len(single), generator=generator)[: _CLASSES - 1]
        drawn = torch.cat((drawn, single[order]))
    picked = []
    for label in drawn:
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)[:_EACH]
        picked.append(members[order])
    return torch.cat(picked)


_UNLABELLED_STEEPNESS, _UNLABELLED_SHIFT = 0.5, 2.0

FEW_A_CLASS = 3
"""Pictures of a class, on average, from which on heads differ reliably."""


@takes_old_names
@dataclass(frozen=True)
class PostHoc:
    """How heads, edges and reliabilities are fitted to a frozen network.

    Attributes:
        levels: Layers, the last three stages unless given.
        nodes: Of each level. Without labels a level has at most as many as it has channels.
        preset: ``paper``, ``official`` or own options. PCA heads always have a bias, since PCA
            subtracts the mean.
        epochs: Passes over the pooled features while a head is trained.
        reliability_batches: Batches while alpha and beta are trained.
        seed: Of everything that is drawn; the user's random state is not touched.
        batch_size: Pictures in one forward pass.
        max_cache: Bytes of feature maps to keep between two passes; above it the network runs
            again.
    """

    levels: Sequence[str] | None = None
    nodes: int = 512
    preset: str | AVSLOptions = "paper"
    epochs: int = 60
    reliability_batches: int = 60
    seed: int = 0
    batch_size: int = 32
    max_cache: int = field(default=1 << 30, repr=False)

    def __post_init__(self) -> None:
        check_numbers(self, "nodes", "epochs", "reliability_batches", "batch_size")

    def __call__(
        self,
        model: nn.Module,
        records: Sequence[Record],
        *,
        labelled: bool,
        progress: StageProgress | None = None,
    ) -> AVSL:
        """Fits; see :func:`fit`."""
        base = _plain(model)
        levels = _unlearned(base, levels=self.levels, nodes=1).levels
        batches = Batches(records, base.preprocess, base.batch_size or self.batch_size)
        passes = FeaturePasses(
            base, batches, levels, budget=self.max_cache, progress=progress or silent
        )
        return self.over(passes, labelled=labelled)

    def over(self, passes: FeaturePasses, *, labelled: bool) -> AVSL:
        """Fits on passes made before, whose levels count; several fits can share one reading."""
        options = avsl_options(self.preset)
        options = options if labelled else replace(options, bias=True)
        generator = torch.Generator().manual_seed(self.seed)
        vectors, places = _pooled(passes, options.pooling)
        broken = passes.batches.broken
        labels = _labels(passes.batches.records, places, broken, labelled=labelled)
        for name, level in zip(passes.levels, vectors, strict=True):
            _check_features(name, level, [passes.batches.records[place] for place in places])
        heads = []
        for number, level in enumerate(vectors):
            passes.progress("Fitting the heads", number, len(vectors))
            heads.append(self._head(level, labels, options, generator))
        fitted = _unlearned(
            passes.model,
            levels=passes.levels,
            nodes=[len(head.weight) for head in heads],
            preset=options,
            origin="unlabelled" if labels is None else "labelled",
            report=self._report(labels, vectors, len(places), broken),
        )
        _install(fitted, heads)
        rows = _edges(fitted, passes)
        self._reliability(fitted, rows, labels, generator)
        for own in (fitted, *fitted.heads.modules(), fitted.alphas, fitted.betas):
            own.training = False  # not eval(), which would reach into the user's network
        return fitted

    def _head(
        self,
        vectors: Tensor,
        labels: Tensor | None,
        options: AVSLOptions,
        generator: torch.Generator,
    ) -> Head:
        if labels is None:
            return pca_head(vectors, self.nodes)
        return trained_head(
            vectors,
            labels.to(vectors.device),
            self.nodes,
            bias=options.bias,
            epochs=self.epochs,
            generator=generator,
        )

    def _reliability(
        self, model: AVSL, rows: Tensor, labels: Tensor | None, generator: torch.Generator
    ) -> None:
        """Sets alpha and beta: learned with labels, else from the spread of the certainties."""
        scale = model.options.scale
        graph, known = model.graph().detached(), model.unpacked(rows)
        scales = certainty_scales(known, generator)
        if labels is None:
            steep = [torch.full_like(part, _UNLABELLED_STEEPNESS) for part in graph.slopes]
            shift = [torch.full_like(part, _UNLABELLED_SHIFT) for part in graph.slopes]
            slopes, offsets = slopes_and_offsets(scales, steep, shift)
            learned: Graph = replace(graph, slopes=slopes, offsets=offsets)
        else:
            learned = trained_reliability(
                graph,
                known,
                labels.to(rows.device),
                scales,
                steps=self.reliability_batches,
                generator=generator,
            )
        with torch.no_grad():
            for alpha, slope in zip(model.alphas, learned.slopes, strict=True):
                alpha.copy_(slope / scale)
            for beta, offset in zip(model.betas, learned.offsets, strict=True):
                beta.copy_(torch.where(torch.isinf(offset), beta, offset / scale))

    def _report(
        self,
        labels: Tensor | None,
        vectors: Sequence[Tensor],
        images: int,
        broken: dict[Path, str],
    ) -> dict[str, Any]:
        report: dict[str, Any] = {"images": images, "seed": self.seed}
        # Nodes of the largest head, if pictures were many enough.
        classes, nodes = 0, min(self.nodes, max(level.shape[1] for level in vectors))
        if labels is not None:
            classes, nodes = int(labels.max()) + 1, self.nodes
            report |= {"classes": classes, "epochs": self.epochs, "steps": self.reliability_batches}
        if broken:
            report["skipped"] = [str(path) for path in broken]
        if warnings := too_few(images, classes, nodes):
            report["warnings"] = list(warnings)
        return report


def too_few(images: int, classes: int, nodes: int) -> tuple[str, ...]:
    """What to know where heads were fitted on few pictures, a sentence each."""
    problems = []
    if images < nodes:
        problems.append(
            f"{images} pictures are fewer than the {nodes} nodes of a level, so they do not "
            "determine its head and single nodes mean little; fit on more pictures, or with at "
            f"most {images} nodes."
        )
    if classes and images < FEW_A_CLASS * classes:
        problems.append(
            f"{images} pictures of {classes} classes are fewer than {FEW_A_CLASS} a class, too few "
            "to choose a head by; fit on more pictures."
        )
    return tuple(problems)


@typed
@full_precision()
def fit(
    model: nn.Module,
    folder: str | Path | Sequence[Record],
    *,
    labelled: bool = True,
    progress: StageProgress | None = None,
    **options: Any,
) -> AVSL:
    """Builds AVSL over a trained network that has no heads on its lower levels.

    The network stays as it is. With labels, each level's head is trained on its pooled features
    (cross-entropy over cosines with one proxy per class), edges are the mean over all images
    (Eq. 3, the value that Eq. 4 approaches), and alpha and beta are trained by the overall
    distance. Without labels heads are the principal components, and alpha and beta follow from the
    spread of the certainties, with a mean reliability of about 0.88. ``model.origin`` and every
    result record which it is.

    Args:
        model: Any network or similarity model.
        folder: Pictures, each class in a sub-folder; or records that you made yourself.
        labelled: Whether there are classes.
        progress: Called with what is being done, how far it is, and how far it goes.
        **options: Of :class:`PostHoc`, such as ``nodes=128``.

    Returns:
        The fitted model in evaluation mode, its network in the mode it was in; ``save_model``
        writes it.

    Raises:
        ImageError: If the folder has too few pictures or classes.
        ModelError: If the network or an option cannot be used.
    """
    known = PostHoc.__dataclass_fields__
    options = todays(options, known)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ModelError(f"fit has the options {', '.join(known)}, got '{unknown[0]}'.")
    records: Sequence[Record]
    if isinstance(folder, (str, Path)):
        records = pictures_in(folder, labelled=labelled)
    else:
        records = list(folder)
    return PostHoc(**options)(model, records, labelled=labelled, progress=progress)


def _plain(model: nn.Module) -> SimilarityModel:
    return model.base if isinstance(model, AVSL) else as_similarity_model(model)


def _unlearned(base: SimilarityModel, **options: Any) -> AVSL:
    """A model whose heads will be replaced, so that what they start with must cost no chance."""
    with torch.random.fork_rng(devices=[]):
        return AVSL(base, **options)


def _pooled(passes: FeaturePasses, pooling: str) -> tuple[list[Tensor], list[int]]:
    """Pooled features per level ``(M,C)`` and the places of their pictures."""
    rows: list[list[Tensor]] = [[] for _ in passes.levels]
    order: list[int] = []
    for places, maps in passes("Reading features"):
        order += places
        for level, grid in zip(rows, maps, strict=True):
            level.append(pooled(grid, pooling))
    if len(order) < 2:
        reasons = list(passes.batches.broken.values())
        raise ImageError(
            f"Expected at least two pictures that can be read, got {len(order)}"
            f"{': ' + reasons[0] if reasons else '.'}"
        )
    return [torch.cat(level) for level in rows], order


def _labels(
    records: Sequence[Record], places: Sequence[int], broken: dict[Path, str], *, labelled: bool
) -> Tensor | None:
    """Class numbers of the readable pictures ``(M,)``."""
    if not labelled:
        return None
    labels = [records[index].label for index in places]
    names = {label: n for n, label in enumerate(sorted({label for label in labels if label}))}
    numbers = torch.tensor([names.get(label or "", -1) for label in labels])
    counts = torch.bincount(numbers.clamp_min(0), minlength=max(1, len(names)))
    if len(names) < 2 or bool((numbers < 0).any()) or int(counts.max()) < 2:
        lost = f", and {len(broken)} pictures cannot be read" if broken else ""
        raise ImageError(
            f"Expected at least two classes and one of them with two pictures, got {len(names)} "
            f"classes of at most {int(counts.max())} pictures{lost}; without labels say "
            "--unlabelled (labelled=False)."
        )
    return numbers


@torch.no_grad()
def _install(model: AVSL, heads: Sequence[Head]) -> None:
    for (weight, bias), head in zip(model.weights, heads, strict=True):
        weight.copy_(head.weight)
        if bias is not None and head.bias is not None:
            bias.copy_(head.bias)


@torch.no_grad()
def _edges(model: AVSL, passes: FeaturePasses) -> Tensor:
    """Sets the edges to their mean over all pictures; returns the rows ``(M,E)``."""
    rows, seen = [], 0
    for places, maps in passes("Finding edges"):
        cams = model.cams(maps)
        model.update_edges(maps, seen / (seen + len(places)), cams)
        seen += len(places)
        rows.append(model.rows(maps, cams))
    return torch.cat(rows)
