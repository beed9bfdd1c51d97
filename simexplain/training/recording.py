"""What a run writes while it trains: rows, models, checkpoints, attention maps, callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from simexplain.data.dataset_split import DataSplit
from simexplain.data.folders import Record, StageProgress
from simexplain.errors import ImageError
from simexplain.evaluation.retrieval import evaluate_retrieval
from simexplain.explaining import explain
from simexplain.explanation import Explanation
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel
from simexplain.models.writing import save_model
from simexplain.picturing import footer, verdict
from simexplain.rendering.overlay import overlay
from simexplain.rendering.sheet import ROLE_COLOURS, VERDICTS, Cell, Grid, Row, Words, page, png_of
from simexplain.training.module import TrainingModule
from simexplain.training.options import TrainOptions, best_column
from simexplain.training.run_folder import ATTENTION, LAST, MODEL, OPTIONS, TENSORBOARD, RunFolder

_CELL = 1.7
_ROLES = ("anchor", "positive", "negative")


def attention_triplets_of(
    queries: Sequence[Record], count: int, seed: int
) -> tuple[tuple[Record, Record, Record], ...]:
    """At most ``count`` triplets, drawn once for a run: anchors of different classes if possible.

    Anchor, another picture of its class (of another group, where there is one) and one of another
    class; none where the labelled pictures do not allow it. The draw depends on the seed alone.
    """
    classes: dict[str, list[Record]] = {}
    for record in queries:
        classes.setdefault(str(record.label), []).append(record)
    able = [label for label in sorted(classes) if len(classes[label]) > 1]
    if len(classes) < 2 or not able:
        return ()
    draw = np.random.default_rng(seed)
    triplets = []
    order = [able[index] for index in draw.permutation(len(able))]
    for label in order[:count]:
        own = classes[label]
        anchor = own[int(draw.integers(len(own)))]
        others = [record for record in own if record is not anchor]
        apart = [r for r in others if r.group is None or r.group != anchor.group] or others
        far = [name for name in sorted(classes) if name != label]
        negatives = classes[far[int(draw.integers(len(far)))]]
        triplets.append(
            (
                anchor,
                apart[int(draw.integers(len(apart)))],
                negatives[int(draw.integers(len(negatives)))],
            )
        )
    return tuple(triplets)


def attention_picture(
    model: SimilarityModel,
    triplets: Sequence[tuple[Record, Record, Record]],
    *,
    title: str,
    method: dict[str, Any] | None = None,
) -> bytes:
    """A PNG with a row for each triplet: three pictures, and the model's attention in them.

    The model is left as it was. Triplets whose pictures cannot be read are left out. ``method`` has
    options of ``explain``; unless given, ``avsl`` for AVSL models and else signed ``sam``.
    """
    chosen = method or _method(model)
    rows: list[Row] = []
    foot = ""
    for triplet in triplets:
        try:
            paths = [record.path for record in triplet]
            explained = explain(model, paths, arch="triplet", check=False, **chosen)
        except ImageError:
            continue
        rows.append(_row(explained, roles=not rows))
        foot = footer(explained)
    grid = Grid(rows, [_CELL, _CELL, 0.1] * 3, gap=0.05)
    return png_of(page([grid], title=title, footer=foot).figure)


def _method(model: SimilarityModel) -> dict[str, Any]:
    if isinstance(model, AVSL):
        return {"method": "avsl"}
    return {"method": "sam", "weights": "signed"}


def _row(explained: Explanation, *, roles: bool) -> Row:
    """Every picture beside itself with its heat; the verdict over them."""
    cells: list[Cell | None] = []
    for index, role in enumerate(_ROLES):
        view = explained.preprocess.undo(explained.images[0, index])
        heat = explained.heatmaps_at(0)[index].cpu().numpy()
        title = (Words(role, ROLE_COLOURS[role], 9, "bold", "left"),) if roles else ()
        cells += [Cell(view, title), Cell(overlay(view, heat)), None]
    ink = VERDICTS[explained.condition(0).holds]
    return Row(cells, Words(verdict(explained), ink, 9, align="left"), tallest=2.2 * _CELL)


MetricsRow = dict[str, Any]


@dataclass(frozen=True)
class Listeners:
    """Optional progress callbacks.

    Attributes:
        step: Called after every step with the steps done, those of the whole run, and the loss.
        epoch: Called with every row of ``metrics.csv``.
        work: Called with other work by name, how far it is, and how far it goes.
    """

    step: Callable[[int, int, float], None] | None = None
    epoch: Callable[[MetricsRow], None] | None = None
    work: StageProgress | None = None


@dataclass
class Recorder:
    """Notes a run in its folder; only the first of several processes does.

    Attributes:
        folder: Where to.
        split: The data, for the evaluation.
        options: Of the run.
        watched: The triplets whose maps are drawn.
        known: Further plain values of every checkpoint.
        about: The content of ``options.json``.
        listeners: The progress callbacks.
        writer: Of TensorBoard, once the run has begun and where it is installed.
        broken: Pictures that an evaluation left out, with the reason.
    """

    folder: RunFolder
    split: DataSplit
    options: TrainOptions
    watched: Sequence[tuple[Record, Record, Record]]
    known: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    listeners: Listeners = field(default_factory=Listeners)
    writer: Any = None
    broken: dict[str, str] = field(default_factory=dict)
    _begun: float = field(default_factory=time.monotonic)

    def begun(self, module: TrainingModule) -> None:
        """Before the first step: the folder, and the untrained network's row."""
        fresh = not module.progress.rows
        if fresh:
            # The first thing that is written is what --resume takes, in place of an earlier run's:
            # a run that is stopped before this leaves the earlier one as it was.
            self.keep(module)
            self.folder.clear()
        self.folder.write_json(OPTIONS, self.about)
        self.writer = _tensorboard(self.folder, module.progress.step)
        if fresh:
            row: MetricsRow = {"epoch": 0, "step": 0, "seconds": 0.0}
            row |= self.measured(module.model)
            self._draw(module.model, 0)
            self._note(module, row)
        self._begun = time.monotonic()

    def stepped(self, module: TrainingModule) -> None:
        """After a step within an epoch."""
        progress, every = module.progress, self.options.checkpoint_every
        loss = float(module.latest["loss"])
        if self.listeners.step is not None:
            self.listeners.step(progress.step, module.steps * self.options.epochs, loss)
        if self.writer is not None:
            values = {f"train/{name}": float(value) for name, value in module.latest.items()}
            self._log({**values, **_rates(module)}, progress.step)
        # The last step of an epoch is kept with what is measured after it.
        if every and progress.step % every == 0 and progress.batch < module.steps:
            self.keep(module)

    def epoch_over(self, module: TrainingModule) -> None:
        """After the last step of an epoch; the state has moved to the next one already."""
        progress = module.progress
        row: MetricsRow = {
            "epoch": progress.epoch,
            "step": progress.step,
            "seconds": round(time.monotonic() - self._begun, 3),
            **{f"loss/{name}".replace("loss/loss", "loss"): v for name, v in module.means.items()},
            **_rates(module),
        }
        if progress.epoch % self.options.eval_every == 0 or progress.epoch == self.options.epochs:
            row |= self.measured(module.model)
            self._draw(module.model, progress.epoch)
            self._improve(module, self.score(row))
        self._save(module, LAST)
        self._note(module, row)
        self._begun = time.monotonic()

    def measured(self, model: SimilarityModel) -> MetricsRow:
        """Recall@K and MAP@R on the held-out pictures; nothing where there are none."""
        if not self.split.queries:
            return {}
        retrieval = evaluate_retrieval(
            model,
            self.split.queries,
            self.split.gallery,
            ranks=self.options.ranks,
            grouped=self.options.grouped,
            batch_size=max(32, self.options.batch_size),
            progress=self.listeners.work,
        )
        self.broken |= retrieval.errors
        recalls = {f"recall@{k}": value for k, value in retrieval.recall.items()}
        return {**recalls, "map_at_r": retrieval.map_at_r}

    def score(self, row: MetricsRow) -> float:
        """What the best model is chosen by; without held-out pictures it is the last one."""
        if not self.split.queries:
            return float(row["epoch"])
        return float(row[best_column(self.options)])

    def keep(self, module: TrainingModule) -> None:
        """Everything from which the run can go on."""
        self.folder.write_checkpoint({**self.known, **module.state()})
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Ends TensorBoard's thread."""
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()
            self.writer = None

    def _improve(self, module: TrainingModule, reached: float) -> None:
        progress = module.progress
        if progress.best is None or reached > progress.best:
            progress.best, progress.best_epoch = reached, progress.epoch
            self._save(module, MODEL)

    def _save(self, module: TrainingModule, name: str) -> None:
        model = module.model
        if isinstance(model, AVSL):
            model.report = {"epochs": module.progress.epoch, "steps": module.progress.step}
        save_model(model, self.folder.path / name)

    def _draw(self, model: SimilarityModel, epoch: int) -> None:
        if self.watched:
            title = f"Attention on validation triplets after epoch {epoch} of {self.options.epochs}"
            picture = attention_picture(model, self.watched, title=title)
            self.folder.write(f"{ATTENTION}/epoch_{epoch:03d}.png", picture)

    def _note(self, module: TrainingModule, row: MetricsRow) -> None:
        """Keeps a row before it is announced: a callback may end the run."""
        module.progress.rows.append(row)
        self.folder.write_rows(module.progress.rows)
        if self.writer is not None:
            measured = {f"test/{n}": v for n, v in row.items() if n.startswith(("recall", "map"))}
            self._log(measured, module.progress.step)
        self.keep(module)
        if self.listeners.epoch is not None:
            self.listeners.epoch(row)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


def _tensorboard(folder: RunFolder, step: int) -> Any:
    """A writer that forgets what an interrupted run wrote after this step; None without one."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder.path / TENSORBOARD), purge_step=step + 1)


def _rates(module: TrainingModule) -> dict[str, float]:
    """The learning rate of each group at the last step."""
    optimiser: torch.optim.Optimizer = module.optimizers(use_pl_optimizer=False)
    return {f"lr/{group['name']}": group["lr"] for group in optimiser.param_groups}
