"""The verb: train a network on a data set, into a folder, or resume that exactly."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from simexplain.arguments import typed
from simexplain.data.checking import check_training, check_views
from simexplain.data.dataset_split import ALPHA, DataSplit, everything, relative
from simexplain.data.datasets import read_dataset
from simexplain.data.folders import Progress, Record
from simexplain.data.training_set import AUGMENTATIONS, ClassBalanced, TrainingImages
from simexplain.errors import DAMAGED, ImageError, ModelError, OutputError
from simexplain.explanation import versions
from simexplain.models.writing import check_savable
from simexplain.renaming import todays
from simexplain.training.options import (
    TrainOptions,
    best_column,
    idle_options,
    left_out,
    titled,
    with_options,
)
from simexplain.training.recipes import recipe_named
from simexplain.training.run_folder import (
    FOLDERS,
    OPTIONS,
    RESULTS,
    RunFolder,
    TrainResult,
    TrainState,
    check_folder,
    first_process,
)

if TYPE_CHECKING:
    from simexplain.training.module import TrainingModule
    from simexplain.training.recording import Listeners, Recorder


@dataclass(frozen=True)
class Source:
    """How a data set is read; see ``read_dataset``.

    Attributes:
        kind: A name in ``DATASETS``.
        train_share: Share of the classes to train on, where the data set does not say.
        group: The rule of groups, or None.
        masks: A folder of masks, ``alpha``, or None.
    """

    kind: str = "folder"
    train_share: float = 0.5
    group: str | None = None
    masks: str | Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_json` makes an equal source, in any folder."""
        masks = self.masks
        if masks is not None and masks != ALPHA:
            masks = str(Path(masks).resolve())
        return {**asdict(self), "masks": masks}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Source:
        """The counterpart of :meth:`to_json`."""
        return cls(**values)

    def read(self, root: str | Path) -> DataSplit:
        """The data set; what does not match in it is kept for ``check_training``."""
        return read_dataset(
            self.kind, root, train_share=self.train_share, group=self.group, masks=self.masks,
            strict=False,
        )  # fmt: skip


def read_data(
    data: str | Path | DataSplit, source: Source | None, begun: Mapping[str, Any] | None
) -> tuple[DataSplit, dict[str, Any] | None]:
    """The data of a run and how they were read, for a checkpoint: as given, or as begun before."""
    if isinstance(data, DataSplit):
        return data, None
    chosen = source or (Source.from_json(begun) if begun else Source())
    return chosen.read(data), chosen.to_json()


def check_apart(folder: Path, data: str | Path | DataSplit, split: DataSplit) -> None:
    """Refuses a run within the data: its own pictures would be trained on by the next one."""
    own = folder.resolve()
    whole = Path() if isinstance(data, DataSplit) else Path(data)
    within = not isinstance(data, DataSplit) and whole.is_dir()
    if within and own.is_relative_to(whole.resolve()):
        raise OutputError(
            f"'{folder}' lies within the data '{whole}', where the next run would take what it "
            "draws for a class; choose a folder outside."
        )
    files = (path for r in everything(split) for path in (r.path, r.mask) if path is not None)
    # Names never contain a NUL; check_training reports it.
    parents = [path for path in {file.parent for file in files} if "\0" not in str(path)]
    kept = [own / name for name in FOLDERS]
    inside = [p for p in sorted(parents) if any(p.resolve().is_relative_to(k) for k in kept)]
    if inside:
        raise OutputError(
            f"There are pictures of the data in '{inside[0]}', where the run in '{folder}' keeps "
            "its own files; choose another folder."
        )


def parts_of(split: DataSplit) -> dict[str, tuple[Record, ...]]:
    """The pictures by what they are for; no gallery where queries are searched themselves."""
    gallery = {} if split.gallery is None else {"gallery": split.gallery}
    return {"train": split.train, "queries": split.queries, **gallery}


def fingerprint(split: DataSplit, progress: Progress | None = None) -> str:
    """The same for the same pictures and masks in the same classes, wherever they lie."""
    digest, known = hashlib.sha256(), dict[Path, str]()
    total = sum(map(len, parts_of(split).values()))
    done = 0
    for part, records in parts_of(split).items():
        for record in records:
            own = "" if record.mask is None else _content(record.mask, known)
            facts = (part, relative(record.path, split.root), record.label, record.group)
            digest.update(repr((*facts, _content(record.path, known), own)).encode())
            done += 1
            if progress is not None:
                progress(done, total)
    return digest.hexdigest()


