"""Rows explained and written shard by shard, over processes and hosts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

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
from simexplain.batching.folder import (
    FIGURES,
    HEATMAPS,
    BatchFolder,
    TableRecord,
    explained,
    failed,
    maps_name,
)
from simexplain.batching.planning import BatchPlan
from simexplain.comparison import Comparison
from simexplain.data.folders import Progress
from simexplain.data.images import Picture, read_picture
from simexplain.data.preprocessing import Preprocess, Seen, notes_of, prepared
from simexplain.errors import (
    ComparisonError,
    ImageError,
    ModelError,
    OutputError,
    SimexplainError,
    first_line,
)
from simexplain.explaining_tensors import MapRequest, explain_view
from simexplain.explanation import Explanation
from simexplain.losses.objective import ProcessGroup
from simexplain.methods import MethodLike, takes_layers
from simexplain.methods.avsl_maps import AVSLMaps
from simexplain.methods.raw_vectors import RawVectors
from simexplain.methods.rows import Methods, request_of
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_runs import features_and_rows
from simexplain.models.base import SimilarityModel
from simexplain.results.result import content_of

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
        # One and the same where nothing is upscaled, so that it is embedded once.
        explanation = explain_view(model, own, own if request.upscale == 1 else view, chosen)
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


TENSORS = ("maps", "weights", "scores", "distances", "moved", "unexplained")
"""What a shard has of each row under ``KEY/NAME``, beside ``KEY/layer_N`` of several layers."""
OF_ROWS = ("maps", "weights", "scores")
"""What it has of each further row of maps, under ``KEY/rowN_NAME``."""
PICTURE = "picture"
"""What a shard has of each picture, once for all rows: its embedding under ``picture/NUMBER``."""


@dataclass(frozen=True)
class ShardWriter:
    """Explains shards and writes them, with heatmaps of pictures and figures of rows if wanted."""

    explainer: RowExplainer
    folder: BatchFolder
    pictures: bool = False
    figures: bool = False

    def write(self, shard: int, explained_one: Callable[[], None]) -> None:
        """Explains the rows of a shard and writes them, calling ``explained_one`` after each row.

        A row that cannot be explained becomes a record with the reason.
        """
        plan = self.explainer.plan
        records: list[TableRecord] = []
        tensors: dict[str, Tensor] = {}
        for row in plan.shards[shard]:
            explanation = self._explained(row)
            if isinstance(explanation, str):
                records.append(failed(row, plan.rows[row], explanation))
            else:
                key = str(row)
                file, images = maps_name(shard), plan.images[row]
                records.append(explained(row, plan.rows[row], images, explanation, (file, key)))
                tensors |= {
                    f"{key}/{name}": value for name, value in tensors_of(explanation).items()
                }
                for image, embedding in zip(images, explanation.embeddings[0], strict=True):
                    tensors.setdefault(f"{PICTURE}/{image}", embedding.detach().cpu().clone())
            explained_one()
        self.folder.write_shard(shard, records, tensors)

    def _explained(self, row: int) -> Explanation | str:
        """A row's explanation, or why there is none."""
        try:
            try:
                return self._tried(row)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                # What strikes from outside, such as the end of another process, is not the row's
                # fault, and must not stand in the table: what is, comes again.
                return self._tried(row)
        except (torch.OutOfMemoryError, OutputError):
            raise
        except SimexplainError as error:
            return str(error)
        except RuntimeError as error:  # what a network raises of pictures that it cannot take
            if "memory" in str(error):
                raise
            return f"The network failed ({first_line(error)})."

    def _tried(self, row: int) -> Explanation:
        explanation = self.explainer.explain(row)
        if self.pictures or self.figures:
            self._draw(row, self.explainer.pictured(row, explanation))
        return explanation

    def _draw(self, row: int, explanation: Explanation) -> None:
        if self.figures:
            self.folder.write(f"{FIGURES}/{row:06d}.png", content_of(explanation.figure()))
        for index, role in enumerate(explanation.roles if self.pictures else ()):
            drawn = content_of(explanation.heated(index))
            self.folder.write(f"{HEATMAPS}/{row:06d}_{index}_{role}.png", drawn)


def tensors_of(explanation: Explanation) -> dict[str, Tensor]:
    """The tensors of an explanation of one row, on the CPU."""
    named = {name: getattr(explanation, name) for name in TENSORS} | _layers_of(explanation, "")
    for number, row in enumerate(explanation.others, start=2):
        named |= {f"row{number}_{name}": getattr(row, name) for name in OF_ROWS}
        named |= _layers_of(row, f"row{number}_")
    # A copy of its own each: safetensors refuses tensors that share memory.
    return {
        name: value[0].detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in named.items()
        if value is not None
    }


