"""Tails that read a few tokens of a sequence alone, run for those tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from simexplain.methods.held_norms import Holding, Norm, find_norms, holding
from simexplain.tapes import Call, Tape

_SAME = 1e-4
_ATTENTION = "scaled_dot_product_attention"
_PRODUCTS = {"linear", "addmm"}
_TOKENWISE = {
    "linear",
    "layer_norm",
    "rms_norm",
    "gelu",
    "relu",
    "silu",
    "dropout",
    "add",
    "sub",
    "mul",
    "div",
    "view",
}


@dataclass(frozen=True)
class ShortTail:
    """What a network does above a layer, for the tokens alone that its vector reads.

    The last block of a class-token transformer attends for every token, but only the class token is
    read. Its query alone is needed of the attention, and everything above it for one token instead
    of all. The gradient is taken below the attention, where queries, keys and values are made: up
    to there each token is treated by itself, so its change goes through by one product.
    Both make the same numbers as the whole tail, which is checked on every call.

    Attributes:
        front: What treats each token by itself.
        tape: The rest of the tail for the tokens that are read, recorded.
        point: What it was recorded from.
        hold: Which calls of the tape are run in another way.
    """

    front: Front
    tape: Tape
    point: Tensor
    hold: Holding

    def run(self, output: Tensor, change: Tensor, *, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors ``(n,E)`` when the layer gives another output, ready to be differentiated.

        Args:
            output: What the layer shall give, ``(n,T,C)`` or ``(T,n,C)``.
            change: A change of it.
            last: Hold only normalisations that nothing but affine functions follow.

        Returns:
            The vectors, the tensor ``(n,T,C')`` or ``(T,n,C')`` that they are differentiable in,
            and the change of that tensor.
        """
        assert self.tape.result is not None
        point, moved = self.front.run(output, change, last=last)
        held = self.hold.last if last else self.hold.every
        values = self.tape.replay({id(self.point): point.requires_grad_()}, held)
        return values[id(self.tape.result)], point, moved


class Front:
    """The calls next to a layer that treat each token by itself.

    Attributes:
        calls: Their numbers.
        ends: What the other calls read of it: tensors as they were recorded, and whether tokens and
            images have changed places.
    """

    def __init__(self, tape: Tape, source: Tensor, hold: Holding) -> None:
        """Finds them.

        Args:
            tape: What was recorded.
            source: The layer's output, as recorded.
            hold: Which calls are run in another way.
        """
        self.tape, self.source, self.hold = tape, source, hold
        self.calls: list[int] = []
        known = {tape.number_of(source): (source, False)}
        ends = set()
        for number, call in enumerate(tape.calls):
            inside = [known[value] for value in call.inputs.values() if value in known]
            exchanged = self._exchanged(call, inside) if inside else None
            if exchanged is None:
                ends.update(known.keys() & call.inputs.values())
            else:
                self.calls.append(number)
                known[call.values[0]] = (call.outputs[0], exchanged)
        self.ends = [known[value] for value in known if value in ends]

    def _exchanged(self, call: Call, inside: Sequence[tuple[Tensor, bool]]) -> bool | None:
        """Whether tokens and images have changed places in a result; None for other calls."""
        before, output = inside[0][1], call.outputs[0]
        alone = call.name in ("view", "linear")
        written = call.name != "view" and any(output is value for value in call.flat)
        if (
            call.name not in _TOKENWISE
            or output.dim() != 3
            or len(call.outputs) > 1
            or {way for _, way in inside} != {before}
            or len(inside) < len(call.inputs)
            or written
            or (alone and call.inputs.keys() != {0})
        ):
            return None
        if call.name == "view":
            shape = inside[0][0].shape
            marks = torch.arange(shape[:2].numel()).to(output).view(*shape[:2], 1).expand(shape)
            moved = call.run([marks, *call.flat[1:]]).to(marks)
            for exchanged, way in ((False, marks), (True, marks.transpose(0, 1))):
                if torch.equal(moved, way):
                    return before != exchanged
            return None
        if call.name in ("layer_norm", "rms_norm"):
            args, kwargs = call.arguments()
            shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
            return before if len(shape) == 1 else None
        return before if output.shape[:2] == inside[0][0].shape[:2] else None

    def widths(self) -> list[int]:
        """How many channels each of the ends has."""
        return [end.shape[-1] for end, _ in self.ends]

    def run(self, output: Tensor, change: Tensor, *, last: bool) -> tuple[Tensor, Tensor]:
        """The ends side by side ``(...,C')`` when the layer gives another output, and their change.

        Args:
            output: What the layer shall give ``(...,C)``.
            change: A change of it.
            last: As for :meth:`ShortTail.run`.
        """
        held = self.hold.last if last else self.hold.every

        def ends(given: Tensor) -> Tensor:
            values = {id(self.source): given}
            for number in self.calls:
                call = self.tape.calls[number]
                flat = [values.get(id(value), value) for value in call.flat]
                run = held.get(number)
                values[id(call.outputs[0])] = call.run(flat) if run is None else run(call, flat)
            parts = [
                values[id(end)].transpose(0, 1) if exchanged else values[id(end)]
                for end, exchanged in self.ends
            ]
            return torch.cat(parts, dim=-1)

        with torch.no_grad():
            point, moved, *_ = torch.func.jvp(ends, (output.detach(),), (change.detach(),))
        return point.detach(), moved.detach()


