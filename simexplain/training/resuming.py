"""Going on with a run: with its settings and its data, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simexplain.data.dataset_split import DataSplit
from simexplain.errors import DAMAGED, ModelError, OutputError
from simexplain.renaming import todays
from simexplain.training.datasource import Source
from simexplain.training.options import TrainOptions, with_options
from simexplain.training.recipes import recipe_options
from simexplain.training.run_folder import OPTIONS, RunFolder, check_folder

if TYPE_CHECKING:
    from simexplain.training.module import TrainingModule
    from simexplain.training.recording import Recorder

_SMALL = 0.01

MAY_CHANGE = (
    "epochs",
    "workers",
    "accelerator",
    "devices",
    "nodes",
    "attention_triplets",
    "checkpoint_every",
)
"""What a resumed run may have otherwise than the run that it goes on with."""


def resolved(
    recipe: str | None, settings: Mapping[str, Any], state: Mapping[str, Any] | None
) -> TrainOptions:
    """The settings of a run: those given, else the recipe's, else those it was begun with.

    Raises:
        ModelError: If one cannot be used, or is not what the run to resume was begun with.
    """
    settings = todays(settings, [field.name for field in fields(TrainOptions)])
    if state is None:
        return with_options(recipe_options(recipe) if recipe else TrainOptions(), settings)
    begun = TrainOptions.from_json(state["options"])
    wanted = with_options(recipe_options(recipe) if recipe else begun, settings)
    wanted = replace(wanted, classes_per_batch=wanted.classes_per_batch or begun.classes_per_batch)
    differing = [
        name
        for name, value in wanted.to_json().items()
        if value != begun.to_json()[name] and name not in MAY_CHANGE
    ]
    if differing:
        name = differing[0]
        raise ModelError(
            f"The run was begun with {name}={getattr(begun, name)!r}, and cannot go on with "
            f"{getattr(wanted, name)!r}; leave it away or begin another run."
        )
    return wanted


def begun_source(out: Path) -> Source:
    """How the data of a run were read, to go on with it.

    Raises:
        OutputError: If there is none to be resumed.
    """
    check_folder(out, resume=True, force=False)
    source = RunFolder(out).read_checkpoint()["source"]
    return Source.from_json(source) if source else Source()


def check_same(
    folder: RunFolder, state: Mapping[str, Any], known: Mapping[str, Any], data: object
) -> None:
    """Whether a run can go on with these data and settings.

    Raises:
        OutputError: If it was begun with other pictures or masks.
        ModelError: If it has more epochs behind it than requested.
    """
    if state["data"] != known["data"]:
        what = data.name if isinstance(data, DataSplit) else data
        raise OutputError(
            f"The run in '{folder.path}' was trained on other pictures or masks than '{what}' has "
            "now; give it the same data, read in the same way, or begin another run."
        )
    done, wanted = state["place"]["epoch"], known["options"]["epochs"]
    if done > wanted:
        raise ModelError(
            f"The run has done {done} epochs already, and cannot go on to {wanted}; ask for at "
            f"least {done} or begin another run."
        )


def jumps(state: Mapping[str, Any], options: TrainOptions) -> tuple[str, ...]:
    """A warning where the learning rate of a resumed run jumps, since the schedule is another one.

    Args:
        state: Of the run to resume.
        options: What it goes on with.
    """
    from simexplain.training.optimising import SCHEDULES

    begun, done = TrainOptions.from_json(state["options"]), state["place"]["epoch"]
    schedule = SCHEDULES[options.schedule]
    before, after = schedule(begun, done), schedule(options, done)
    if abs(after - before) < _SMALL:
        return ()
    return (
        f"The {options.schedule} schedule reaches its end after {options.epochs} epochs now, not "
        f"{begun.epochs}, so after epoch {done} the learning rate goes from {before:.0%} to "
        f"{after:.0%} of its start; a run of {options.epochs} epochs from the beginning differs.",
    )


def go_on(module: TrainingModule, state: dict[str, Any], record: Recorder, *, write: bool) -> None:
    """Restores a run; what it has now of settings that may change is written."""
    from simexplain.training.optimising import optimiser_for

    try:
        module.restore(state)
        # The module loads this into its own once the trainer has begun, which is too late to tell.
        optimiser = optimiser_for(module.model, module.objective, module.options)
        optimiser.load_state_dict(state["optimiser"])
    except (RuntimeError, *DAMAGED) as error:
        raise record.folder.damaged(error) from error
    if write:
        record.folder.tidy()
        record.folder.write_json(OPTIONS, record.about)
