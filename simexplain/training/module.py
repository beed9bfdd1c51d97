"""The training step for lightning, and its trainer, which leaves the caller's state as it was."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from simexplain.errors import ModelError
from simexplain.losses.objective import Objective, ProcessGroup
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.networks import preserve_state
from simexplain.training.building import (
    check_present,
    clip_groups,
    drop_idle,
    mining_factor,
    optimiser_for,
    set_rates,
)
from simexplain.training.options import TrainOptions
from simexplain.training.run_folder import TrainState, step_seed

Batches = Callable[[int], Sequence[Sequence[Any]]]
"""All batches of an epoch, as indices of the training set; always as many."""


class Recording(Protocol):
    """Callbacks of a module during a run; all three may take their time."""

    def begun(self, module: TrainingModule) -> None:
        """Before the first step."""

    def stepped(self, module: TrainingModule) -> None:
        """After every step."""

    def epoch_over(self, module: TrainingModule) -> None:
        """After the last step of an epoch; the state has moved to the next one."""


class TrainingModule(LightningModule):  # type: ignore[misc]
    """Trains a model on an objective; use it in any lightning ``Trainer``.

    Give the trainer ``use_distributed_sampler=False`` and ``reload_dataloaders_every_n_epochs=1``:
    batches come whole from ``batches`` and are shared by the processes in the order of ranks, and
    the first loader begins at ``progress``. Nothing is drawn but from the seed, the epoch and the
    step, so that a resumed run equals one that never stopped.

    Attributes:
        model: What is trained.
        objective: On what.
        options: How.
        progress: The state of the run.
        record: Told of what happens.
        steps: Of an epoch.
        latest: The losses of the last step by name, means over all processes.
        means: Those of the last epoch.
    """

    def __init__(
        self,
        model: SimilarityModel,
        objective: Objective,
        options: TrainOptions,
        *,
        data: Dataset[Any],
        batches: Batches,
        record: Recording | None = None,
    ) -> None:
        """Takes what is trained.

        Args:
            model: In any mode; while it trains it is in training mode.
            objective: Its terms named ``mining`` and ``bce_mining`` follow the mining schedule.
            options: How.
            data: The training set; items have ``image``, ``label`` and maybe ``mask``.
            batches: All batches of an epoch; every epoch has as many as the first.
            record: Told of what happens, in the first process alone.
        """
        super().__init__()
        self.model, self.objective, self.options = model, objective, options
        self.progress, self.record = TrainState(), record
        self.latest: dict[str, Tensor] = {}
        self.means: dict[str, float] = {}
        self._resumed: dict[str, Any] | None = None
        self._data, self._batches = data, batches
        self.steps = len(batches(0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser; learning rates are set at every step, without a scheduler."""
        return optimiser_for(self.model, self.objective, self.options)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """What is left of the present epoch, this process's share of every batch."""
        processes = ProcessGroup.present()
        rest = self._batches(self.progress.epoch)[self.progress.batch :]
        return DataLoader(
            self._data,
            batch_sampler=[share(batch, processes) for batch in rest],
            num_workers=self.options.workers,
            # Workers' seeds are drawn even where none is used; not from the caller's state.
            generator=torch.Generator().manual_seed(0),
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Learning rates and seed of this step, modes of the layers."""
        optimiser = self.optimizers(use_pl_optimizer=False)
        set_rates(optimiser, self.options, self.progress.step, self.steps)
        torch.manual_seed(step_seed(self.options.seed, self.progress.step, self.global_rank))
        set_training(self.model, freeze_bn=self.options.freeze_bn)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        losses = self._present()(
            self.model,
            batch["image"],
            batch["label"],
            masks=batch.get("mask"),
            seed=step_seed(self.options.seed, self.progress.step),
        )
        total: Tensor = losses.total
        self.latest = {"loss": total.detach(), **losses.parts, **self._inner_parts()}
        return total

    def _inner_parts(self) -> dict[str, Tensor]:
        """The parts that terms report of themselves, such as the levels of AVSL."""
        return {
            f"{name}/{part}": value.detach()
            for name, term in self.objective.terms.items()
            for part, value in getattr(term, "latest", {}).items()
        }

    def _present(self) -> Objective:
        """The terms that count at this step, with their weights at it."""
        factor = mining_factor(self.options, self.progress.step, self.steps)
        weights = {
            name: weight * (factor if name in ("mining", "bce_mining") else 1.0)
            for name, weight in self.objective.weights.items()
        }
        terms: dict[str, Any] = dict(self.objective.terms.items())
        return Objective({name: (w, terms[name]) for name, w in weights.items() if w})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Warm-up of the heads: the network gets no gradient, nor do its moments."""
        drop_idle(optimizer)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any
    ) -> None:
        """Each group by itself."""
        clip_groups(optimizer, self.options.clip)

    def on_train_start(self) -> None:
        """Resumes from the state, if there is one, and starts the record."""
        if self._resumed is not None:
            self.optimizers(use_pl_optimizer=False).load_state_dict(self._resumed["optimiser"])
            self.trainer.precision_plugin.load_state_dict(self._resumed["precision"])
            self._resumed = None
        self._notify("begun")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts the step."""
        processes = ProcessGroup.present()
        self.latest = {name: processes.mean(value) for name, value in self.latest.items()}
        if not bool(self.latest["loss"].isfinite()):
            raise ModelError(
                f"The loss stopped being finite at step {self.progress.step + 1}; begin anew with "
                "smaller learning rates (--lr, --head-lr, --proxy-lr) or with --clip."
            )
        self.progress.count(self.latest)
        self._notify("stepped")

    def on_train_epoch_end(self) -> None:
        """Turns to the next epoch."""
        self.means = self.progress.means()
        self.progress.turn()
        self._notify("epoch_over")

    def _notify(self, what: str) -> None:
        """The first process records; the others wait for it where that takes long."""
        if self.record is not None and self.trainer.is_global_zero:
            getattr(self.record, what)(self)
        if what != "stepped":
            self.trainer.strategy.barrier()

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which :meth:`restore` goes on exactly here."""
        return {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimiser": self.optimizers(use_pl_optimizer=False).state_dict(),
            "precision": self.trainer.precision_plugin.state_dict(),
            "place": self.progress.to_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state`; call it before the trainer starts."""
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        self.progress = TrainState.from_state(state["place"])
        self._resumed = state


def share(batch: Sequence[Any], processes: ProcessGroup) -> list[Any]:
    """The part of a batch that one process computes; those of all ranks in order are the batch."""
    each = len(batch) // processes.world
    return list(batch[processes.rank * each : (processes.rank + 1) * each])


def set_training(model: nn.Module, *, freeze_bn: bool) -> None:
    """Training mode, with batch norm on its own statistics where they are frozen."""
    model.train()
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False


_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
_LOGS = ("lightning.pytorch", "lightning.fabric", "lightning_fabric", "pytorch_lightning")


def run_epochs(module: TrainingModule, options: TrainOptions) -> None:
    """Trains what is left of the epochs; several devices share every batch.

    Modes and random state of the caller, Python's warnings and what Ctrl-C does are as before.
    Lightning's environment variables for several processes stay: these run the rest of the script
    together, and the next run on several devices finds them by the variables.
    """
    left = options.epochs - module.progress.epoch
    if left < 1:
        return
    several = options.devices * options.nodes > 1
    ddp = "ddp_find_unused_parameters_true" if several and has_idle(module.model) else "ddp"
    with quiet_trainer(
        max_epochs=left, accelerator=options.accelerator, devices=options.devices,
        num_nodes=options.nodes, strategy=ddp if several else "auto",
        precision=_PRECISIONS[options.precision], reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
    ) as trainer:  # fmt: skip
        trainer.fit(module)


@contextmanager
def quiet_trainer(**arguments: Any) -> Iterator[Trainer]:
    """A lightning trainer that writes and shows nothing; global state is restored afterwards.

    Raises:
        KeyboardInterrupt: On Ctrl-C, which lightning turns into the end of the program.
    """
    with restored_globals():
        trainer = Trainer(
            use_distributed_sampler=False, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **arguments,
        )  # fmt: skip
        try:
            yield trainer
        except SystemExit as error:
            if trainer.interrupted:
                raise KeyboardInterrupt from error
            raise


def check_devices(options: TrainOptions) -> None:
    """Refuses what cannot be done on the devices and in the processes that there are."""
    if options.devices * options.nodes == 1 and ProcessGroup.present().world > 1:
        raise ModelError(
            "Expected a run on as many devices as an earlier one of this script, which goes on in"
            f" {ProcessGroup.present().world} processes, got one device; begin it in a script of"
            " its own."
        )
    check_present(options)
    card = torch.cuda.is_available() or torch.backends.mps.is_available()
    if options.precision == "16" and options.accelerator == "auto" and not card:
        raise ModelError(
            "Expected precision 32 or bf16 on a CPU, got 16 without a GPU; say --precision bf16."
        )


def has_idle(model: SimilarityModel) -> bool:
    """Whether some parameters have no part in the embedding, so that they get no gradient.

    Layers above the highest level of an AVSL model are an example. DDP needs the flag.
    """
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(model, AVSL):
        reliability = {id(parameter) for parameter in (*model.alphas, *model.betas)}
        if reliability and model.options.inference not in ("full", "reliable"):
            return True
        own = [parameter for parameter in own if id(parameter) not in reliability]
    with torch.enable_grad(), preserve_state(model):
        rows = model.embed(model.example())
        gradients = torch.autograd.grad(rows.sum(), own, allow_unused=True)
    return any(gradient is None for gradient in gradients)


@contextmanager
def restored_globals() -> Iterator[None]:
    """Silences lightning, and puts back what it and training change."""
    loggers = [logging.getLogger(name) for name in _LOGS]
    levels = [logger.level for logger in loggers]
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=cards), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning(\.|$|_)")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if main:
                signal.signal(signal.SIGINT, handler)
