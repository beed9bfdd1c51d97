"""Explains row after row as ``explain`` does, with one pass for each picture if it can."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simexplain.batching.cached_model import (
    CachedModel,
    CacheMissError,
    LookaheadCache,
    Pass,
    Use,
    blank,
    cached_avsl,
    cut_pass,
    use_schedule,
)
from simexplain.batching.planning import BatchPlan
from simexplain.comparison import Comparison
from simexplain.data.images import Picture, read_picture
from simexplain.data.preprocessing import Preprocess, Seen, notes_of, prepared
from simexplain.errors import ComparisonError, ImageError, ModelError
from simexplain.explaining_tensors import MapRequest, explain_view
from simexplain.explanation import Explanation
from simexplain.methods import MethodLike, takes_layers
from simexplain.methods.avsl_maps import AVSLMaps
from simexplain.methods.raw_vectors import RawVectors
from simexplain.methods.rows import Methods, request_of
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_runs import features_and_rows
from simexplain.models.base import SimilarityModel

Size = tuple[int, int]


class Reader:
    """Reads pictures by their number.

    Attributes:
        preprocess: As the network expects.
        view: ``(height, width)`` that maps lie on; larger than the network's own if upscaled.
        seen: What was read so far.
        broken: What could not be read, with the reason.
    """

    def __init__(self, pictures: Sequence[Path], preprocess: Preprocess, view: Size) -> None:
        self.preprocess, self.view = preprocess, view
        self.seen: dict[int, Seen] = {}
        self.broken: dict[int, str] = {}
        self._pictures = pictures

    def picture(self, number: int) -> Picture:
        """A picture itself."""
        if number in self.broken:
            raise ImageError(self.broken[number])
        try:
            return read_picture(self._pictures[number])
        except ImageError as error:
            self.broken[number] = str(error)
            raise

    def tensor(self, number: int, size: Size) -> Tensor:
        """A picture ``(3,H,W)`` of this size, as the network takes it."""
        picture = self.picture(number)
        prepare = replace(self.preprocess, size=size)
        try:
            views, geometries = prepared(prepare, [picture])
        except ImageError as error:
            self.broken[number] = str(error)
            raise
        if size == self.view:
            self.seen[number] = Seen(geometries[0], picture.notes)
        elif number not in self.seen:
            there = replace(self.preprocess, size=self.view).geometry(geometries[0].original)
            self.seen[number] = Seen(there, picture.notes)
        return views[0]

    def readable(self, numbers: Sequence[int], size: Size) -> tuple[list[int], Tensor]:
        """Those of some pictures that can be read, and their tensors ``(M,3,H,W)``."""
        tensors: dict[int, Tensor] = {}
        for number in numbers:
            with suppress(ImageError):  # which is in ``broken`` now
                tensors[number] = self.tensor(number, size)
        if not tensors:
            raise ImageError(self.broken[numbers[0]])
        return list(tensors), torch.stack(list(tensors.values()))


_TRIED = 6
"""Rows that a network has to fail on before it is held to be the network's fault."""
_CLOSE = 1e-3