def short_tail(
    tape: Tape, source: Tensor, norms: Sequence[Norm], freed: Sequence[int]
) -> ShortTail | None:
    """Finds the tail of a layer that may be run for a few tokens; None where it may not.

    Args:
        tape: What was recorded.
        source: The layer's output, as recorded.
        norms: The normalisations that are held.
        freed: Numbers of the calls among them that are left out.
    """
    if source.dim() != 3 or tape.result is None or not tape.result.requires_grad:
        return None
    hold = holding(tape, norms, freed)
    try:
        front = Front(tape, source, hold)
        values = _Shortening(tape, source, front, len(tape.result)).tail(norms, freed)
        if values is None:
            return None
        # Elsewhere than where it was recorded: which tokens are read must not depend on them.
        half = source.detach() / 2
        again = values.run(half, half, last=False)[0].detach()
        whole = tape.replay({id(source): half}, hold.every)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError):
        return None
    return values if _alike(again, whole[id(tape.result)].detach()) else None


@dataclass(frozen=True)
class _Cut:
    """The tokens of a tensor that are read: some places along one axis."""

    axis: int
    kept: Tensor
    size: int

    def narrowed(self, tensor: Tensor, axis: int | None = None) -> Tensor:
        return tensor.index_select(self.axis if axis is None else axis, self.kept)

    def widened(self, tensor: Tensor, old: Tensor) -> Tensor:
        """As long as it was; vectors do not depend on what is filled in."""
        return old.detach().index_copy(self.axis, self.kept, tensor)


