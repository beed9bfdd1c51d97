"""The shards of a batch: rows explained, records written, over processes and hosts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, distributed

from simexplain.batching.folder import (
    FIGURES,
    HEATMAPS,
    BatchFolder,
    TableRecord,
    explained,
    failed,
    maps_name,
)
from simexplain.batching.row_explaining import RowExplainer
from simexplain.data.folders import Progress
from simexplain.errors import ModelError, OutputError, SimexplainError, first_line
from simexplain.explanation import Explanation
from simexplain.losses.objective import ProcessGroup
from simexplain.results.result import content_of

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
