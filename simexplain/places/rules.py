"""What each operation of the autograd graph does to the places of what it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simexplain.places.spans import Array, Place, Shape, Span, combined, joined_along

_CELLWISE = {
    "Relu", "LeakyRelu", "RreluWithNoise", "Hardtanh", "Hardswish", "Hardsigmoid", "Silu", "Mish",
    "Gelu", "Elu", "Selu", "Celu", "PreluKernel", "Sigmoid", "Tanh", "Softplus", "LogSigmoid",
    "Threshold", "Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Rsqrt", "Abs", "Exp",
    "Log", "Log1P", "Expm1", "Erf", "Sin", "Cos", "Reciprocal", "Sgn", "Softmax", "LogSoftmax",
    "Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum", "Addcmul", "Addcdiv", "Lerp",
    "MaskedFill", "NanToNum", "Clone", "ToCopy", "Alias", "Copy", "NativeBatchNorm",
    "CudnnBatchNorm", "MiopenBatchNorm", "NativeGroupNorm", "NativeLayerNorm", "FusedRmsNorm",
    "NativeDropout", "FakeQuantizePerTensorAffineCachemask", "ChannelShuffle", "Expand",
}  # fmt: skip
"""Operations that leave every number in its cell."""

_REDUCED = {
    "Mean", "Sum", "Amax", "Amin", "Max", "Min", "Logsumexp", "LinalgVectorNorm", "Norm", "Std",
    "Var", "VarMean", "StdMean", "Prod", "Median",
}  # fmt: skip
"""Operations that make one number of those along some axes."""

Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """One operation of the graph.

    Attributes:
        node: Of the autograd graph.
        number: Which of its outputs.
        shape: Of that.
        given: By the number of an input its place, where it has one.
        shapes: Those of all inputs; None of one that has no gradient.
    """

    node: Any
    number: int
    shape: Shape
    given: dict[int, Place]
    shapes: tuple[Shape | None, ...]

    @property
    def place(self) -> Place:
        """That of the first input with one."""
        return next(iter(self.given.values()))

    @property
    def kind(self) -> str:
        """Its name, such as ``Convolution``."""
        name: str = self.node.name()
        return name.rpartition("::")[2].partition("Backward")[0]


def placed(step: Step) -> Place | None:
    """The place of what an operation makes of placed tensors, or None where it is not local."""
    kind = step.kind
    if kind in _CELLWISE:
        return combined(list(step.given.values()), step.shape)
    if kind in _REDUCED:
        return _reduced(step)
    if kind.startswith("ScaledDotProduct"):
        return _attended(step)
    if rule := _RULES.get(kind):
        return rule(step)
    if len(step.given) == 1 and step.place.shape == step.shape:  # a custom function
        return replace(step.place, sure=False)
    return None


def _axis(number: int, axes: int) -> int:
    """A number counted from the front; autograd keeps negative ones as unsigned numbers."""
    number = _signed(number)
    return number + axes if number < 0 else number


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _two(values: Sequence[int], count: int) -> list[int]:
    return [int(value) for value in values] if len(values) == count else [int(values[0])] * count


def _reduced(step: Step) -> Place | None:
    position, axes = step.place, len(step.place.shape)
    dims = getattr(step.node, "_saved_dim", None)
    if dims is None:
        return None
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    away = [_axis(dim, axes) for dim in dims] or list(range(axes))
    kept = [1 if axis in away else side for axis, side in enumerate(position.shape)]
    result = position.reduced(away, kept)
    return result if result is None or len(step.shape) == axes else result.viewed(step.shape)


def _viewed(step: Step) -> Place | None:
    return step.place.viewed(step.shape)


def _permuted(step: Step) -> Place:
    order = [_axis(dim, len(step.shape)) for dim in step.node._saved_dims]
    return step.place.each(lambda array: array.transpose(order), step.shape)


def _transposed(step: Step) -> Place:
    node, axes = step.node, len(step.shape)
    first, second = (
        (_axis(node._saved_dim0, axes), _axis(node._saved_dim1, axes))
        if hasattr(node, "_saved_dim0")
        else (0, axes - 1)
    )
    return step.place.each(lambda array: array.swapaxes(first, second), step.shape)


def _taken(step: Step, axis: int, which: Whole | int) -> Place:
    """Some of the numbers along an axis, or a single one without the axis."""

    def taken(array: Array) -> Array:
        if array.shape[axis] == 1 and isinstance(which, np.ndarray):
            return array
        result: Array = array.take(0 if array.shape[axis] == 1 else which, axis)
        return result

    return step.place.each(taken, step.shape)


def _sliced(step: Step) -> Place:
    axis = _axis(step.node._saved_dim, len(step.shape))
    size = step.place.shape[axis]
    start = min(_axis(step.node._saved_start or 0, size), size)
    which = start + step.node._saved_step * np.arange(step.shape[axis])
    return _taken(step, axis, which)


def _split(step: Step) -> Place:
    axis = _axis(step.node._saved_dim, len(step.shape))
    sizes = getattr(step.node, "_saved_split_sizes", None)
    each = getattr(step.node, "_saved_split_size", 0)
    start = sum(sizes[: step.number]) if sizes else step.number * each
    return _taken(step, axis, start + np.arange(step.shape[axis]))


def _selected(step: Step) -> Place:
    axis = _axis(step.node._saved_dim, len(step.place.shape))
    index = _axis(getattr(step.node, "_saved_index", step.number), step.place.shape[axis])
    return _taken(step, axis, index)


def _flipped(step: Step) -> Place:
    axes = [_axis(dim, len(step.shape)) for dim in step.node._saved_dims]
    return step.place.each(lambda array: np.flip(array, tuple(axes)), step.shape)


def _turned(step: Step) -> Place:
    first, second = (_axis(dim, len(step.shape)) for dim in step.node._saved_dims)
    times = _signed(step.node._saved_k)
    return step.place.each(lambda array: np.rot90(array, times, (first, second)), step.shape)


def _rolled(step: Step) -> Place | None:
    dims = [_axis(dim, len(step.shape)) for dim in step.node._saved_dims]
    shifts = [_signed(shift) for shift in step.node._saved_shifts]
    if not dims:
        return None
    return step.place.each(lambda array: np.roll(array, shifts, dims), step.shape)


def _index(tensor: Any) -> Whole:
    result: Whole = tensor.detach().cpu().numpy()
    return result


def _indexed(step: Step) -> Place | None:
    """Numbers by an index, which may have been computed from the image."""
    indices = [None if index is None else _index(index) for index in step.node._saved_indices]
    position = step.place.dense([axis for axis, index in enumerate(indices) if index is not None])
    if position is None:
        return None
    at = tuple(slice(None) if index is None else index for index in indices)
    return replace(position.each(lambda array: array[at], step.shape), sure=False)


def _chosen(step: Step) -> Place:
    axis = _axis(step.node._saved_dim, len(step.shape))
    return replace(_taken(step, axis, _index(step.node._saved_index)), sure=False)


def _collected(step: Step) -> Place | None:
    axis, index = _axis(step.node._saved_dim, len(step.shape)), _index(step.node._saved_index)
    still = [number for number in range(index.ndim) if number != axis]
    for number in still:
        if index.shape[number] > 1 and bool((index == index.take([0], number)).all()):
            index = index.take([0], number)
    position = step.place.dense([n for n in range(index.ndim) if n == axis or index.shape[n] > 1])
    if position is None:
        return None

    def collected(array: Array) -> Array:
        cut = [slice(None)] * array.ndim
        for number in still:
            cut[number] = slice(step.shape[number])
        wide = [
            array.shape[number] if number != axis and index.shape[number] == 1 else side
            for number, side in enumerate(index.shape)
        ]
        return np.take_along_axis(array[tuple(cut)], np.broadcast_to(index, wide), axis)

    return replace(position.each(collected, step.shape), sure=False)


def _chained(step: Step) -> Place | None:
    """Tensors joined along an axis; of at most one the length may be unknown."""
    axis = _axis(step.node._saved_dim, len(step.shape))
    sizes = [None if shape is None else shape[axis] for shape in step.shapes]
    rest = step.shape[axis] - sum(size for size in sizes if size is not None)
    if sizes.count(None) > 1:
        gaps = [number for number, size in enumerate(sizes) if size is None]
        if gaps != list(range(gaps[0], gaps[-1] + 1)):
            return None
        sizes = [s for n, s in enumerate(sizes) if n not in gaps[1:]]
        given = {n - (n > gaps[0]) * (len(gaps) - 1): p for n, p in step.given.items()}
    else:
        given = step.given
    parts = [(rest if s is None else s, given.get(n)) for n, s in enumerate(sizes)]
    return joined_along(axis, parts, step.shape)


def _stacked(step: Step) -> Place | None:
    axis = _axis(step.node._saved_dim, len(step.shape))
    shape = [1 if number == axis else side for number, side in enumerate(step.shape)]
    parts = [
        (1, step.given[number].viewed(shape) if number in step.given else None)
        for number in range(step.shape[axis])
    ]
    return joined_along(axis, parts, step.shape)


def _repeated(step: Step) -> Place:
    repeats = [int(times) for times in step.node._saved_repeats]
    missing = len(repeats) - len(step.place.shape)
    position = combined([step.place], [1] * missing + [*step.place.shape])

    def repeated(array: Array) -> Array:
        return np.tile(
            array, [t if side > 1 else 1 for t, side in zip(repeats, array.shape, strict=True)]
        )

    return position.each(repeated, step.shape)


def _windows(count: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[Any, Any]:
    """The middles and the numbers of windows, as ``Span.windowed`` takes them."""
    begins = np.arange(count) * stride - padding
    taps = begins[:, None] + np.arange(kernel) * dilation
    return begins + dilation * (kernel - 1) / 2, taps


def _spread(low: Array | Whole, high: Array | Whole) -> Whole:
    """Numbers of windows from one to another, all as long as the longest."""
    first, last = low.astype(np.int64), high.astype(np.int64)
    reach = np.arange(max(1, int((last - first).max(initial=0)) + 1))
    result: Whole = np.minimum(first[:, None] + reach, np.maximum(first, last)[:, None])
    return result


def _convolved(step: Step) -> Place | None:
    if 0 not in step.given:
        return None
    node, position = step.node, step.given[0]
    weight = node._saved_weight.shape
    sides = len(weight) - 2
    stride, padding, dilation = (
        _two(values, sides)
        for values in (node._saved_stride, node._saved_padding, node._saved_dilation)
    )
    mixed = position
    if position.varies(1) and not (node._saved_groups == position.shape[1] == step.shape[1]):
        result = position.reduced(
            [1], [1 if n == 1 else side for n, side in enumerate(position.shape)]
        )
        if result is None:
            return None
        mixed = result
    for axis, kernel, s, p, d in zip(
        range(-sides, 0), weight[2:], stride, padding, dilation, strict=True
    ):
        count = step.shape[axis]
        if node._saved_transposed:
            reach = d * (kernel - 1)
            ends = np.arange(count) + p
            middle = (ends - reach / 2) / s
            taps = _spread(np.ceil((ends - reach) / s), np.floor(ends / s))
        else:
            middle, taps = _windows(count, kernel, s, p, d)
        mixed = mixed.windowed(axis + len(step.shape), middle, taps)
    return replace(mixed, shape=step.shape)


def _pooled(step: Step) -> Place:
    node, position = step.node, step.place
    sides = len(node._saved_kernel_size)
    sides = max(sides, 2)
    kernel = _two(node._saved_kernel_size, sides)
    stride = _two(node._saved_stride or kernel, sides)
    padding = _two(node._saved_padding, sides)
    dilation = _two(getattr(node, "_saved_dilation", (1,)), sides)
    for axis, k, s, p, d in zip(range(-sides, 0), kernel, stride, padding, dilation, strict=True):
        middle, taps = _windows(step.shape[axis], k, s, p, d)
        position = position.windowed(axis + len(step.shape), middle, taps)
    return position


def _adaptive(step: Step) -> Place:
    position, axes = step.place, len(step.shape)
    for axis in (axes - 2, axes - 1):
        count, size = step.shape[axis], position.shape[axis]
        first = np.arange(count) * size // count
        last = -(-(np.arange(count) + 1) * size // count) - 1
        position = position.windowed(axis, (first + last) / 2, _spread(first, last))
    return position


def _resized(step: Step) -> Place:
    position, axes = step.place, len(step.shape)
    for axis in (axes - 2, axes - 1):
        count, size = step.shape[axis], position.shape[axis]
        if getattr(step.node, "_saved_align_corners", False):
            middle = np.arange(count) * (size - 1) / max(count - 1, 1)
        else:
            middle = (np.arange(count) + 0.5) * size / count - 0.5
        low, high = (how(middle).clip(0, size - 1) for how in (np.floor, np.ceil))
        position = position.windowed(axis, middle, _spread(low, high))
    return position


def _padded(step: Step) -> Place:
    position = step.place
    pad = getattr(step.node, "_saved_pad", None) or step.node._saved_padding
    pad = [_signed(side) for side in pad]
    for number in range(len(pad) // 2):
        axis = len(step.shape) - 1 - number
        middle = np.arange(step.shape[axis]) - pad[2 * number]
        position = position.windowed(axis, middle.astype(np.float64), middle[:, None])
    return position


def _unfolded(step: Step) -> Place:
    """Windows along an axis, with an axis for what is inside of one at the end."""
    axis = _axis(step.node._saved_dimension, len(step.place.shape))
    count, size = step.shape[axis], step.shape[-1]
    _, taps = _windows(count, size, step.node._saved_step, 0, 1)

    def unfolded(array: Array) -> Array:
        if array.shape[axis] == 1:
            return array[..., None]
        return np.moveaxis(array.take(taps, axis), axis + 1, -1)

    return step.place.each(unfolded, step.shape)


def _columns(step: Step) -> Place | None:
    """Patches ``(N,C*k*k,L)`` of a map; numbers of one patch get the place of its middle."""
    node, position = step.node, step.place
    sides = position.shape[-2:]
    counts, lists = [], []
    for values in zip(
        sides,
        _two(node._saved_kernel_size, 2),
        _two(node._saved_stride, 2),
        _two(node._saved_padding, 2),
        _two(node._saved_dilation, 2),
        strict=True,
    ):
        side, kernel, stride, padding, dilation = values
        counts.append((side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
        lists.append(_windows(counts[-1], kernel, stride, padding, dilation))
    axes = len(position.shape)
    shape = [*position.shape[:-2], *counts]
    for axis, (middle, taps) in zip((axes - 2, axes - 1), lists, strict=True):
        position = position.windowed(axis, middle, taps)
    if position.varies(axes - 3):
        return None
    position = replace(position, shape=tuple(shape))
    result = position.viewed([*shape[:-2], counts[0] * counts[1]])
    return None if result is None else replace(result, shape=step.shape)


def _shuffled(step: Step) -> Place:
    """Channels laid out as finer cells."""
    position, axes = step.place, len(step.shape)
    times = step.node._saved_upscale_factor
    if position.varies(axes - 3):
        position = position.spans(lambda span: span.reduced([axes - 3]), position.shape)
    for axis in (axes - 2, axes - 1):
        finer = np.arange(step.shape[axis])
        position = position.windowed(axis, (finer + 0.5) / times - 0.5, finer[:, None] // times)
    return replace(position, shape=step.shape)


def _unshuffled(step: Step) -> Place:
    position, axes = step.place, len(step.shape)
    times = step.node._saved_downscale_factor
    for axis in (axes - 2, axes - 1):
        position = position.windowed(axis, *_windows(step.shape[axis], times, times, 0, 1))
    if position.varies(axes - 3):
        position = position.spans(lambda span: span.reduced([axes - 3]), position.shape)
    return replace(position, shape=step.shape)


def _multiplied(step: Step) -> Place | None:
    """A product of matrices: what is summed over is seen by every number of the result.

    A product of two placed ones is attention or the like: its rows lie where those of the first
    matrix do, which no image need bear out.
    """
    first = 1 if step.kind in ("Addmm", "Baddbmm") else 0
    factors = []
    for number, position in step.given.items():
        axes = len(position.shape)
        if number == first:
            kept = (*position.shape[:-1], 1)
            factors.append(position.reduced([axes - 1], kept))
        elif number == first + 1:
            kept = (*position.shape[:-2], 1, position.shape[-1])
            factors.append(position.reduced([axes - 2], kept))
    left = [replace(position, shape=step.shape) for position in factors if position is not None]
    if not left:
        return None
    wide = [position for position in left if position.cells > 1]
    if len(wide) > 1:
        return replace(wide[0], sure=False)
    return replace((wide or left)[0], sure=(wide or left)[0].sure and len(factors) == 1)


def _attended(step: Step) -> Place | None:
    """Attention gives its results where its queries are, which no image need bear out."""
    query = step.given.get(0)
    if query is None or step.number:
        return None
    if query.varies(len(query.shape) - 1):
        result = query.reduced([len(query.shape) - 1], (*query.shape[:-1], 1))
        if result is None:
            return None
        query = result
    return replace(query, shape=step.shape, sure=False)


def _picked(step: Step) -> Place:
    """Numbers of one tensor here and of another there, by what may depend on the image."""
    both = [step.given[number] for number in (0, 1) if number in step.given]
    condition = step.node._saved_condition
    places = [combined([position], step.shape) for position in both]
    if len(both) < 2 or not places[0].contradicts(places[1]) or not places[1].cells:
        return combined(both, step.shape)
    which = _index(condition.reshape((1,) * (len(step.shape) - condition.dim()) + condition.shape))
    spans = [
        Span(
            np.where(which, own.centre, its.centre),
            np.where(which, own.low, its.low),
            np.where(which, own.high, its.high),
            own.padded or its.padded,
        )
        for own, its in (
            (places[0].rows, places[1].rows),
            (places[0].columns, places[1].columns),
        )
    ]
    return Place(step.shape, spans[0], spans[1], sure=False)


def _halved(step: Step) -> Place:
    axis = _axis(step.node._saved_dim, len(step.shape))
    return _taken(step, axis, np.arange(step.shape[axis]))


def _strided(step: Step) -> Place | None:
    """A view of whole channels, which autograd makes of a slice that was changed in place."""
    before, after = step.place.shape, step.shape
    rows, columns = before[-2:]
    whole = tuple(step.node._saved_stride[-2:]) == (columns, 1) and after[-2:] == (rows, columns)
    whole = whole and (step.node._saved_storage_offset or 0) % (rows * columns) == 0
    return replace(step.place, shape=after) if whole and len(after) == len(before) else None


def _copied(step: Step) -> Place | None:
    """A tensor part of which was overwritten; the graph's own backward step has which part."""
    if len(step.node.next_functions) < 2 or set(step.given) == {0}:
        return combined([step.given[0]], step.shape) if 0 in step.given else None
    count = int(np.prod(step.shape))
    meta = step.node._input_metadata[0]
    if count > 1 << 20 or meta.dtype not in (torch.float32, torch.float64):
        return None
    codes = torch.arange(1, count + 1, dtype=meta.dtype, device=meta.device).view(step.shape)
    spans: list[Span] = []
    parts = []
    for number, seen in enumerate(step.node(codes)):
        if number in step.given and seen is not None:
            position = step.given[number].dense(range(len(seen.shape)))
            if position is None:
                return None
            parts.append((position, _index(seen.round().long()).ravel() - 1))
    for name in ("rows", "columns"):
        arrays = [np.full(count, empty) for empty in (np.nan, np.inf, -np.inf)]
        for position, there in reversed(parts):  # the first is what was there before
            span: Span = getattr(position, name)
            for array, own in zip(arrays, (span.centre, span.low, span.high), strict=True):
                array[there[there >= 0]] = own.ravel()[there >= 0]
        centre, low, high = (array.reshape(step.shape) for array in arrays)
        spans.append(Span(centre, low, high, span.padded))
    sure = all(position.sure for position, _ in parts)
    return Place(step.shape, spans[0], spans[1], sure).viewed(step.shape)


