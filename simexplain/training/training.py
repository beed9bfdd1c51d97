"""The verb: train a network on a data set, into a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simexplain.data.checking import check_training
from simexplain.data.dataset_split import DataSplit
from simexplain.data.sampling import ClassBalanced
from simexplain.data.training_set import TrainingImages
from simexplain.errors import ImageError, ModelError, OutputError
from simexplain.explanation import versions
from simexplain.models.writing import check_savable
from simexplain.training.datasource import Source, counts_of, fingerprint, searchable
from simexplain.training.options import TrainOptions, with_options
from simexplain.training.place import Place
from simexplain.training.recipes import recipe_options
from simexplain.training.result import TrainResult
from simexplain.training.run_folder import OPTIONS, RESULTS, RunFolder, check_folder, first_process

if TYPE_CHECKING:
    from simexplain.training.module import TrainingModule
    from simexplain.training.recording import Listeners

NEEDED = {"lightning": "lightning", "pytorch_metric_learning": "pytorch-metric-learning"}
MAY_CHANGE = ("epochs", "workers", "accelerator", "devices", "nodes", "watch", "checkpoint_every")
"""What a resumed run may have otherwise than the run that it goes on with."""


def train(
    data: str | Path | DataSplit,
    *,
    out: str | Path,
    source: Source | None = None,
    recipe: str | None = None,
    resume: bool = False,
    force: bool = False,
    listeners: Listeners | None = None,
    **settings: Any,
) -> TrainResult:
    """Trains a network so that distances between its embeddings mean dissimilarity.

    Bad data, settings and folders are refused before anything is loaded or written. Every epoch
    the retrieval of the held-out pictures is measured; the best model is ``model.pt``, which
    ``load_model`` and the command line take as it is. With the same settings, and one thread on a
    CPU, results are the same bit for bit, however often a run was killed and resumed.

    With several devices lightning starts the calling script again for each of them, so that a
    script has to call this below ``if __name__ == "__main__":``; every one of them gets the result.

    Args:
        data: A folder or a file, read as ``source`` says, or a data set that was read before.
        out: The folder of the run.
        source: How ``data`` is read; as a folder of class folders unless given.
        recipe: A name in ``RECIPES``, whose settings count where none are given.
        resume: Go on with the run in ``out`` from its last checkpoint, with its settings.
        force: Replace a run in ``out``.
        listeners: Whom to tell how it goes.
        **settings: Fields of :class:`TrainOptions`.

    Raises:
        ImageError: If the data cannot be trained on: all reasons at once.
        ModelError: If a setting, the recipe or the network cannot be used, or a package is missing.
        OutputError: If ``out`` is taken, cannot be written, or has nothing to resume.
        KeyboardInterrupt: On Ctrl-C; the last checkpoint stands.
    """
    check_extra()
    from simexplain.training.fitting_loop import run_epochs

    folder, read_as, first = RunFolder(Path(out)), source or Source(), first_process()
    if first:
        check_folder(folder.path, resume=resume, force=force)
    state = folder.read_checkpoint() if resume else None
    options = resolved(recipe, settings, state)
    split = data if isinstance(data, DataSplit) else read_as.read(data)
    options = options.settled(len(split.classes))
    warnings = checked(split, options, listeners)
    known = {"options": options.to_json(), "data": fingerprint(split)}
    if state is not None and state["data"] != known["data"]:
        raise OutputError(
            f"The run in '{folder.path}' was trained on other pictures than '{data}' has now; "
            "give it the same data or begin another run."
        )
    module = prepared(split, options, folder, known, listeners)
    if state is not None:
        module.restore(state)
        if first:
            folder.tidy()
    elif first:
        folder.begin()
        folder.write_json(OPTIONS, {**known, **described(split, options), "recipe": recipe})
    run_epochs(module, options)
    return _finished(folder, options, warnings, write=first)


def check_extra() -> None:
    """Says what to install where something is missing.

    Raises:
        ModelError: If so.
    """
    missing = [name for module, name in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ModelError(
            f"Expected {' and '.join(missing)} for training, which is not installed; run "
            "pip install 'simexplain[train]'."
        )


def resolved(
    recipe: str | None, settings: Mapping[str, Any], state: Mapping[str, Any] | None
) -> TrainOptions:
    """The settings of a run: those given, else the recipe's, else those it was begun with.

    Raises:
        ModelError: If one cannot be used, or is not what the run to resume was begun with.
    """
    if state is None:
        return with_options(recipe_options(recipe) if recipe else TrainOptions(), settings)
    begun = TrainOptions.from_json(state["options"])
    wanted = with_options(recipe_options(recipe) if recipe else begun, settings)
    wanted = replace(wanted, classes=wanted.classes or begun.classes)
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


def checked(
    split: DataSplit, options: TrainOptions, listeners: Listeners | None
) -> tuple[str, ...]:
    """What is odd about the data, all of which can be trained on.

    Raises:
        ImageError: If it cannot: all reasons at once.
    """
    work = listeners.work if listeners is not None else None
    warnings = check_training(
        split,
        classes=options.classes,
        each=options.each,
        progress=None if work is None else partial(work, "Checking pictures"),
    )
    if options.mask_weight and not any(record.mask for record in split.train):
        raise ImageError(
            f"Expected masks for a mask weight of {options.mask_weight:g}, but no picture of "
            f"'{split.name}' has one; say where they are (--masks, Source(masks=))."
        )
    if split.queries and not searchable(split, grouped=options.grouped):
        raise ImageError(
            f"Expected a test picture of '{split.name}' with another of its class to be found, got "
            "none; check the classes to test on and the groups."
        )
    return warnings


def prepared(
    split: DataSplit,
    options: TrainOptions,
    folder: RunFolder,
    known: Mapping[str, Any],
    listeners: Listeners | None = None,
) -> TrainingModule:
    """The module that trains, with network, objective, batches and record; nothing is written.

    Raises:
        ModelError: If the network or the objective cannot be built.
    """
    from simexplain.training.building import build_model, build_objective
    from simexplain.training.module import TrainingModule
    from simexplain.training.recording import Listeners, Recorder
    from simexplain.training.watching import watched_triplets

    model = build_model(options)
    check_savable(model)
    objective = build_objective(model, options, len(split.classes))
    images = TrainingImages(
        split.train, options.augmentation, model.preprocess, options.seed, classes=split.classes
    )
    balanced = ClassBalanced(
        labels=images.labels,
        classes=options.classes,
        each=options.each,
        seed=options.seed,
        steps=options.steps or None,
    )
    record = Recorder(
        folder,
        split,
        options,
        watched_triplets(split.queries, options.watch, options.seed),
        known,
        listeners or Listeners(),
    )
    return TrainingModule(
        model, objective, options, data=images, batches=balanced.indices, record=record
    )


def described(split: DataSplit, options: TrainOptions) -> dict[str, Any]:
    """What a run is made of, plain JSON values."""
    installed = {name: version(name) for name in NEEDED.values()}
    return {
        "schema": 1,
        "options": options.to_json(),
        "pictures": counts_of(split),
        "versions": {**versions(), **installed},
    }


def _finished(
    folder: RunFolder, options: TrainOptions, warnings: tuple[str, ...], *, write: bool
) -> TrainResult:
    """The result, from what the first of all processes has written."""
    place = Place.from_state(folder.read_checkpoint()["place"])
    files = folder.files() | {"results": str(folder.path / RESULTS)}
    result = TrainResult(
        folder=folder.path,
        options=options,
        rows=tuple(place.rows),
        best_epoch=place.best_epoch,
        best=place.best or 0.0,
        files=files,
        warnings=warnings,
    )
    if not result.improved:
        said = "Training did not improve retrieval over the untrained network."
        result = replace(result, warnings=(*warnings, said))
    if write:
        folder.write_json(RESULTS, result.to_json())
    return result