def _layers_of(row: Explanation, mark: str) -> dict[str, Tensor]:
    """The maps of each layer, where they are not those of the row."""
    if len(row.layers) == 1 and torch.equal(row.layer_maps[row.layers[0]], row.maps):
        return {}
    layers = enumerate(row.layers)
    return {f"{mark}layer_{number}": row.layer_maps[layer] for number, layer in layers}


_PATIENCE = timedelta(days=30)
"""How long a process that is done waits for the others, whose rows may be larger."""


def processes(devices: int | None, nodes: int) -> tuple[int, int]:
    """Devices on each host and hosts: as requested, or as ``torchrun`` has started processes."""
    if (devices is not None and devices < 1) or nodes < 1:
        raise ModelError(f"Expected at least one device and one node, got {devices} and {nodes}.")
    count = (devices or 1, nodes)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        if devices not in (None, local) or nodes not in (1, world // local):
            raise ModelError(
                f"Expected {local} devices on each of {world // local} nodes, as torchrun started "
                f"processes, got {devices} on {nodes}; leave --devices and --nodes away."
            )
        count = (local, world // local)
    elif count == (1, 1) and ProcessGroup.present().world > 1:
        raise ModelError(
            "Expected a batch on as many devices as an earlier run of this script, which goes on"
            f" in {ProcessGroup.present().world} processes, got one device; begin it in a script of"
            " its own."
        )
    if count != (1, 1) and find_spec("lightning") is None:
        raise ModelError(
            "Expected lightning for several processes, which is not installed; run pip install "
            "'simexplain[train]'."
        )
    return count


def share(shards: Sequence[int], processes: ProcessGroup) -> list[int]:
    """The shards of one process: neighbours, since they share pictures."""
    size, more = divmod(len(shards), processes.world)
    start = processes.rank * size + min(processes.rank, more)
    return list(shards[start : start + size + (processes.rank < more)])


def write_alone(writer: ShardWriter, shards: Sequence[int], progress: Progress | None) -> None:
    """Writes shards in this process."""
    listen = _begun(writer, shards, progress)
    with torch.inference_mode(False), torch.enable_grad():
        for shard in shards:
            writer.write(shard, listen)


def write_together(
    writer: ShardWriter,
    shards: Sequence[int],
    progress: Progress | None,
    *,
    accelerator: str,
    devices: int,
    nodes: int,
) -> None:
    """Writes shards in several processes, as the first one decides."""
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader

    from simexplain.training.module import quiet_trainer

    class Prediction(LightningModule):  # type: ignore[misc]
        """Every batch is the number of a shard; the prediction is on disk."""

        listen: Callable[[], None]

        def predict_dataloader(self) -> Any:
            strategy = self.trainer.strategy
            processes = ProcessGroup(strategy.global_rank, strategy.world_size)
            own = share(strategy.broadcast(list(shards)), processes)
            self.listen = _begun(writer, own, progress)
            numbers: Any = own
            return DataLoader(numbers, batch_size=None)

        def predict_step(self, shard: Tensor | int, *_: Any) -> Tensor:
            writer.explainer.model.to(self.trainer.strategy.root_device)
            with torch.inference_mode(False), torch.enable_grad():
                writer.write(int(shard), self.listen)
            return torch.tensor(int(shard))

    with quiet_trainer(
        accelerator=accelerator, devices=devices, num_nodes=nodes,
        strategy=DDPStrategy(timeout=_PATIENCE), inference_mode=False,
    ) as trainer:  # fmt: skip
        trainer.predict(Prediction(), return_predictions=False)


def together() -> None:
    """Waits until all processes are here."""
    if ProcessGroup.present().world > 1:
        distributed.barrier()


def sums(*own: float) -> list[float]:
    """The sums of numbers over all processes."""
    if ProcessGroup.present().world == 1:
        return list(own)
    gathered: list[Any] = [None] * ProcessGroup.present().world
    distributed.all_gather_object(gathered, own)
    return [sum(column) for column in zip(*gathered, strict=True)]


def _begun(
    writer: ShardWriter, shards: Sequence[int], progress: Progress | None
) -> Callable[[], None]:
    """Tells the explainer which rows will come; gives what is called after each row."""
    parts = writer.explainer.plan.shards
    rows = [row for shard in shards for row in parts[shard]]
    writer.explainer.begin(rows)
    done = itertools.count(1)

    def listen() -> None:
        if progress is not None:
            progress(next(done), len(rows))

    return listen
