"""Normalisations that a network carries out itself, found among what it called, and held.

A normalisation divides a tensor by a number made of the same tensor that grows as it does: its
length, its standard deviation, the sum of its parts. What comes out does not change when the tensor
is scaled (degree 0), so a gradient sees no effect of the tensor's size, and positions that all pull
the same way cancel. With the divisor held at its value, the normalisation is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from simexplain.tapes import Call, Held, Tape

_FAR = 24
"""Calls that are followed back from a divisor to the tensor that it is made of."""

_KEEPS = {
    "view", "getitem", "cat", "mean", "sum", "abs", "relu", "amax", "amin", "max", "min", "norm",
    "std", "neg", "nansum", "dropout", "detach", "leaky_relu", "identity", "maximum", "clamp",
}  # fmt: skip
_REDUCES = {"mean", "sum", "amax", "max", "norm", "std", "var", "matmul", "nansum"}
_HALF = Fraction(1, 2)
_POWERS: dict[str, int | Fraction] = {
    "square": 2, "var": 2, "sqrt": _HALF, "rsqrt": -_HALF, "reciprocal": -1, "rdiv": -1,
}  # fmt: skip
_LINEAR = {"linear", "conv1d", "conv2d", "conv3d", "convolution"}
_AFFINE = _LINEAR | {
    "view", "getitem", "cat", "mean", "sum", "neg", "dropout", "identity", "add", "sub",
    "batch_norm", "addmm", "pad", "roll", "interpolate", "upsample_bilinear2d", "feature_dropout",
    "_native_batch_norm_legit_no_training", "baddbmm", "scatter_add", "index_add",
    "index_copy",
}  # fmt: skip
_ONE_SIDED = {"mul", "matmul"}
_WHOLE = {"normalize", "layer_norm", "native_layer_norm", "group_norm", "instance_norm", "rms_norm"}


@dataclass(frozen=True)
class Norm:
    """A normalisation among the calls of a tape.

    Attributes:
        call: The number of the call.
        divisor: The positions among its arguments of what was divided, and of the divisor; None
            where the function makes its divisor itself.
        held: Runs the call with the divisor as it was.
        length: What the result has to be multiplied with to undo it, if that is one number for
            each of ``m`` images ``(m,)`` and nothing was subtracted.
    """

    call: int
    divisor: tuple[int, int] | None
    held: Held
    length: Tensor | None


@dataclass(frozen=True)
class Holding:
    """How the part of a network above a layer is run with its normalisations held.

    Attributes:
        every: All of them, by the number of the call.
        last: Those alone that only affine functions follow: above them the network is a degree-0
            tail, in the middle of it other functions see a normalised tensor.
    """

    every: Mapping[int, Held]
    last: Mapping[int, Held]


def find_norms(tape: Tape, images: int) -> tuple[Norm, ...]:
    """The normalisations of a tape, in the order of its calls.

    Found by what functions do to the scale of their input, not by the names of modules: in
    ``x / x.norm()``, ``x * rsqrt(mean(x ** 2) + eps)`` or the operators of an exported program, the
    divisor is of the same degree as what it divides. ``F.normalize``, layer, group, instance and
    RMS normalisation do it in one call.

    Args:
        tape: What was recorded above a layer.
        images: How many images went through it.
    """
    norms = []
    for number, call in enumerate(tape.calls):
        made = _whole(call) if call.name in _WHOLE else _divided(tape, call)
        if made is None:
            continue
        divisor, held, values = made
        length = None if values is None else _per_image(values, images)
        norms.append(Norm(number, divisor, held, length))
    return tuple(norms)


def holding(tape: Tape, norms: Sequence[Norm], freed: Sequence[int]) -> Holding:
    """Which calls to run in another way.

    Args:
        tape: What was recorded.
        norms: The normalisations in it.
        freed: Numbers of the calls among them that are left out altogether.
    """
    every = {norm.call: _undone(norm) if norm.call in freed else norm.held for norm in norms}
    last = last_norms(tape, norms)
    return Holding(every, {call: held for call, held in every.items() if call in last})


def freed_norms(tape: Tape, norms: Sequence[Norm], rows: Tensor) -> tuple[int, ...]:
    """The normalisations whose divisor is a factor of the whole vector, by the number of the call.

    Without them the network gives the same vectors at other lengths. From the last one down, each
    is tried: the network is run on from it with its result at full length.

    Args:
        tape: What was recorded.
        norms: The normalisations in it.
        rows: The vectors ``(m,E)`` that the network gave.
    """
    assert tape.result is not None
    last, freed, held = last_norms(tape, norms), [], {}
    for norm in reversed(norms):
        if norm.call not in last or norm.length is None:
            break
        held[norm.call] = _undone(norm)
        call = tape.calls[norm.call]
        output = call.outputs[0].detach()
        longer = output * norm.length.to(output).view(-1, *[1] * (output.dim() - 1))
        env = tape.replay({id(call.outputs[0]): longer}, held, first=norm.call + 1)
        if not _parallel(env.get(id(tape.result), tape.result).detach(), rows):
            break
        freed.append(norm.call)
    return tuple(freed)


def last_norms(tape: Tape, norms: Sequence[Norm]) -> set[int]:
    """Numbers of the calls that only affine functions and other normalisations follow."""
    assert tape.result is not None
    by_call = {norm.call: norm for norm in norms}
    wanted = {tape.number_of(tape.result)}  # values that the result is made of
    bent: set[int] = set()  # those that something not affine is made of
    last: set[int] = set()
    for number in range(len(tape.calls) - 1, -1, -1):
        call = tape.calls[number]
        if not wanted.intersection(call.values):
            continue
        straight = not bent.intersection(call.values)
        inputs = dict(call.inputs)
        norm = by_call.get(number)
        if norm is not None:
            if straight:
                last.add(number)
            if norm.divisor is not None:
                del inputs[norm.divisor[1]]  # held
        elif not _affine(call):
            straight = False
        wanted.update(inputs.values())
        if not straight:
            bent.update(inputs.values())
    return last


def _affine(call: Call) -> bool:
    if call.name == "div":
        return 1 not in call.inputs
    if call.name in _ONE_SIDED:
        return len(call.inputs) == 1
    if call.name == "batch_norm":  # in training mode it depends on the whole batch
        args, kwargs = call.arguments()
        known = dict.fromkeys(("running_mean", "running_var", "weight", "bias", "training"))
        return not _bound(args[1:], kwargs, **known)[-1]
    return call.name in _AFFINE


def _parallel(a: Tensor, b: Tensor) -> bool:
    """Whether rows ``(m,E)`` point the same way."""
    a, b = a.double(), b.double()
    a, b = (t / t.norm(dim=1, keepdim=True).clamp_min(1e-300) for t in (a, b))
    return bool(((a - b).norm(dim=1) <= 1e-5).all())


def _per_image(values: Tensor, images: int) -> Tensor | None:
    """One number for each image ``(m,)``, if the divisors are just that."""
    if values.dim() == 0 or len(values) != images:
        return None
    flat = values.detach().reshape(images, -1)
    return flat[:, 0] if bool((flat == flat[:, :1]).all()) else None


def _undone(norm: Norm) -> Held:
    """Skips a normalisation."""

    def run(call: Call, flat: Sequence[Any]) -> Any:
        assert norm.length is not None
        result = norm.held(call, flat)
        return result * norm.length.to(result).view(-1, *[1] * (result.dim() - 1))

    return run


def _divided(tape: Tape, call: Call) -> tuple[tuple[int, int], Held, Tensor] | None:
    """A division by, or a product with the inverse of, something that scales with the tensor."""
    if call.name not in ("div", "mul") or not {0, 1} <= call.inputs.keys():
        return None
    sides = [(0, 1)] if call.name == "div" else [(0, 1), (1, 0)]
    for position, divisor in sides:
        sign = -1 if call.name == "div" else 1
        if not call.unchanged(divisor) or not _scales(tape, call, position, divisor, sign):
            continue
        value: Tensor = call.flat[divisor].detach()

        def run(call: Call, flat: Sequence[Any], at: int = divisor, kept: Tensor = value) -> Any:
            return call.run([kept if n == at else one for n, one in enumerate(flat)])

        return (position, divisor), run, value if sign < 0 else value.reciprocal()
    return None


def _scales(tape: Tape, call: Call, position: int, divisor: int, sign: int) -> bool:
    makers = {value: made for made in tape.calls for value in made.values}
    for root in _ancestors(call.inputs[divisor], makers):
        degrees = _Degrees(root, makers)
        below = degrees.of(call.inputs[divisor])
        if below is None or below[0] == 0 or not below[1]:
            continue
        above = degrees.of(call.inputs[position])
        if above is not None and above[0] + sign * below[0] == 0:
            return True
    return False


def _ancestors(value: int, makers: Mapping[int, Call]) -> list[int]:
    """Values that one is made of, the nearest first."""
    ancestors: list[int] = []
    front = [value]
    while front and len(ancestors) < _FAR:
        made = makers.get(front.pop(0))
        new = [] if made is None else [n for n in made.inputs.values() if n not in ancestors]
        ancestors += new
        front += new
    return ancestors


class _Degrees:
    """With which power values grow with a root, and whether they are sums over more of it."""

    def __init__(self, root: int, makers: Mapping[int, Call]) -> None:
        self.makers = makers
        self.known: dict[int, tuple[Fraction, bool] | None] = {root: (Fraction(1), False)}

    def of(self, value: int) -> tuple[Fraction, bool] | None:
        """The degree of a value and whether it is reduced; None where it has no degree."""
        if value not in self.known:
            self.known[value] = None  # while it is looked for
            call = self.makers.get(value)
            self.known[value] = None if call is None else self._after(call)
        return self.known[value]

    def _after(self, call: Call) -> tuple[Fraction, bool] | None:
        inputs = {}
        for position, number in call.inputs.items():
            known = self.of(number)
            if known is None:
                return None
            inputs[position] = known
        degree = self._degree(call, {position: one[0] for position, one in inputs.items()})
        if degree is None:
            return None
        return degree, call.name in _REDUCES or any(reduced for _, reduced in inputs.values())

    def _degree(self, call: Call, inputs: Mapping[int, Fraction]) -> Fraction | None:
        first, name = next(iter(inputs.values())), call.name
        if name in _WHOLE:
            return Fraction(0)
        if name in ("mul", "matmul"):
            return sum(inputs.values(), Fraction(0))
        if name == "div":
            return inputs.get(0, Fraction(0)) - inputs.get(1, Fraction(0))
        if name == "pow":
            power = call.flat[1]
            plain = isinstance(power, (int, float)) and 0 in inputs
            return first * Fraction(power).limit_denominator(1000) if plain else None
        if name in _POWERS:
            return first * _POWERS[name]
        same = first if len(set(inputs.values())) == 1 else None
        if name in ("add", "sub"):  # beside values of the layer only small constants
            others = (value for n, value in enumerate(call.flat[:2]) if n not in call.inputs)
            return same if all(map(_small, others)) else None
        if name in _LINEAR:
            return first if not any(isinstance(v, Tensor) for v in call.flat[2:3]) else None
        return same if name in _KEEPS else None


def _small(value: Any) -> bool:
    """Whether it is one of the small constants that keep a divisor from zero."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and abs(float(value)) <= _SMALL
    return isinstance(value, (int, float)) and abs(value) <= _SMALL


