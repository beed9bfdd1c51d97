"""A dry run that records every layer of a network: its output, its gradient, how it is reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from simexplain.image_choices import ImageChoices
from simexplain.networks import INPUT, first_tensor, preserve_state, split_call, with_first
from simexplain.places.cells import Cells, cells_of
from simexplain.places.paths import Paths, Vertex
from simexplain.places.spans import Place
from simexplain.tracing import Traceable, listening


class Input(nn.Identity):
    """Stands for what a layer is called with."""


@dataclass(frozen=True, eq=False)
class LayerRun:
    """One call of one layer, as :func:`survey` recorded it.

    Attributes:
        name: The layer's name, with ``@call`` appended where it runs more than once; what a layer
            is called with, that none returns and everything passes, has its name and ``:input``.
        module: The module itself; an :class:`Input` there.
        output: Its output for the first picture, as it was when the layer returned it.
        gradient: The gradient of a random projection of the embedding, or None where the
            embedding does not depend on this output.
        follows: The layer whose very output this one was called with, if any.
        same: A key that layers share that returned the very same tensor.
        main: Whether everything that the embedding learns of the image passes this output.
        cells: The grid that its numbers make, if local operations such as convolutions made it.
        edge: Where it hangs in the autograd graph, which lives as long as the survey.
        source: What it was called with, where everything passes that.
        responses: By layout (see :data:`LAYOUTS`) how much each position changes when a part of
            the picture is replaced, ``(K,...positions)`` for ``K`` parts; nothing where the graph
            determines where its cells lie.
        moves: Whether its cells lie elsewhere in other pictures: the network computes where.
    """

    name: str
    module: nn.Module
    output: Tensor
    gradient: Tensor | None
    follows: str | None
    same: tuple[int, int] = (0, 0)
    main: bool = False
    cells: Cells | None = None
    edge: GradientEdge | None = None
    source: Source | None = None
    responses: dict[str, Tensor] = field(default_factory=dict)
    moves: bool = False


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor that everything passes, though perhaps no layer returned it: a sum of two, say.

    Attributes:
        gradient: That of the random projection of the embedding.
        edge: Where it hangs in the autograd graph.
    """

    gradient: Tensor
    edge: GradientEdge


_COMPUTED = 8
LAYOUTS = ("NCHW", "NHWC", "NLC", "LNC")
"""How outputs of unknown origin may be laid out: images ``N``, channels ``C`` and positions."""


@dataclass(frozen=True)
class Survey:
    """Everything that :func:`survey` recorded.

    Attributes:
        runs: Every call of a layer that returned a tensor, in order of execution.
        embedding: Of the first picture ``(E,)``.
        tracked: Whether the embedding is differentiable with respect to anything at all.
        obstacles: What keeps gradients away, such as ``no_grad``, in the order of occurrence.
        images: How many the recorded pass was made for.
        draws: Whether it draws random numbers, so that the embedding is another one every time.
        computed: Gradients of what everything passes after all layers and no layer gives: what the
            network's forward makes of several, the last one first.
    """

    runs: list[LayerRun]
    embedding: Tensor
    tracked: bool
    obstacles: tuple[str, ...] = ()
    images: int = 1
    draws: bool = False
    computed: tuple[Tensor, ...] = ()


def survey(model: Traceable, pictures: Tensor) -> Survey:
    """Runs a model on a picture with one part or another replaced, and records every layer.

    Costs one forward and one backward pass of the first image, and a forward pass of the others,
    which is left out where local operations made all maps, as in most convolutional networks.

    Args:
        model: The model to look into.
        pictures: A picture with each of its parts replaced in turn ``(K,C,H,W)``, or any image
            alone ``(1,C,H,W)``.
    """
    with torch.inference_mode(mode=False), preserve_state(model.network):
        before = _random_state(pictures)
        record, paths, embeddings = _recorded(model, pictures[:1])
        draws = not torch.equal(before, _random_state(pictures))
        main = paths.main()
        calls = record.calls = _wanted(record, paths, main)
        sources = [call.source if _vertex(call.source) in main else None for call in calls]
        layers = {vertex for edge in (*(call.edge for call in calls), *sources)
                  if (vertex := _vertex(edge)) is not None}  # fmt: skip
        later = [GradientEdge(*vertex) for vertex in paths.above(main, layers)[:_COMPUTED]]
        edges = [*(call.edge for call in calls), *sources, *later]
        with torch.enable_grad():
            gradients = _probe_gradients(embeddings, edges)
        record.settle(paths)
        moving = _moving(model, pictures[:1], calls) if record.choices else set()
        if len(pictures) > 1 and any(call.open for call in calls):
            _respond(model, pictures[1:], calls, record.count)
        draws = draws and _differs(model, pictures[:1], embeddings[:1].detach())
    return Survey(
        _runs(calls, gradients[: 2 * len(calls)], main, moving),
        embeddings[0].detach(),
        embeddings.requires_grad,
        tuple(dict.fromkeys(record.obstacles)),
        record.count,
        draws,
        tuple(slope for slope in gradients[2 * len(calls) :] if slope is not None),
    )