def _content(path: Path, known: dict[Path, str]) -> str:
    """A digest of a file; empty where it cannot be read, which ``check_training`` reports."""
    if path not in known:
        try:
            known[path] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        except (OSError, ValueError):
            known[path] = ""
    return known[path]


def counts_of(split: DataSplit) -> dict[str, Any]:
    """How many pictures and classes there are for what, plain JSON values."""
    return {
        "name": split.name,
        **{
            part: {"pictures": len(records), "classes": len({r.label for r in records})}
            for part, records in parts_of(split).items()
        },
    }


def searchable(split: DataSplit, *, grouped: bool) -> bool:
    """Whether any query has a picture of its class to be found, so that retrieval is defined."""
    if split.gallery is None:
        counts = Counter((r.label, r.group if grouped else r.path) for r in split.queries)
        kinds = Counter(label for label, _ in counts)
        return any(count > 1 for count in kinds.values())
    there = {(r.label, r.group if grouped else r.path) for r in split.gallery}
    groups: dict[str | None, set[object]] = {}
    for label, group in there:
        groups.setdefault(label, set()).add(group)
    return any(groups.get(r.label, set()) - {r.group if grouped else r.path} for r in split.queries)


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
    """The settings of a run: those given, else the recipe's, else those it was begun with."""
    settings = todays(settings, [field.name for field in fields(TrainOptions)])
    if state is None:
        return with_options(recipe_named(recipe).options if recipe else TrainOptions(), settings)
    begun = TrainOptions.from_json(state["options"])
    wanted = with_options(recipe_named(recipe).options if recipe else begun, settings)
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
    """How the data of a run were read, to go on with it."""
    check_folder(out, resume=True, force=False)
    source = RunFolder(out).read_checkpoint()["source"]
    return Source.from_json(source) if source else Source()


def check_same(
    folder: RunFolder, state: Mapping[str, Any], known: Mapping[str, Any], data: object
) -> None:
    """Whether a run can go on with these data and settings."""
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
    """A warning where the learning rate of a resumed run jumps, as its schedule is another."""
    from simexplain.training.building import SCHEDULES

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
    from simexplain.training.building import optimiser_for

    try:
        module.restore(state)
        # The module loads this into its own once the trainer has begun, which is too late.
        optimiser = optimiser_for(module.model, module.objective, module.options)
        optimiser.load_state_dict(state["optimiser"])
    except (RuntimeError, *DAMAGED) as error:
        raise record.folder.damaged(error) from error
    if write:
        record.folder.tidy()
        record.folder.write_json(OPTIONS, record.about)


NEEDED = {"lightning": "lightning", "pytorch_metric_learning": "pytorch-metric-learning"}


