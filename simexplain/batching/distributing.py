"""Shards over processes and hosts, by lightning's distributed prediction."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, distributed

from simexplain.batching.shards import ShardWriter
from simexplain.errors import ModelError
from simexplain.losses.distributed import ProcessGroup

_PATIENCE = timedelta(days=30)
"""How long a process that is done waits for the others, whose rows may be larger."""

Progress = Callable[[int, int], None]


def processes(devices: int | None, nodes: int) -> tuple[int, int]:
    """Devices on each host and hosts: as requested, or as ``torchrun`` has started processes.

    Raises:
        ModelError: If the two disagree, a number is below one, lightning is not installed for
            several processes, or one device is requested in a script that several processes run.
    """
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
    """Writes shards in several processes, as the first one decides.

    Raises:
        KeyboardInterrupt: On Ctrl-C; finished shards stand.
    """
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader

    from simexplain.training.fitting_loop import restored_globals

    class Prediction(LightningModule):  # type: ignore[misc]
        """Every batch is the number of a shard; the prediction is on disk."""

        listen: Callable[[int], None]

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

    with restored_globals():
        trainer = Trainer(
            accelerator=accelerator, devices=devices, num_nodes=nodes,
            strategy=DDPStrategy(timeout=_PATIENCE), use_distributed_sampler=False,
            inference_mode=False, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        try:
            trainer.predict(Prediction(), return_predictions=False)
        except SystemExit as error:
            if trainer.interrupted:
                raise KeyboardInterrupt from error
            raise


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
) -> Callable[[int], None]:
    """Tells the explainer which rows will come; gives what is called after each row."""
    parts = writer.explainer.plan.shards
    rows = [row for shard in shards for row in parts[shard]]
    writer.explainer.begin(rows)
    done = 0

    def listen(_: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(rows))

    return listen