class RowExplainer:
    """Explains the rows of a plan.

    Attributes:
        shared: Whether pictures are embedded once for all their rows. Set by :meth:`check_sharing`:
            methods that perturb pixels, for instance, need the network for each row.
        forwards: Pictures that went through the network so far for rows of a shared run.
    """

    def __init__(
        self,
        model: SimilarityModel,
        plan: BatchPlan,
        request: MapRequest,
        *,
        memory: int,
        batch_size: int = 1,
    ) -> None:
        """Nothing is read or run yet; ``memory`` is in bytes."""
        self.model, self.plan, self.request = model, plan, request
        self.batch_size = model.pass_size(batch_size, batch_size)
        self.shared = False
        self.forwards = 0
        self.own: Size = model.preprocess.size
        height, width = (max(1, round(side * request.upscale)) for side in self.own)
        self.view: Size = (height, width)
        self.reader = Reader(plan.pictures, model.preprocess, self.view)
        self._chosen: tuple[MethodLike, ...] = ()
        self._layers: tuple[str, ...] = ()
        self._images: tuple[int, ...] = ()
        self._uses: dict[int, dict[int, list[int]]] = {}
        self._keep: LookaheadCache[Any] = LookaheadCache(memory, self._uses_of)
        self._places: dict[int, int] = {}
        self._proven: tuple[int, Explanation] | None = None
        self._remembering: SimilarityModel = model

    def begin(self, rows: Sequence[int]) -> None:
        """Announces which rows will be requested, in which order."""
        images = [self.plan.images[row] for row in rows]
        self._places = {row: index for index, row in enumerate(rows)}
        self._uses = {size: dict(use_schedule(images, size)) for size in {1, self.batch_size}}

    @property
    def needed_for(self) -> tuple[int, int]:
        """Requested rows, and pictures that they would send through the network without sharing."""
        times = 1 if self.request.upscale == 1 else 2
        rows = self._places
        return len(rows), times * sum(len(self.plan.images[row]) for row in rows)

    def check_sharing(self) -> Explanation:
        """Explains the first row that can be, and finds out whether pictures can be shared.

        Where the same row comes out otherwise from memory, or cannot, every row is explained by the
        network itself.
        """
        failed: list[ModelError] = []
        reason = next(iter(self.plan.problems.values()), "there is none")
        for row in _spread(self.plan.order):
            try:
                explanation = self._plain(row, self.request.method, self.request.options)
                break
            except ImageError as error:
                reason = str(error)
            except ModelError as error:
                failed.append(error)
                if len(failed) == _TRIED:
                    raise
        else:
            if failed:
                raise failed[0]
            raise ComparisonError(
                f"None of {len(self.plan.rows)} rows can be explained, the first because: {reason}"
            )
        request = self.request
        chosen = request_of(self.model, request.method, request.layer, request.options)
        self._chosen = tuple(method for _, method in chosen)[: len(explanation.rows)]
        self._layers = tuple(dict.fromkeys(name for row in explanation.rows for name in row.layers))
        self.shared = self._can_share() and self._agrees(row, explanation)
        self.forwards = 0
        if not self.shared:
            self._proven = (row, explanation)
        return explanation

    def explain(self, row: int) -> Explanation:
        """The explanation of a row; its ``images`` and ``pictures`` are left out where shared.

        Raises:
            SimexplainError: If it cannot be explained.
        """
        if self._proven is not None and self._proven[0] == row:
            return self._proven[1]
        self._keep.now = self._places.get(row, 0)
        assert self._chosen, "check_sharing() comes first"
        try:
            if self.shared:
                try:
                    return self._recalled(row)
                except CacheMissError:
                    pass
            return self._plain(row, self._chosen, {})
        finally:
            self._keep.release()

    def pictured(self, row: int, explanation: Explanation) -> Explanation:
        """The same with its pictures, for drawing."""
        images = self.plan.images[row]
        pictures = tuple(self.reader.picture(image) for image in images)
        views = torch.stack([self.reader.tensor(image, self.view) for image in images])
        return explanation.placed(pictures=pictures, images=views[None])

    def _can_share(self) -> bool:
        (first, *others) = self._chosen
        if isinstance(first, AVSLMaps) and isinstance(self.model, AVSL) and not others:
            self._remembering = cached_avsl(self.model, self._levels)
            return True
        self._remembering = CachedModel(self.model, self._layers, self._passes)
        return all(takes_layers(method) for method in self._chosen)

    def _agrees(self, row: int, plain: Explanation) -> bool:
        """Whether a row comes out from memory as it does from the network."""
        try:
            shared = self._recalled(row)
        except (ModelError, RuntimeError):
            return False
        finally:
            self._keep.release()
        pairs = [(shared.embeddings, plain.embeddings), (shared.distances, plain.distances)]
        for one, other in zip(shared.rows, plain.rows, strict=True):
            pairs += [(one.maps, other.maps), (one.scores, other.scores)]
        return all(
            a.shape == b.shape and bool((a - b).abs().max() <= _CLOSE * b.abs().max())
            for a, b in pairs
        )

    def _plain(self, row: int, method: Methods, options: Mapping[str, Any]) -> Explanation:
        """A row explained by the network itself."""
        images = self.plan.images[row]
        stacks = {
            size: torch.stack([self._tensor(image, size) for image in images])[None]
            for size in (self.own, self.view)
        }
        return self._explained(self.model, row, stacks, method, options)

    def _recalled(self, row: int) -> Explanation:
        """A row explained from what is cached."""
        self._images = images = self.plan.images[row]
        stacks = {size: blank(size, len(images)) for size in (self.own, self.view)}
        return self._explained(self._remembering, row, stacks, self._chosen, {})

    def _explained(
        self,
        model: SimilarityModel,
        row: int,
        stacks: Mapping[Size, Tensor],
        method: Methods,
        options: Mapping[str, Any],
    ) -> Explanation:
        """With where the maps lie in the pictures, and all that the user should know."""
        request, cut = self.request, 1 + len(self.plan.rows[row].positives)
        own, view = (
            Comparison(stack[:, 0], stack[:, 1:cut], stack[:, cut:])
            for stack in (stacks[self.own], stacks[self.view])
        )
        # What is cached needs no bound, and is requested for all pictures of a row at a time.
        bound = request.max_batch if model is self.model else None
        chosen = replace(request, method=method, options=options, max_batch=bound)
        explanation = explain_view(model, own, view, chosen)
        seen = [self.reader.seen[image] for image in self.plan.images[row]]
        notes = notes_of(self.model.preprocess, seen)
        return explanation.placed(notes, geometries=tuple(one.geometry for one in seen))

    def _tensor(self, image: int, size: Size) -> Tensor:
        def read() -> tuple[Tensor, int]:
            tensor = self.reader.tensor(image, size)
            return tensor, tensor.nbytes

        kept: Tensor = self._keep.take(("tensor", size, 1, image), read)
        return kept

    def _passes(self, size: Size, raw: bool) -> list[Use]:
        """Kept passes over the pictures of the present row, for images of one size."""
        layers = self._layers if size == self.view else ()
        source = RawVectors(self.model) if raw else self.model

        def run(images: Tensor) -> tuple[Pass, int]:
            made = cut_pass(source, images, layers)
            return made, made.bytes

        groups = [self._grouped(image, size, raw, run) for image in self._images]
        return [(made, index) for made, index in groups]

    def _levels(self, size: Size) -> list[Tensor]:
        """The feature maps of every level of AVSL for the pictures of the present row."""
        assert isinstance(self.model, AVSL)
        avsl = self.model

        def run(images: Tensor) -> tuple[list[Tensor], int]:
            maps = features_and_rows(avsl, images, None)[0]
            return maps, sum(level.nbytes for level in maps)

        groups = [self._grouped(image, size, False, run) for image in self._images]
        levels = zip(*([level[index] for level in maps] for maps, index in groups), strict=True)
        return [torch.stack(level) for level in levels]

    def _grouped(
        self, image: int, size: Size, raw: bool, run: Callable[[Tensor], tuple[Any, int]]
    ) -> tuple[Any, int]:
        """What a run gave for the group of a picture, and the place of the picture in it.

        Groups are fixed, so that what a picture gives does not depend on the rows around it.
        """
        group = image // self.batch_size

        def make() -> tuple[tuple[Any, dict[int, int]], int]:
            first = group * self.batch_size
            numbers = range(first, min(first + self.batch_size, len(self.plan.pictures)))
            readable, images = self.reader.readable(numbers, size)
            self.forwards += len(readable)
            made, cost = run(images)
            return (made, {number: index for index, number in enumerate(readable)}), cost

        made, places = self._keep.take(("pass", size, self.batch_size, group, raw), make)
        if image not in places:
            raise ImageError(self.reader.broken[image])
        return made, places[image]

    def _uses_of(self, key: Hashable) -> Sequence[int]:
        """The places in the schedule at which something kept is needed."""
        assert isinstance(key, tuple)
        _, _, size, number, *_ = key
        return self._uses.get(size, {}).get(number, ())


def _spread(rows: Sequence[int]) -> list[int]:
    """All rows, at first some that are far apart: neighbours may share what they fail on."""
    first = rows[:: max(1, len(rows) // _TRIED)]
    early = set(first)
    return [*first, *(row for row in rows if row not in early)]