@typed
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
        data: A folder or a file, read according to ``source``, or a data set that was read before.
        out: The folder of the run.
        source: How ``data`` is read; unless given as a folder of class folders, or as the run to
            resume was begun.
        recipe: A name in ``RECIPES``, whose settings count where none are given.
        resume: Go on with the run in ``out`` from its last checkpoint, with its settings.
        force: Replace a run in ``out``.
        listeners: Optional progress callbacks.
        **settings: Fields of :class:`TrainOptions`.

    Raises:
        ImageError: If the data cannot be trained on: all reasons at once.
        ModelError: If a setting, the recipe or the network cannot be used, or a package is missing.
        OutputError: If ``out`` is taken, cannot be written, lies within the data, or has nothing
            to resume.
        KeyboardInterrupt: On Ctrl-C; the last checkpoint stands.
    """
    check_extra()
    from simexplain.training.module import check_devices, run_epochs

    if not str(out):
        raise OutputError("Expected a folder for the run, got an empty name; say '.' for this one.")
    folder, first = RunFolder(Path(out)), first_process()
    if first:
        check_folder(folder.path, resume=resume, force=force)
    state = folder.read_checkpoint() if resume else None
    options = resolved(recipe, settings, state)
    check_devices(options)
    split, read_as = read_data(data, source, state["source"] if state else None)
    if first:
        check_apart(folder.path, data, split)
    options = options.settled(len(split.classes))
    known = {
        "options": options.to_json(),
        "data": fingerprint(split, _progress(listeners, "Reading pictures")),
        "source": read_as,
        "recipe": recipe or (state["recipe"] if state else None),
    }
    if state is not None:
        check_same(folder, state, known, data)
    warnings = checked_data(split, options, listeners)
    warnings += jumps(state, options) if state is not None else ()
    # Training needs gradients, whatever the caller has switched off.
    with torch.inference_mode(False), torch.enable_grad():
        module, record = prepared(split, options, folder, known, listeners)
        if state is not None:
            go_on(module, state, record, write=first)
        try:
            run_epochs(module, options)
        finally:
            record.close()
    return _finished(folder, options, (*warnings, *left_out(record.broken)), write=first)


def check_extra() -> None:
    """Says what to install where something is missing."""
    missing = [name for module, name in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ModelError(
            f"Expected {' and '.join(missing)} for training, which is not installed; run "
            "pip install 'simexplain[train]'."
        )


def checked_data(
    split: DataSplit, options: TrainOptions, listeners: Listeners | None
) -> tuple[str, ...]:
    """What is odd about the data, all of which can be trained on."""
    warnings = check_training(
        split,
        classes=options.classes_per_batch,
        each=options.images_per_class,
        progress=_progress(listeners, "Checking pictures"),
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
    return (*warnings, *idle_options(options, split))


def prepared(
    split: DataSplit,
    options: TrainOptions,
    folder: RunFolder,
    known: Mapping[str, Any],
    listeners: Listeners | None = None,
) -> tuple[TrainingModule, Recorder]:
    """The module that trains, and what records it; nothing is written."""
    from simexplain.training.building import build_model, build_objective
    from simexplain.training.module import TrainingModule
    from simexplain.training.recording import Listeners, Recorder, attention_triplets_of

    model = build_model(options)
    check_savable(model)
    check_views(split, model.preprocess, AUGMENTATIONS[options.augmentation])
    objective = build_objective(model, options, len(split.classes))
    images = TrainingImages(
        split.train, options.augmentation, model.preprocess, options.seed, classes=split.classes
    )
    balanced = ClassBalanced(
        labels=images.labels,
        classes=options.classes_per_batch,
        each=options.images_per_class,
        seed=options.seed,
        steps=options.batches_per_epoch or None,
    )
    about = {
        "schema": 1,
        "options": options.to_json(),
        "pictures": counts_of(split),
        "versions": {**versions(), **{name: version(name) for name in NEEDED.values()}},
    }
    record = Recorder(
        folder,
        split,
        options,
        attention_triplets_of(split.queries, options.attention_triplets, options.seed),
        known,
        {**known, **about},
        listeners or Listeners(),
    )
    module = TrainingModule(
        model, objective, options, data=images, batches=balanced.indices, record=record
    )
    return module, record


def _progress(listeners: Listeners | None, what: str) -> Progress | None:
    work = None if listeners is None else listeners.work
    return None if work is None else partial(work, what)


def not_improved(result: TrainResult) -> str:
    """What rose and what fell where the figure that chose the epoch did not rise, a sentence."""
    before, after = result.untrained, result.reached
    moved: dict[str, list[str]] = {"rose": [], "fell": []}
    for name, value in after.items():
        if value != before[name]:
            change = f"{titled(name)} {before[name]:.3f} to {value:.3f}"
            moved["rose" if value > before[name] else "fell"].append(change)
    changes = [f"{', '.join(names)} {what}" for what, names in moved.items() if names]
    details = f": {'; '.join(changes)}" if changes else ""
    if not moved["rose"]:
        return f"Training did not improve retrieval over the untrained network{details}."
    chosen = titled(best_column(result.options))
    return f"Training did not raise {chosen}, by which the epoch was chosen{details}."


def _finished(
    folder: RunFolder, options: TrainOptions, warnings: tuple[str, ...], *, write: bool
) -> TrainResult:
    """The result, from what the first of all processes has written."""
    progress = TrainState.from_state(folder.read_checkpoint()["place"])
    files = folder.files() | {"results": str(folder.path / RESULTS)}
    result = TrainResult(
        folder=folder.path,
        options=options,
        rows=tuple(progress.rows),
        best_epoch=progress.best_epoch,
        best=progress.best or 0.0,
        files=files,
        warnings=warnings,
    )
    if not result.improved:
        result = replace(result, warnings=(*warnings, not_improved(result)))
    if write:
        folder.write_json(RESULTS, result.to_json())
    return result