_SMALL = 1e-2


def _whole(call: Call) -> tuple[None, Held, Tensor | None] | None:
    """A normalisation in one call."""
    if 0 not in call.inputs or not call.unchanged(0):
        return None
    args, kwargs = call.arguments()
    made = _MAKERS[call.name](args[0].detach(), args[1:], kwargs)
    if made is None:
        return None
    run, values = made
    pair = call.name == "native_layer_norm"

    def held(call: Call, flat: Sequence[Any]) -> Any:
        result = run(flat[0])
        return (result, *call.outputs[1 : call.given]) if pair else result

    return None, held, values


_Made = tuple[Callable[[Tensor], Tensor], Tensor | None] | None


def _bound(args: Sequence[Any], kwargs: Mapping[str, Any], **others: Any) -> list[Any]:
    """Arguments by position or name, in the order of their defaults."""
    return [
        args[at] if len(args) > at else kwargs.get(name, other)
        for at, (name, other) in enumerate(others.items())
    ]


def _normalize(tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Made:
    p, dim, eps = _bound(args, kwargs, p=2.0, dim=1, eps=1e-12)
    length = tensor.norm(p, dim, keepdim=True).clamp_min(eps)
    return lambda new: new / length, length


def _layer_norm(tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Made:
    shape, weight, bias, eps = _bound(
        args, kwargs, normalized_shape=(), weight=None, bias=None, eps=1e-5
    )
    axes = list(range(tensor.dim() - len(shape), tensor.dim()))
    return _centred(tensor, axes, weight, bias, eps), None


def _rms_norm(tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Made:
    shape, weight, eps = _bound(args, kwargs, normalized_shape=(), weight=None, eps=None)
    axes = list(range(tensor.dim() - len(shape), tensor.dim()))
    small = torch.finfo(tensor.dtype).eps if eps is None else eps
    inverse = (tensor.square().mean(axes, keepdim=True) + small).rsqrt()
    scale = inverse if weight is None else inverse * weight
    return lambda new: new * scale, None


def _group_norm(tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Made:
    given = _bound(args, kwargs, num_groups=1, weight=None, bias=None, eps=1e-5)
    return _grouped(tensor, *given), None


def _instance_norm(tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Made:
    _, _, weight, bias, statistics, _, eps = _bound(
        args, kwargs, running_mean=None, running_var=None, weight=None, bias=None,
        use_input_stats=True, momentum=0.1, eps=1e-5,
    )  # fmt: skip
    if not statistics:
        return None  # affine as it is
    return _grouped(tensor, tensor.shape[1], weight, bias, eps), None


def _grouped(
    tensor: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Callable[[Tensor], Tensor]:
    """Channels ``(m,C,...)`` normalised in groups."""
    plain = _centred(tensor.reshape(len(tensor), groups, -1), [2], None, None, eps)
    along = (1, -1, *[1] * (tensor.dim() - 2))

    def run(new: Tensor) -> Tensor:
        output = plain(new.reshape(len(new), groups, -1)).reshape(new.shape)
        output = output if weight is None else output * weight.view(along)
        return output if bias is None else output + bias.view(along)

    return run


def _centred(
    tensor: Tensor, axes: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Callable[[Tensor], Tensor]:
    """Mean taken off, over the standard deviation that a tensor has."""
    inverse = (tensor.var(axes, correction=0, keepdim=True) + eps).rsqrt()

    def run(new: Tensor) -> Tensor:
        output = (new - new.mean(axes, keepdim=True)) * inverse
        output = output if weight is None else output * weight
        return output if bias is None else output + bias

    return run


_MAKERS: dict[str, Callable[[Tensor, Sequence[Any], Mapping[str, Any]], _Made]] = {
    "normalize": _normalize,
    "layer_norm": _layer_norm,
    "native_layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
}
"""Every normalisation that is one function."""
