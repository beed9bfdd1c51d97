"""Lightning's trainer, quietly: nothing of it is seen, and the caller finds all as it was."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer

from simexplain.errors import ModelError
from simexplain.losses.distributed import ProcessGroup
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.networks import preserve_state
from simexplain.training.building import check_present
from simexplain.training.module import TrainingModule
from simexplain.training.options import TrainOptions

_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
_LOGS = ("lightning.pytorch", "lightning.fabric", "lightning_fabric", "pytorch_lightning")


def run_epochs(module: TrainingModule, options: TrainOptions) -> None:
    """Trains what is left of the epochs; several devices share every batch.

    Modes and random state of the caller, Python's warnings and what Ctrl-C does are as before.
    Lightning's environment variables for several processes stay: these run the rest of the script
    together, and the next run on several devices finds them by the variables.

    Raises:
        KeyboardInterrupt: On Ctrl-C, after the devices were given back.
    """
    left = options.epochs - module.progress.epoch
    if left < 1:
        return
    with restored_globals():
        trainer = Trainer(max_epochs=left, **trainer_options(module.model, options))
        try:
            trainer.fit(module)
        except SystemExit as error:
            if trainer.interrupted:
                raise KeyboardInterrupt from error
            raise


def check_devices(options: TrainOptions) -> None:
    """Refuses what cannot be done on the devices and in the processes that there are.

    Raises:
        ModelError: If half precision would run on a CPU, where lightning takes bf16 for it, or one
            device is requested in a script that several processes run.
    """
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


def trainer_options(model: SimilarityModel, options: TrainOptions) -> dict[str, Any]:
    """The arguments of lightning's ``Trainer``, beside the number of epochs."""
    strategy = "auto"
    if options.devices * options.nodes > 1:
        strategy = "ddp_find_unused_parameters_true" if has_idle(model) else "ddp"
    return {
        "accelerator": options.accelerator,
        "devices": options.devices,
        "num_nodes": options.nodes,
        "strategy": strategy,
        "precision": _PRECISIONS[options.precision],
        "use_distributed_sampler": False,
        "reload_dataloaders_every_n_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }


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