class _Shortening:
    """Runs a tape once more for the tokens that are read, and records that."""

    def __init__(self, tape: Tape, source: Tensor, front: Front, images: int) -> None:
        self.old, self.source, self.front, self.images = tape, source, front, images
        self.new = Tape()
        self.read = self._supports()
        self.values: dict[int, Tensor] = {}  # by the id of what was recorded
        self.short: dict[int, _Cut] = {}  # those of them that are short

    def tail(self, norms: Sequence[Norm], freed: Sequence[int]) -> ShortTail | None:
        """The tail for the tokens that are read, if that saves half of the work."""
        old, tape = self.old, self.new
        point, _ = self.front.run(self.source, self.source, last=True)
        tape.start(point.requires_grad_())
        with torch.enable_grad(), tape:
            parts = torch.split(point.clone(), self.front.widths(), dim=-1)
            for (end, exchanged), part in zip(self.front.ends, parts, strict=True):
                self.values[id(end)] = part.transpose(0, 1) if exchanged else part
        reached = set()
        for number, call in enumerate(old.calls):
            outside = number not in self.front.calls
            if outside and any(id(value) in self.values for value in call.flat):
                reached.add(number)
                self._again(call)
        assert old.result is not None
        with tape:
            tape.result = self._whole(old.result)
        before = [norm.call for norm in norms if norm.call in reached]
        after = find_norms(tape, self.images)
        work = _work([old.calls[number] for number in (*self.front.calls, *reached)])
        if not work or 2 * _work(tape.calls) > work or len(before) != len(after):
            return None
        position = dict(zip(before, (norm.call for norm in after), strict=True))
        hold = holding(tape, after, [position[call] for call in freed if call in position])
        if {
            position[call] for call in self.front.hold.last if call in position
        } != hold.last.keys():
            return None
        return ShortTail(self.front, tape, point, hold)

    def _supports(self) -> dict[int, _Cut]:
        """By the id of a recorded tensor which of its tokens vectors depend on, if few."""
        result = self.old.result
        assert result is not None
        outputs = [o for call in self.old.calls for o in call.outputs if o.requires_grad]
        slopes = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
        gradients = torch.autograd.grad(
            result, outputs, slopes, retain_graph=True, allow_unused=True
        )
        cuts = {
            id(output): None if gradient is None else self._support(gradient.ne(0))
            for output, gradient in zip(outputs, gradients, strict=True)
        }
        return {key: cut for key, cut in cuts.items() if cut is not None}

    def _support(self, reached: Tensor) -> _Cut | None:
        tokens = next((n for n in self.source.shape[:2] if n != self.images), self.images)
        cuts = []
        for axis in range(reached.dim() - 1):  # the last one has channels, which may be dead
            places = reached.movedim(axis, 0).flatten(1).any(dim=1).nonzero().flatten()
            size = reached.shape[axis]
            if size % tokens == 0 and 0 < 2 * len(places) <= size:
                cuts.append(_Cut(axis, places, size))
        return min(cuts, key=lambda cut: len(cut.kept) / cut.size, default=None)

    def _again(self, call: Call) -> None:
        """Runs a call for the tokens that are read of what it gives, or else whole."""
        cuts = [self.read.get(id(output)) for output in call.outputs[: call.given]]
        cut = next((one for one in cuts if one is not None), None)
        untouched = cut is None and not any(id(value) in self.short for value in call.flat)
        aligned = next(
            (way for way in (False, True) if not untouched and self._fits(call, cuts, cut, way)),
            None,
        )
        with torch.set_grad_enabled(call.graded), self.new:
            flat = self._arguments(call, cut, aligned)
            given = _tensors(_run(call, flat))
            if aligned is None:
                given = [
                    new if one is None else one.narrowed(new)
                    for new, one in zip(given, cuts, strict=True)
                ]
        for output, new, one in zip(call.outputs, given, cuts, strict=False):
            self.values[id(output)] = new
            self.short.pop(id(output), None)
            if one is not None:
                self.short[id(output)] = one

    def _fits(
        self, call: Call, cuts: Sequence[_Cut | None], cut: _Cut | None, aligned: bool
    ) -> bool:
        """Whether a call gives for short arguments what is read of what it gave."""
        with torch.no_grad():
            flat = self._arguments(call, cut, aligned)
            # A call that writes into its arguments must not do so twice.
            flat = [value.clone() if isinstance(value, Tensor) else value for value in flat]
            try:
                given = _tensors(_run(call, flat))
            except (RuntimeError, ValueError, IndexError, TypeError):
                return False
            return len(given) == len(cuts) and all(
                _alike(new, old.detach() if one is None else one.narrowed(old.detach()))
                for new, old, one in zip(given, call.outputs, cuts, strict=False)
            )

    def _arguments(self, call: Call, cut: _Cut | None, aligned: bool | None) -> list[Any]:
        """Those of a call, as they are found.

        Args:
            call: The call.
            cut: What is read of its result.
            aligned: Whether to shorten those as well that have as many tokens as the result; None
                for all at full length.
        """
        if aligned is None:
            return [self._whole(v) if isinstance(v, Tensor) else v for v in call.flat]
        dims = call.outputs[0].dim()
        sizes = [n for n, value in enumerate(call.flat) if type(value) is int]
        flat: list[Any] = []
        for n, value in enumerate(call.flat):
            new = self._at_hand(value) if isinstance(value, Tensor) else value
            if cut is not None and isinstance(value, Tensor) and id(value) not in self.short:
                axis = cut.axis - dims + value.dim()
                if aligned and axis >= 0 and value.shape[axis] == cut.size:
                    new = cut.narrowed(new, axis)
            elif cut is not None and n in sizes and call.name == "view" and len(sizes) == dims:
                new = len(cut.kept) if n == sizes[cut.axis] and value == cut.size else value
            flat.append(new)
        return flat

    def _at_hand(self, value: Tensor) -> Tensor:
        """What stands for a recorded tensor now."""
        if id(value) in self.values:
            return self.values[id(value)]
        return value if value.grad_fn is None else value.detach()

    def _whole(self, value: Tensor) -> Tensor:
        new, cut = self._at_hand(value), self.short.get(id(value))
        return new if cut is None else cut.widened(new, value)


def _run(call: Call, flat: Sequence[Any]) -> Any:
    """Runs a call; attention in the open, since fused attention can be differentiated only once."""
    if call.name != _ATTENTION or _masked(call):
        return call.run(flat)
    query, key, value = flat[:3]
    scale = call.arguments()[1].get("scale") or query.shape[-1] ** -0.5
    return ((query * scale) @ key.transpose(-2, -1)).softmax(dim=-1) @ value


def _masked(call: Call) -> bool:
    args, kwargs = call.arguments()
    names = ("attn_mask", "dropout_p", "is_causal")
    others = [
        args[n + 3] if len(args) > n + 3 else kwargs.get(name) for n, name in enumerate(names)
    ]
    others.append(kwargs.get("enable_gqa"))
    return any(other is not None and bool(torch.as_tensor(other).any()) for other in others)


def _work(calls: Sequence[Call]) -> int:
    """Through how many rows of linear layers some calls go."""
    made = [call.outputs[0] for call in calls if call.name in _PRODUCTS]
    return sum(output.numel() // output.shape[-1] for output in made)


def _tensors(result: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]


def _alike(new: Tensor, old: Tensor) -> bool:
    """Whether two tensors are the same to rounding."""
    if new.shape != old.shape or not old.is_floating_point():
        return torch.equal(new, old)
    close = max(_SAME, 8 * torch.finfo(old.dtype).eps)
    finite = old[old.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(new, old, rtol=close, atol=close * size)