def _wanted(record: _Record, paths: Paths, main: set[Vertex]) -> list[_Call]:
    """All calls, of what layers are called with only sums and the like after the last layer.

    Args:
        record: All calls, in order of execution.
        paths: Of the pass.
        main: What everything passes.
    """
    least = 2 + (record.count > 1)
    passed = [call for call in record.calls if _vertex(call.edge) in main]
    passed = [call for call in passed if sum(side > 1 for side in call.output.shape) >= least]
    returned = {_vertex(call.edge) for call in passed if not call.name.endswith(INPUT)}
    last = takewhile(lambda call: call.name.endswith(INPUT), reversed(passed))
    lower = {vertex for vertex in returned if vertex is not None}
    kept = {
        id(call)
        for call in last
        if (vertex := _vertex(call.edge)) is not None and not paths.is_chained(vertex, lower)
    }
    return [call for call in record.calls if id(call) in kept or not call.name.endswith(INPUT)]


def _random_state(pictures: Tensor) -> Tensor:
    """That of torch where the pictures are."""
    return torch.cuda.get_rng_state(pictures.device) if pictures.is_cuda else torch.get_rng_state()


def _differs(model: Traceable, picture: Tensor, row: Tensor) -> bool:
    """Whether a picture ``(1,C,H,W)`` has another embedding than ``(1,E)`` when it is run again."""
    with torch.no_grad():
        again = model.embed(picture.expand(model.batch_size or 1, *picture.shape[1:]).clone())[:1]
    return not torch.allclose(again, row, rtol=1e-3, atol=1e-3 * float(row.abs().max()))


def _recorded(model: Traceable, picture: Tensor) -> tuple[_Record, Paths, Tensor]:
    """One pass of a picture ``(1,C,H,W)`` with gradients, its graph and its embeddings."""
    record = _Record(model.batch_size or 1)
    listeners = {name: record.listener(name) for name in _names(model)}
    listeners |= {name + INPUT: record.before(name) for name in _names(model)}
    image = picture.detach().clone().requires_grad_()
    watch = ImageChoices(image)
    with listening(model.network, listeners), torch.enable_grad(), watch:
        batch = image.expand(record.count, *image.shape[1:])
        embeddings = model.embed(batch.clone())
    record.choices = watch.made
    return record, Paths(embeddings, image, record.leaves), embeddings


def _names(model: Traceable) -> list[str]:
    return [name for name, _ in model.network.named_modules() if name]


