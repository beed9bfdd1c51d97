"""Tails that read a few tokens of a sequence alone, run for those tokens only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from simexplain.methods.held_norms import Holding, Norm, find_norms, holding
from simexplain.tapes import Call, Held, Tape

_SAME = 1e-4
_ATTENTION = "scaled_dot_product_attention"
_GIVEN = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_PRODUCTS = {"linear", "addmm"}
_BROADCAST = {"add", "sub", "mul", "div"}
_NORMS = {"layer_norm", "rms_norm"}
_REDUCED = {"mean", "sum", "norm"}
_TOKENWISE = {
    "linear", "gelu", "relu", "silu", "sigmoid", "tanh", "exp", "pow", "square", "sqrt", "rsqrt",
    "dropout", "view", *_BROADCAST, *_NORMS, *_REDUCED,
}  # fmt: skip


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


@dataclass(frozen=True, eq=False)
class _Known:
    """A tensor whose tokens come from one token of the layer each, perhaps with some beside them.

    Attributes:
        tensor: As it was recorded.
        images: Its axis of images.
        channels: Its axis of channels; the others are tokens, or rows and columns of a map.
        before: How many tokens come first that are none of the layer's, such as their mean.
        after: How many come last.
    """

    tensor: Tensor
    images: int
    channels: int
    before: int = 0
    after: int = 0

    @property
    def way(self) -> tuple[int, ...]:
        """How it is laid out."""
        return (self.tensor.dim(), self.images, self.channels, self.before, self.after)

    @property
    def axis(self) -> int:
        """The axis of tokens, of three."""
        return 3 - self.images - self.channels

    @property
    def beside(self) -> list[int]:
        """The numbers of the tokens that are none of the layer's."""
        size = self.tensor.shape[self.axis]
        return [*range(self.before), *range(size - self.after, size)]

    def listed(self, tensor: Tensor) -> Tensor:
        """A tensor laid out as this one, as tokens ``(n,T,C)``."""
        return tensor.movedim((self.images, self.channels), (0, -1)).flatten(1, -2)

    def laid(self, tokens: Tensor) -> Tensor:
        """Tokens ``(n,T,C)`` laid out as this one."""
        sides = [self.tensor.shape[axis] for axis in range(self.tensor.dim())
                 if axis not in (self.images, self.channels)]  # fmt: skip
        if len(sides) == 1:
            sides = [tokens.shape[1]]
        whole = tokens.reshape(len(tokens), *sides, tokens.shape[-1])
        return whole.movedim((0, -1), (self.images, self.channels))