_RULES: dict[str, Callable[[Step], Place | None]] = {
    "View": _viewed, "UnsafeView": _viewed, "ReshapeAlias": _viewed, "Unsqueeze": _viewed,
    "Squeeze": _viewed, "Permute": _permuted, "Transpose": _transposed, "T": _transposed,
    "Slice": _sliced, "Split": _split, "SplitWithSizes": _split, "UnsafeSplit": _split,
    "Select": _selected, "Unbind": _selected, "Flip": _flipped, "Rot90": _turned, "Roll": _rolled,
    "Index": _indexed, "IndexSelect": _chosen, "Gather": _collected, "Cat": _chained,
    "Stack": _stacked, "Repeat": _repeated, "Convolution": _convolved,
    "MaxPool2DWithIndices": _pooled, "AvgPool2D": _pooled, "AdaptiveAvgPool2D": _adaptive,
    "AdaptiveMaxPool2D": _adaptive, "UpsampleNearest2D": _resized,
    "UpsampleNearestExact2D": _resized, "UpsampleBilinear2D": _resized,
    "UpsampleBicubic2D": _resized, "UpsampleBilinear2DAa": _resized,
    "UpsampleBicubic2DAa": _resized, "ConstantPadNd": _padded, "ReflectionPad1D": _padded,
    "ReflectionPad2D": _padded, "ReplicationPad1D": _padded, "ReplicationPad2D": _padded,
    "Unfold": _unfolded, "Im2Col": _columns, "PixelShuffle": _shuffled,
    "PixelUnshuffle": _unshuffled, "Mm": _multiplied, "Addmm": _multiplied, "Bmm": _multiplied,
    "Baddbmm": _multiplied, "Glu": _halved,
    "AsStrided": _strided, "Where": _picked, "CopySlices": _copied,
}  # fmt: skip