def _moving(model: Traceable, picture: Tensor, calls: Sequence[_Call]) -> set[int]:
    """The numbers of calls whose cells lie elsewhere in another picture.

    A network that computes places may find them by brightness, contrast or what it has learned:
    nearly all that there is to find lies in one corner of a picture, then in the opposite one.
    """
    height, width = picture.shape[2:]
    for corner in (slice(None, 1), slice(1, None)):
        rows, columns = (torch.arange(side) * 2 // side for side in (height, width))
        there = torch.tensor([0.02, 0.02])
        there[corner] = 1.0
        window = (there[rows][:, None] * there[columns]).to(picture)
        record, paths, _ = _recorded(model, picture * window)
        record.settle(paths)
        others = _wanted(record, paths, paths.main())
        both = list(zip(calls, others, strict=False))
        alike = next((n for n, (a, b) in enumerate(both) if a.name != b.name), len(both))
        moved = {n for n, (a, b) in enumerate(both[:alike]) if a.cells != b.cells}
        moved |= set(range(alike, len(calls)))
        if moved:
            return moved
    return set()


@dataclass
class _Call:
    """One call of a layer while it is being recorded."""

    name: str
    module: nn.Module
    output: Tensor
    edge: GradientEdge | None
    follows: str | None
    same: tuple[int, int]
    source: GradientEdge | None
    changes: dict[str, list[Tensor]] = field(default_factory=dict)
    responses: dict[str, Tensor] = field(default_factory=dict)
    cells: Cells | None = None
    open: bool = False

    def settle(
        self,
        places: dict[Vertex, Place],
        grids: dict[int, Cells | None],
        alone: int,
        first: _Call,
    ) -> None:
        """Opens the question of what the cells respond to, unless the graph answers it.

        Args:
            places: What is known of places.
            grids: The grids they make, as far as they were looked for.
            alone: Images in the pass.
            first: The first call with the same output, for which it is answered.
        """
        shape, vertex = self.output.shape, _vertex(self.edge)
        if vertex in places:
            position = places[vertex]
            if position.is_torn:
                return
            if id(position) not in grids:  # many layers leave it as it was
                grids[id(position)] = cells_of(position, alone)
            self.cells = grids[id(position)]
        wide = sum(side > 1 for side in shape) >= 2 + (alone > 1)
        known = self.cells is not None and self.cells.sure
        self.responses = first.responses
        self.open = len(shape) in (3, 4, 5) and wide and not known and first is self

    @property
    def layouts(self) -> tuple[str, ...]:
        """Those to be tried."""
        return LAYOUTS if self.cells is None else tuple({*LAYOUTS, self.cells.kind})


class _Record:
    """Listens to the pass with gradients."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.calls: list[_Call] = []
        self.leaves: list[Tensor] = []
        self.obstacles: list[str] = []
        self.choices = False
        self._makers: dict[int, str] = {}
        self._kept: dict[tuple[int, int], Tensor] = {}

    def listener(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """What to call after each call of one layer."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                self._add(name, module, args, tensor)

        return hook

    def before(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """What to call before each call of one layer: notes what no layer has returned."""

        def hook(module: nn.Module, args: Any, given: Tensor) -> None:
            if given.requires_grad and given.dim() > 2 and self._same(given) not in self._kept:
                self._add(name + INPUT, Input(), args, given)

        return hook

    def settle(self, paths: Paths) -> None:
        """Finds the grid of every output, or opens the question."""
        places = paths.places()
        grids: dict[int, Cells | None] = {}
        known: dict[tuple[int, int], _Call] = {}
        for call in self.calls:
            call.settle(places, grids, self.count, known.setdefault(call.same, call))

    def _add(self, name: str, module: nn.Module, args: Any, tensor: Tensor) -> None:
        edge = get_gradient_edge(tensor) if tensor.requires_grad else None
        same = self._same(tensor)
        if edge is None:
            self._note(name, tensor)
        if same not in self._kept:
            self._kept[same] = tensor.detach().clone()
        given = first_tensor(args)
        follows = self._makers.get(id(given))
        given = tensor if given is None else given
        source = get_gradient_edge(given) if given.requires_grad else None
        self.calls.append(_Call(name, module, self._kept[same], edge, follows, same, source))
        self._makers[id(tensor)] = name

    def _same(self, tensor: Tensor) -> tuple[int, int]:
        if tensor.requires_grad:
            edge = get_gradient_edge(tensor)
            return (id(edge.node), edge.output_nr)
        return (id(tensor), tensor._version if not tensor.is_inference() else 0)

    def _note(self, name: str, tensor: Tensor) -> None:
        if tensor.is_inference():
            self.obstacles.append(f"layer '{name}' runs under torch.inference_mode()")
        elif not torch.is_grad_enabled():
            self.obstacles.append(f"layer '{name}' runs under torch.no_grad()")
        else:
            self.obstacles.append(f"layer '{name}' gives an output that is detached")


def _runs(
    calls: Sequence[_Call],
    gradients: Sequence[Tensor | None],
    main: set[Vertex],
    moving: set[int],
) -> list[LayerRun]:
    names = [call.name for call in calls]
    times = {name: names.count(name) for name in set(names)}
    seen: dict[str, int] = {}
    runs = []
    both = zip(calls, gradients[: len(calls)], gradients[len(calls) :], strict=True)
    for position, (call, gradient, above) in enumerate(both):
        number = seen.get(call.name, 0)
        seen[call.name] = number + 1
        source = None
        if above is not None and call.source is not None:
            source = Source(above, call.source)
        runs.append(
            LayerRun(
                f"{call.name}@{number}" if times[call.name] > 1 else call.name,
                call.module,
                call.output,
                gradient,
                call.follows,
                call.same,
                _vertex(call.edge) in main,
                call.cells,
                call.edge,
                source,
                call.responses,
                position in moving,
            )
        )
    return runs


def _vertex(edge: GradientEdge | None) -> Vertex | None:
    return None if edge is None else (edge.node, edge.output_nr)


def _probe_gradients(
    embeddings: Tensor, edges: Sequence[GradientEdge | None]
) -> list[Tensor | None]:
    """Gradients of a fixed random projection; a plain sum could cancel on unit rows."""
    direction = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    tracked = {number: edge for number, edge in enumerate(edges) if edge is not None}
    gradients: list[Tensor | None] = [None] * len(edges)
    if embeddings.requires_grad and tracked:
        score = (embeddings * direction.to(embeddings))[:1].sum()
        values = torch.autograd.grad(
            score, list(tracked.values()), allow_unused=True, retain_graph=True
        )
        for number, value in zip(tracked, values, strict=True):
            gradients[number] = value
    return gradients


def _respond(model: Traceable, others: Tensor, calls: Sequence[_Call], alone: int) -> None:
    """Runs the other pictures and compares every output with those of all pictures."""
    size = model.pass_size(len(others), together=True)
    for start in range(0, len(others), size):
        chunk = others[start : start + size]
        count = len(chunk)
        if count < size:
            chunk = torch.cat((chunk, chunk[-1:].expand(size - count, *chunk.shape[1:])))
        waiting = list(reversed(calls))

        def compare(name: str, count: int = count, waiting: Any = waiting) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                tensor = first_tensor(output)
                passed = name.endswith(INPUT) and (not waiting or waiting[-1].name != name)
                if tensor is None or passed:
                    return
                call = waiting.pop() if waiting else None
                if call is not None and call.open and call.name == name:
                    for layout, change in _changes(call, tensor, alone, size):
                        parts = call.changes.setdefault(layout, [])
                        parts.append(change[:count])
                        if sum(map(len, parts)) == len(others):
                            call.responses[layout] = _shares(torch.cat(call.changes.pop(layout)))

            return hook

        names = [*_names(model), *{c.name for c in calls if c.name.endswith(INPUT)}]
        listeners = {name: compare(name) for name in names}
        with listening(model.network, listeners), torch.no_grad():
            model.embed(chunk.clone())


def _changes(call: _Call, after: Tensor, alone: int, size: int) -> list[tuple[str, Tensor]]:
    """By layout how far each position is from the first picture's ``(size,C,...positions)``."""
    changes, before = [], call.output
    for layout in call.layouts:
        images, channels = layout.index("N"), layout.index("C")
        if before.dim() != len(layout) or after.dim() != len(layout):
            continue
        expected = list(before.shape)
        if expected[images] != alone or after.shape[images] != size:
            continue
        expected[images] = size
        if list(after.shape) != expected:
            continue
        change = after.float() - before.narrow(images, 0, 1).float()
        changes.append((layout, change.movedim((images, channels), (0, 1))))
    return changes


def _shares(changes: Tensor) -> Tensor:
    """How much each position changes when each part is replaced ``(K,...positions)``.

    No picture is without a replaced part: that would be a pass more. Where a change by one part is
    orthogonal to that by another, the square of one picture's distance from the mean of all ``K``
    is ``r (1 - 2/K) + R / K^2`` for squared changes ``r`` of its part and ``R`` of all parts.

    Args:
        changes: From the first picture to each of the others ``(K-1,C,...positions)``.
    """
    count = len(changes) + 1
    apart = torch.cat((torch.zeros_like(changes[:1]), changes))
    apart = (apart - apart.mean(dim=0)).square().sum(dim=1)
    every = apart.sum(dim=0) / (1 - 1 / count)
    return (apart - every / count**2) / (1 - 2 / count)


def gradient_through(run: LayerRun, lower: LayerRun | Source) -> Tensor | None:
    """The part of the gradient at something lower that comes to it through a layer above."""
    if run.edge is None or lower.edge is None or run.gradient is None:
        return None
    (gradient,) = torch.autograd.grad(
        [run.edge], [lower.edge], [run.gradient], retain_graph=True, allow_unused=True
    )
    result: Tensor | None = gradient
    return result


def swapped(
    model: Traceable,
    pictures: Tensor,
    layer: str,
    axis: int,
    mix: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Embeddings ``(2,E)`` of the first picture with a layer of the second, and of the second.

    Args:
        model: The model; it is evaluated with every submodule in eval mode.
        pictures: Two images ``(2,C,H,W)``.
        layer: Its name, with ``@call`` where it runs more than once.
        axis: The axis of images in the layer's output.
        mix: From the outputs for the first and the second to what the layer shall give.
    """
    name, call = split_call(layer)
    size = model.pass_size(2, together=True)
    kept: list[Tensor] = []
    rows: list[Tensor] = []
    for order in ((1,), (0,)) if size == 1 else ((0, *[1] * (size - 1)),):
        seen: list[int] = []

        def exchange(module: nn.Module, args: Any, output: Any, seen: list[int] = seen) -> Any:
            seen.append(1)
            tensor = first_tensor(output)
            if tensor is None or (call is not None and len(seen) != call + 1):
                return None
            if size == 1:
                kept.append(tensor)
                return with_first(output, mix(tensor, kept[0])) if len(kept) == 2 else None
            own, other = tensor.narrow(axis, 0, 1), tensor.narrow(axis, 1, 1)
            rest = tensor.narrow(axis, 1, size - 1)
            return with_first(output, torch.cat((mix(own, other), rest), dim=axis))

        with (
            torch.inference_mode(mode=False),
            listening(model.network, {name: exchange}),
            preserve_state(model.network),
            torch.no_grad(),
        ):
            rows.append(model.embed(pictures[list(order)]))
    return torch.cat((rows[1], rows[0])) if size == 1 else rows[0][:2]
