"""What the autograd graph of one forward pass states exactly: what everything passes, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

T = TypeVar("T")
Vertex = tuple[Any, int]
"""A node of the autograd graph and which of its outputs."""

_CELLWISE = {
    "Relu", "LeakyRelu", "RreluWithNoise", "Hardtanh", "Hardswish", "Hardsigmoid", "Silu", "Mish",
    "Gelu", "Elu", "Selu", "Celu", "PreluKernel", "Sigmoid", "Tanh", "Softplus", "LogSigmoid",
    "Threshold", "Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Rsqrt", "Abs", "Exp",
    "Log", "Clamp", "ClampMin", "ClampMax", "Where", "Maximum", "Minimum", "Addcmul", "Addcdiv",
    "Lerp", "Clone", "ToCopy", "Alias", "Expand", "Cat", "NativeBatchNorm", "CudnnBatchNorm",
    "MiopenBatchNorm", "NativeGroupNorm", "NativeDropout", "View", "UnsafeView", "ReshapeAlias",
    "Unsqueeze", "Squeeze", "torch::autograd::CopySlices",
}  # fmt: skip
"""Operations that leave every number in its cell; their two last axes must stay as they were."""

_FAR_OFF = 0.55
"""A padded convolution of stride 2 puts its cells half a cell off the middle of their pixels."""

_RIM = 0.1
"""The share of a cell from which on pixels that no cell sees are left without heat."""

Pair = tuple[float, float]


@dataclass(frozen=True)
class Place:
    """Where the cells of a map lie, in pixels of the image: the first centre and the step.

    Attributes:
        start: ``(vertical, horizontal)``.
        step: Likewise.
        reach: How far from its centre a cell sees.
        first: Where the pixels begin that any cell sees.
        last: Where they end.
    """

    start: Pair
    step: Pair
    reach: Pair
    first: Pair
    last: Pair

    def moved(
        self, start: Sequence[float], step: Sequence[float], reach: Sequence[float] = (0, 0)
    ) -> Place:
        """The place of a map whose cells start at, are apart and see on by so many of these."""
        return replace(
            self,
            start=(
                self.start[0] + start[0] * self.step[0],
                self.start[1] + start[1] * self.step[1],
            ),
            step=(self.step[0] * step[0], self.step[1] * step[1]),
            reach=(
                self.reach[0] + reach[0] * self.step[0],
                self.reach[1] + reach[1] * self.step[1],
            ),
        )

    def seeing(self, grid: Sequence[int]) -> Place:
        """The same with what a grid of so many cells sees of what went in, which may be less."""
        first, last = [], []
        for axis, cells in enumerate(grid):
            start, reach = self.start[axis], self.reach[axis]
            first.append(max(self.first[axis], start - reach))
            last.append(min(self.last[axis], start + (cells - 1) * self.step[axis] + reach))
        return replace(self, first=_two(first), last=_two(last))

    def joined(self, other: Place) -> Place:
        """The same where each cell also sees what that of another map sees."""
        reach = [
            max(own, its + abs(here - there))
            for own, its, here, there in zip(
                self.reach, other.reach, self.start, other.start, strict=True
            )
        ]
        first = [min(pair) for pair in zip(self.first, other.first, strict=True)]
        last = [max(pair) for pair in zip(self.last, other.last, strict=True)]
        return replace(self, reach=_two(reach), first=_two(first), last=_two(last))

    def region(self, grid: Sequence[int], size: Sequence[int]) -> tuple[float, float, float, float]:
        """Top, left, bottom and right of the cells as shares of the image."""
        top_left, bottom_right = [], []
        for start, step, cells, side in zip(self.start, self.step, grid, size, strict=True):
            top_left.append(round((start - step / 2) / side, 4))
            bottom_right.append(round((start + (cells - 0.5) * step) / side, 4))
        return top_left[0], top_left[1], bottom_right[0], bottom_right[1]

    def is_off(self, grid: Sequence[int], size: Sequence[int]) -> bool:
        """Whether cells stretched over the image would lie far from where they are.

        Nor may they reach over a rim that none of them sees, which patches leave that do not
        divide the image.
        """
        # Only where nothing is padded: a first cell that reaches out has its place by the image.
        if any(
            start >= reach - 1e-6 and max(low, side - high) > _RIM * abs(step)
            for start, reach, low, high, step, side in zip(
                self.start, self.reach, self.first, self.last, self.step, size, strict=True
            )
        ):
            return True
        return any(
            abs(start + cell * step - (cell + 0.5) * side / cells) > _FAR_OFF * abs(step)
            for start, step, cells, side in zip(self.start, self.step, grid, size, strict=True)
            for cell in (0, cells - 1)
        )


class Paths:
    """The graph from an embedding down to the picture, read once."""

    def __init__(self, embeddings: Tensor, picture: Tensor, leaves: Sequence[Tensor] = ()) -> None:
        """Reads the graph.

        Args:
            embeddings: The result of the pass.
            picture: The leaf tensor that the network was given.
            leaves: Further tensors at which the graph of the picture's content begins.
        """
        self._order: list[Vertex] = []
        self._root = get_gradient_edge(picture).node
        self._ends = {self._root, *(get_gradient_edge(leaf).node for leaf in leaves)}
        if embeddings.requires_grad:
            start = get_gradient_edge(embeddings)
            self._order = _in_order((start.node, start.output_nr))

    def main(self) -> set[Vertex]:
        """The vertices on every way from the embedding to the picture.

        In a topological order a vertex lies on all ways just when no edge from before it leads
        past it.
        """
        reaching: set[Vertex] = set()
        for vertex in self._order:
            if vertex[0] in self._ends or any(after in reaching for after in _next(vertex)):
                reaching.add(vertex)
        ordered = [vertex for vertex in reversed(self._order) if vertex in reaching]
        number = {vertex: place for place, vertex in enumerate(ordered)}
        passed, far = set(), 0
        for place, vertex in enumerate(ordered):
            if far <= place:
                passed.add(vertex)
            beyond = [number[after] for after in _next(vertex) if after in number]
            far = max([far, *beyond, len(ordered) if vertex[0] in self._ends else 0])
        return passed

    def places(self) -> dict[Vertex, Place]:
        """Where the cells of the two last axes lie, for all that local operations made."""
        found: dict[Vertex, Place] = {}
        for vertex in self._order:
            node = vertex[0]
            if node is self._root:
                rows, columns = _shape(vertex)[-2:]
                half = (0.5, 0.5)
                found[vertex] = Place(half, (1.0, 1.0), half, (0.0, 0.0), (rows, columns))
                continue
            before = [after for after in _next(vertex) if after in found]
            if not before:
                continue
            source = max(before, key=lambda after: _cells(after))
            joined = found[source]
            for other in before:
                if _shape(other)[-2:] == _shape(source)[-2:]:
                    joined = joined.joined(found[other])
            place = _placed(vertex, source, joined)
            if place is not None:
                found[vertex] = place.seeing(_shape(vertex)[-2:])
        return found


def _next(vertex: Vertex) -> list[Vertex]:
    return [(node, nr) for node, nr in vertex[0].next_functions if node is not None]


def _in_order(start: Vertex) -> list[Vertex]:
    """All vertices that can be reached, each after those that it leads to."""
    order: list[Vertex] = []
    seen = {start}
    stack = [(start, iter(_next(start)))]
    while stack:
        vertex, ahead = stack[-1]
        following = next((after for after in ahead if after not in seen), None)
        if following is None:
            order.append(vertex)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(_next(following))))
    return order


def _shape(vertex: Vertex) -> tuple[int, ...]:
    """The shape of what a vertex gave."""
    node, number = vertex
    if hasattr(node, "variable"):
        return tuple(int(side) for side in node.variable.shape)
    return tuple(int(side) for side in node._input_metadata[number].shape)


def _cells(vertex: Vertex) -> int:
    shape = _shape(vertex)
    return shape[-1] * shape[-2] if len(shape) > 1 else 0


def _placed(vertex: Vertex, source: Vertex, place: Place) -> Place | None:
    """The place of what an operation made of a placed map, or None where it is not local."""
    node = vertex[0]
    kind = node.name().partition("Backward")[0]
    before, after = _shape(source), _shape(vertex)
    if len(before) < 3 or len(after) < 3:
        return None
    if kind in _CELLWISE:
        return place if before[-2:] == after[-2:] else None
    rule = _RULES.get(kind)
    return rule(node, place, before, after, vertex[1]) if rule else None


Rule = Callable[[Any, Place, tuple[int, ...], tuple[int, ...], int], "Place | None"]


def _axis(number: int, axes: int) -> int:
    """A number counted from the front; autograd keeps negative ones as unsigned numbers."""
    number = number - (1 << 64) if number >= 1 << 63 else number
    return number + axes if number < 0 else number


def _convolved(node: Any, place: Place, before: Any, after: Any, _: int) -> Place | None:
    kernel = tuple(node._saved_weight.shape[2:])
    stride, padding, dilation = node._saved_stride, node._saved_padding, node._saved_dilation
    if len(kernel) != 2:
        return None
    stride, padding, dilation = (_two(v) for v in (stride, padding, dilation))
    reach = [d * (k - 1) / 2 for k, d in zip(kernel, dilation, strict=True)]
    start = [r - p for r, p in zip(reach, padding, strict=True)]
    if node._saved_transposed:
        step = [1 / s for s in stride]
        return place.moved([r * s for r, s in zip(start, step, strict=True)], step, reach)
    return place.moved(start, stride, reach)


def _pooled(node: Any, place: Place, before: Any, after: Any, _: int) -> Place | None:
    kernel = _two(node._saved_kernel_size)
    stride = _two(node._saved_stride or kernel)
    padding = _two(node._saved_padding)
    dilation = _two(getattr(node, "_saved_dilation", (1, 1)))
    reach = [d * (k - 1) / 2 for k, d in zip(kernel, dilation, strict=True)]
    start = [r - p for r, p in zip(reach, padding, strict=True)]
    return place.moved(start, stride, reach)


def _resized(node: Any, place: Place, before: Any, after: Any, _: int) -> Place | None:
    step = [b / a for b, a in zip(before[-2:], after[-2:], strict=True)]
    return place.moved([(s - 1) / 2 for s in step], step, [max(s, 1) for s in step])


def _padded(node: Any, place: Place, before: Any, after: Any, _: int) -> Place | None:
    pad = list(getattr(node, "_saved_pad", None) or node._saved_padding)
    pad += [0] * (4 - len(pad))
    return place.moved((-pad[2], -pad[0]), (1, 1))


def _sliced(node: Any, place: Place, before: Any, after: Any, _: int) -> Place | None:
    axis = _axis(node._saved_dim, len(before)) - len(before)
    start = _axis(node._saved_start or 0, before[axis])
    return _shifted(place, axis, start, node._saved_step)


def _split(node: Any, place: Place, before: Any, after: Any, number: int) -> Place | None:
    axis = _axis(node._saved_dim, len(before)) - len(before)
    sizes = getattr(node, "_saved_split_sizes", None)
    start = sum(sizes[:number]) if sizes else number * getattr(node, "_saved_split_size", 0)
    return _shifted(place, axis, start, 1)


def _shifted(place: Place, axis: int, start: float, step: float) -> Place:
    """The place after some cells of an axis, counted from the end, were left out."""
    if axis == -2:
        return place.moved((start, 0), (step, 1))
    return place.moved((0, start), (1, step)) if axis == -1 else place


def _transposed(node: Any, place: Place, before: Any, after: Any, _: int) -> Place | None:
    axes = {_axis(node._saved_dim0, len(before)), _axis(node._saved_dim1, len(before))}
    return place if max(axes) < len(before) - 2 else None


def _permuted(node: Any, place: Place, before: Any, after: Any, _: int) -> Place | None:
    last = [_axis(axis % (1 << 64), len(before)) for axis in node._saved_dims][-2:]
    return place if last == [len(before) - 2, len(before) - 1] else None


def _strided(node: Any, place: Place, before: Any, after: Any, _: int) -> Place | None:
    """A view of whole channels, which autograd makes of a slice that was changed in place."""
    rows, columns = before[-2:]
    whole = tuple(node._saved_stride[-2:]) == (columns, 1) and after[-2:] == (rows, columns)
    return place if whole and (node._saved_storage_offset or 0) % (rows * columns) == 0 else None


def _two(values: Sequence[T]) -> tuple[T, T]:
    return (values[0], values[-1])


_RULES: dict[str, Rule] = {
    "Convolution": _convolved,
    "MaxPool2DWithIndices": _pooled,
    "AvgPool2D": _pooled,
    "AdaptiveAvgPool2D": _resized,
    "AdaptiveMaxPool2D": _resized,
    "UpsampleNearest2D": _resized,
    "UpsampleNearestExact2D": _resized,
    "UpsampleBilinear2D": _resized,
    "UpsampleBicubic2D": _resized,
    "ConstantPadNd": _padded,
    "ReflectionPad2D": _padded,
    "ReplicationPad2D": _padded,
    "Slice": _sliced,
    "Split": _split,
    "SplitWithSizes": _split,
    "UnsafeSplit": _split,
    "Transpose": _transposed,
    "Permute": _permuted,
    "AsStrided": _strided,
}