class Front:
    """The calls next to a layer that treat each token by itself.

    Attributes:
        calls: Their numbers.
        known: What is known of what they give, by the number of the value.
        ends: What the other calls read of it.
    """

    def __init__(self, tape: Tape, source: Tensor, axes: tuple[int, int], hold: Holding) -> None:
        """Finds them.

        Args:
            tape: What was recorded.
            source: The layer's output, as recorded: tokens ``(n,T,C)`` or ``(T,n,C)``, or a map.
            axes: Those of images and channels in it.
            hold: Which calls are run in another way.
        """
        self.tape, self.hold = tape, hold
        self.source = _Known(source, *axes)
        self.calls: list[int] = []
        self.known = {tape.number_of(source): self.source}
        ends = set()
        for number, call in enumerate(tape.calls):
            read = [value for value in call.inputs.values() if value in self.known]
            found = self._after(number, call, [self.known[n] for n in read]) if read else None
            if found is None:
                ends.update(read)
                continue
            if call.name == "cat":  # the others become tokens beside those of the first
                ends.update(read[1:])
            self.calls.append(number)
            self.known[call.values[0]] = found
        self.ends = [self.known[value] for value in self.known if value in ends]

    def _after(self, number: int, call: Call, inside: Sequence[_Known]) -> _Known | None:
        """What is known of what a call gives; None where it does not treat each token by itself."""
        first, output = inside[0], call.outputs[0]
        written = call.name != "view" and any(output is value for value in call.flat)
        # What a normalisation is held at is that of all tokens of it.
        held = first.before + first.after > 0 and number in self.hold.every
        if len(call.outputs) > 1 or written or held:
            return None
        if call.name == "cat":
            return self._joined(call, inside)
        if (
            call.name not in _TOKENWISE
            or {one.way for one in inside} != {first.way}
            or len(inside) < len(call.inputs)
            or (call.name not in _BROADCAST and call.inputs.keys() != {0})
        ):
            return None
        if call.name == "view":
            return self._viewed(call, first)
        last = first.channels == first.tensor.dim() - 1
        if call.name in _NORMS | _REDUCED | _PRODUCTS and not last:
            return None
        if call.name in _NORMS:
            args, kwargs = call.arguments()
            shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
            if len(shape) > 1:
                return None
        sizes = [list(one.shape) for one in (first.tensor, output)]
        if len(sizes[1]) != len(sizes[0]):
            return None
        for size in sizes:
            del size[first.channels]
        if sizes[0] != sizes[1] or (call.name in _REDUCED and output.shape[-1] > 1):
            return None
        return replace(first, tensor=output)

    def _viewed(self, call: Call, first: _Known) -> _Known | None:
        """How the same numbers are laid out after a view."""
        tensor, output = first.tensor, call.outputs[0]
        if output.dim() not in (3, 4) or (output.dim() == 4 and first.before + first.after):
            return None
        marks = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
        marks = marks.view(tensor.shape)
        moved, listed = call.run([marks, *call.flat[1:]]), first.listed(marks)
        for images in range(output.dim()):
            for channels in reversed(range(output.dim())):
                one = replace(first, tensor=output, images=images, channels=channels)
                if images != channels and torch.equal(one.listed(moved).to(marks), listed):
                    return one
        return None

    def _joined(self, call: Call, inside: Sequence[_Known]) -> _Known | None:
        """Tokens with others put before or after them, as a class token or their mean is."""
        one, output = inside[0], call.outputs[0]
        parts, axis = _parts_of(call)
        own = [number for number, part in enumerate(parts) if part is one.tensor]
        # Stacking is of this name, too, and makes an axis.
        if output.dim() != 3 or one.tensor.dim() != 3 or len(own) != 1 or axis % 3 != one.axis:
            return None
        if one.before + one.after:
            return None
        sizes = [part.shape[one.axis] for part in parts]
        before, after = sum(sizes[: own[0]]), sum(sizes[own[0] + 1 :])
        return replace(one, tensor=output, before=before, after=after)

    def widths(self) -> list[int]:
        """How many channels each of the ends has."""
        return [end.tensor.shape[end.channels] for end in self.ends]

    def run(self, output: Tensor, change: Tensor, *, last: bool) -> tuple[Tensor, Tensor]:
        """The ends side by side when the layer gives another output, and their change.

        Args:
            output: What the layer shall give.
            change: A change of it.
            last: As for :meth:`ShortTail.run`.

        Returns:
            Both laid out as the layer's output, with other channels; of the layer's own tokens.
        """
        held = self.hold.last if last else self.hold.every

        def ends(given: Tensor) -> Tensor:
            values = {id(self.source.tensor): self.source.listed(given)}
            for number in self.calls:
                call = self.tape.calls[number]
                known = self.known[call.values[0]]
                values[id(known.tensor)] = self._own(call, known, values, held.get(number))
            parts = [values[id(end.tensor)] for end in self.ends]
            return self.source.laid(torch.cat(parts, dim=-1))

        with torch.no_grad():
            point, moved, *_ = torch.func.jvp(ends, (output.detach(),), (change.detach(),))
        return point.detach(), moved.detach()

    def _own(
        self, call: Call, known: _Known, values: Mapping[int, Tensor], held: Held | None
    ) -> Tensor:
        """What a call gives for the layer's own tokens ``(n,T,C)``."""
        inside = next(value for value in call.flat if id(value) in values)
        if call.name in ("view", "cat"):
            return values[id(inside)]
        size = known.tensor.shape[known.axis] if known.tensor.dim() == 3 else 0
        own = range(known.before, size - known.after)
        flat = [
            self.known[self.tape.number_of(value)].laid(values[id(value)])
            if id(value) in values
            else narrowed(call, known, value, own)
            for value in call.flat
        ]
        return known.listed(call.run(flat) if held is None else held(call, flat))


def narrowed(call: Call, known: _Known, value: Any, tokens: Sequence[int]) -> Any:
    """Some tokens of an argument that has one for each of what a call gives."""
    if not isinstance(value, Tensor) or call.name not in _BROADCAST:
        return value
    if not known.before + known.after:
        return value
    axis = known.axis - 3 + value.dim()
    if axis < 0 or value.shape[axis] != known.tensor.shape[known.axis]:
        return value
    return value.index_select(axis, torch.tensor(list(tokens), device=value.device))


def short_tail(
    tape: Tape,
    source: Tensor,
    axes: tuple[int, int],
    norms: Sequence[Norm],
    freed: Sequence[int],
) -> ShortTail | None:
    """Finds the tail of a layer that may be run for a few tokens; None where it may not.

    Args:
        tape: What was recorded.
        source: The layer's output, as recorded.
        axes: Those of images and channels in it.
        norms: The normalisations that are held.
        freed: Numbers of the calls among them that are left out.
    """
    if source.dim() not in (3, 4) or tape.result is None or not tape.result.requires_grad:
        return None
    hold = holding(tape, norms, freed)
    try:
        front = Front(tape, source, axes, hold)
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
        every = [front.source, *front.known.values()]
        self.sizes = {one.listed(one.tensor).shape[1] for one in every}
        self.read = self._supports()
        self.values: dict[int, Tensor] = {}  # by the id of what was recorded
        self.extra: dict[int, Tensor] = {}  # of those of them that have more than the layer's
        self.short: dict[int, _Cut] = {}  # those of them that are short

    def tail(self, norms: Sequence[Norm], freed: Sequence[int]) -> ShortTail | None:
        """The tail for the tokens that are read, if that saves half of the work."""
        old, tape = self.old, self.new
        point, _ = self.front.run(self.source, self.source, last=True)
        tape.start(point.requires_grad_())
        with torch.enable_grad(), tape:
            tokens = self.front.source.listed(point.clone())
            parts = torch.split(tokens, self.front.widths(), dim=-1)
            for end, part in zip(self.front.ends, parts, strict=True):
                self.values[id(end.tensor)] = end.laid(part)
        reached = set()
        for number, call in enumerate(old.calls):
            if number in self.front.calls:
                self._beside(call)
            elif any(id(value) in self.values for value in call.flat):
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

    def _beside(self, call: Call) -> None:
        """Runs a call next to the layer for the tokens that are none of the layer's, if any."""
        known = self.front.known[call.values[0]]
        if not known.before + known.after:
            return
        inside = next(self.front.known[n] for n in call.inputs.values() if n in self.front.known)
        with torch.set_grad_enabled(call.graded), self.new:
            if call.name == "cat":
                parts, _ = _parts_of(call)
                others = [self._whole(part) for part in parts if part is not inside.tensor]
                extra = torch.cat(others, dim=known.axis)
            elif call.name == "view":
                extra = known.laid(inside.listed(self.extra[id(inside.tensor)]))
            else:
                given = [self._at_hand(v) if isinstance(v, Tensor) else v for v in call.flat]
                extra = call.run(
                    [self.extra.get(id(value), narrowed(call, known, new, known.beside))
                     for value, new in zip(call.flat, given, strict=True)]
                )  # fmt: skip
            self.extra[id(known.tensor)] = extra
            if id(known.tensor) in self.values:
                first, last = torch.split(extra, [known.before, known.after], dim=known.axis)
                own = self.values[id(known.tensor)]
                self.values[id(known.tensor)] = torch.cat((first, own, last), dim=known.axis)

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
        cuts = []
        for axis in range(reached.dim() - 1):  # the last one has channels, which may be dead
            places = reached.movedim(axis, 0).flatten(1).any(dim=1).nonzero().flatten()
            size = reached.shape[axis]
            of_tokens = any(size % tokens == 0 for tokens in self.sizes)
            if of_tokens and 0 < 2 * len(places) <= size:
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
            given = _tensors(_run(call, flat, None if aligned is None else cut))
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
                given = _tensors(_run(call, flat, cut))
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


def _parts_of(call: Call) -> tuple[Sequence[Tensor], int]:
    """What is joined, and along which axis."""
    args, kwargs = call.arguments()
    parts = args[0] if args else kwargs["tensors"]
    return parts, args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))


def _run(call: Call, flat: Sequence[Any], cut: _Cut | None) -> Any:
    """Runs a call; attention in the open, since fused attention can be differentiated only once.

    Args:
        call: The call.
        flat: Its arguments.
        cut: Which tokens of its result are made, where not all are.
    """
    args, kwargs = call.arguments(flat)
    given = {**dict(zip(_GIVEN, args, strict=False)), **kwargs}
    if call.name != _ATTENTION or given.get("dropout_p"):
        return call.run(flat)
    query, key, value = (given[name] for name in _GIVEN[:3])
    if given.get("enable_gqa"):
        key, value = (
            one.repeat_interleave(query.shape[-3] // one.shape[-3], dim=-3) for one in (key, value)
        )
    scale = given.get("scale") or query.shape[-1] ** -0.5
    scores = (query * scale) @ key.transpose(-2, -1)
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        size = query.shape[-2] if cut is None else cut.size
        mask = torch.ones(size, key.shape[-2], dtype=torch.bool, device=key.device).tril()
    if mask is not None:
        if cut is not None and mask.dim() > 1 and mask.shape[-2] == cut.size > query.shape[-2]:
            mask = mask.index_select(-2, cut.kept)
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    return scores.softmax(dim=-1) @ value


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
