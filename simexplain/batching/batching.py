"""The verb: explain thousands of comparisons, into a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simexplain.arguments import typed
from simexplain.batching.folder import MANIFEST, BatchFolder, check_extra
from simexplain.batching.planning import (
    BatchOptions,
    BatchPlan,
    RowSource,
    placed,
    plan_rows,
    read_rows,
)
from simexplain.batching.result import BatchResult, WorkDone, open_batch
from simexplain.batching.shards import (
    RowExplainer,
    ShardWriter,
    processes,
    sums,
    together,
    write_alone,
    write_together,
)
from simexplain.data.folders import StageProgress
from simexplain.errors import ComparisonError, ModelError, OutputError
from simexplain.explaining_tensors import MapRequest
from simexplain.explanation import Explanation
from simexplain.methods.rows import Layers, Methods, layer_names
from simexplain.methods.weight_bank import probe_of
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.renaming import renamed
from simexplain.searching.index_models import weights_of
from simexplain.training.run_folder import first_process

SCHEMA = 1
_PROBED = 16
_OTHER = 1e-3


def identity_of(
    model: SimilarityModel, plan: BatchPlan, request: MapRequest, how: BatchOptions
) -> dict[str, Any]:
    """What may not change between a batch and its resumption, in plain JSON values."""
    settings = {
        "method": _named(request.method),
        "layer": [] if request.layer is None else list(layer_names(model, request.layer)),
        "upscale": request.upscale,
        "scale": request.scale,
        **{name: getattr(how, name) for name in ("shard_rows", "pictures", "figures")},
        **{f"option {name}": value for name, value in request.options.items()},
    }
    probe = probe_of(model, model.preprocess.size)[:_PROBED].tolist()
    record = {
        "schema": SCHEMA,
        "settings": settings,
        "model": {
            "name": model.name, "weights": weights_of(model), "probe": probe,
            "preprocess": model.preprocess.to_json(),
        },
        "rows": len(plan.rows),
        "digest": plan.digest,
        "root": str(plan.root),
        "pictures": [
            [str(path), *stamp] for path, stamp in zip(plan.pictures, plan.stamps, strict=True)
        ],
    }  # fmt: skip
    identity: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return identity


def _named(method: Methods) -> str:
    """A method as one string, equal for equal methods."""
    if method is None or isinstance(method, str):
        return method or "the default"
    if isinstance(method, Sequence):
        return ", ".join(_named(one) for one in method)
    own: dict[str, Any] = {}
    if is_dataclass(method) and not isinstance(method, type):
        own = asdict(method)
    return f"{type(method).__name__}({own})"


def _having(name: str, settings: Mapping[str, Any]) -> str:
    return f"with {name}={settings[name]!r}" if name in settings else f"without {name}"


def check_same(folder: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Whether a batch can go on with these settings, this model and these pictures."""
    again = "begin another batch (--force replaces this one)."
    ours = now["settings"]
    theirs = renamed(begun["settings"], ours)
    for name in {**theirs, **ours}:
        if theirs.get(name) != ours.get(name):
            raise ModelError(
                f"The batch in '{folder}' was begun {_having(name, theirs)}, and cannot go on "
                f"{_having(name, ours)}; leave it as it was or {again}"
            )
    if not _same_model(begun["model"], now["model"]):
        raise ModelError(
            f"The batch in '{folder}' was begun with {begun['model']['name']} and other "
            f"weights or preprocessing than this {now['model']['name']} has; give that model or "
            f"{again}"
        )
    if begun["digest"] != now["digest"]:
        raise OutputError(
            f"The batch in '{folder}' was begun with other rows; give the same or {again}"
        )
    if begun["pictures"] != now["pictures"]:
        known = {tuple(picture) for picture in begun["pictures"]}
        changed = [p[0] for p in now["pictures"] if tuple(p) not in known]
        there = {picture[0] for picture in now["pictures"]}
        changed += [picture[0] for picture in begun["pictures"] if picture[0] not in there]
        raise OutputError(
            f"'{changed[0]}' is not what it was when the batch in '{folder}' was begun; "
            f"restore it or {again}"
        )


def _same_model(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    plain = all(a[name] == b[name] for name in ("name", "weights", "preprocess"))
    probes = torch.tensor(a["probe"]), torch.tensor(b["probe"])
    return plain and bool((probes[0] - probes[1]).norm() <= _OTHER * probes[0].norm())


_ON_CARD = 16
_LISTED = 20


@typed
def explain_batch(
    model: nn.Module,
    rows: RowSource,
    out: str | Path,
    *,
    root: str | Path | None = None,
    method: Methods = None,
    layer: Layers = None,
    upscale: float = 1,
    scale: str = "image",
    max_batch: int | None = None,
    how: BatchOptions | None = None,
    resume: bool = False,
    force: bool = False,
    progress: StageProgress | None = None,
    skipped: Callable[[Sequence[str]], None] | None = None,
    **options: Any,
) -> BatchResult:
    """Explains many comparisons as ``explain`` does one, into a folder.

    Every distinct picture is read and goes through the network once, as long as memory allows and
    the method needs no more than embeddings, layers and their gradients; maps are the same. Rows
    are done in shards that are written whole, so that a run can be stopped at any time and resumed.
    Rows that cannot be explained are in the table with the reason.

    With several devices lightning starts the calling script again for each of them, so that a
    script has to call this below ``if __name__ == "__main__":``; every one of them gets the result.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        rows: A CSV file, or rows; see :func:`~simexplain.batching.planning.read_rows`.
        out: The folder of the batch.
        root: What relative paths are relative to; the folder of the CSV file unless given.
        method: As for ``explain``, without a check.
        layer: A layer, several to be multiplied, or None for the method's or the model's own.
        upscale: As for ``explain``.
        scale: As for ``explain``.
        max_batch: Bounds the images in one forward pass of methods that need one for each row.
        how: Everything that maps do not depend on.
        resume: Go on with the batch in ``out``.
        force: Replace a batch in ``out``.
        progress: Called with what is done, how far it is, and how far it goes.
        skipped: Called once before the work with a line for each row that is known not to work.
        **options: Passed to a method given by name, such as ``weights="relative"``.

    Raises:
        ComparisonError: If the CSV file or an option cannot be used, or no row can be explained; or
            with ``strict`` any row.
        ModelError: If the model, a layer or a package cannot be used, or the batch to resume was
            begun with another model or other settings.
        OutputError: If ``out`` is taken or cannot be written, another process works on it, or it
            was begun with other rows.
        KeyboardInterrupt: On Ctrl-C; finished shards stand.
    """
    check_extra()
    how = how or BatchOptions()
    world = processes(how.devices, how.nodes)
    folder, first = BatchFolder(Path(out)), first_process()
    if first:
        folder.check(resume=resume, force=force)
    wrapped = as_similarity_model(model)
    layers = None if layer is None else layer_names(wrapped, layer)
    request = MapRequest(method, layers, upscale, scale, max_batch, options)
    read, base = read_rows(rows, root)
    plan = plan_rows(read, base, wrapped.preprocess, size=how.shard_rows, progress=progress)
    if how.strict and plan.problems:
        raise _not_strict(plan)
    if plan.problems and first and skipped is not None:
        skipped(_problems(plan))
    identity = identity_of(wrapped, plan, request, how)
    if resume:
        check_same(folder.path, folder.read_manifest(), identity)
        if folder.complete:
            return open_batch(out)
    with placed(wrapped, how.accelerator, alone=world == (1, 1)) as device:
        size = how.batch_size or (1 if device == "cpu" else _ON_CARD)
        explainer = RowExplainer(
            wrapped, plan, request, memory=round(how.memory * 1e9), batch_size=size
        )
        with torch.inference_mode(False):
            example = explainer.check_sharing()
        with folder.held() if first else nullcontext():
            if first and not resume:
                folder.check(resume=False, force=force)  # one may have been begun meanwhile
                folder.clear()
                # While it is there, the batch can be resumed.
                folder.write_json(MANIFEST, {**identity, **_described(example, explainer)})
            work = _worked(explainer, folder, how, world, progress)
    return BatchResult(Path(out), folder.read_manifest(), work)


def _worked(
    explainer: RowExplainer,
    folder: BatchFolder,
    how: BatchOptions,
    world: tuple[int, int],
    progress: StageProgress | None,
) -> WorkDone:
    """Does what is left to do, and merges it once all processes are done."""
    writer = ShardWriter(explainer, folder, how.pictures, how.figures)
    pending = folder.pending(len(explainer.plan.shards))
    listener = None if progress is None else partial(progress, "Explaining")
    begun = time.monotonic()
    if world == (1, 1):
        write_alone(writer, pending, listener)
    else:
        devices, nodes = world
        write_together(
            writer, pending, listener, accelerator=how.accelerator or "auto", devices=devices,
            nodes=nodes,
        )  # fmt: skip
    forwards, rows, separate = sums(explainer.forwards, *explainer.needed_for)
    together()
    if first_process():
        folder.merge(explainer.plan)
    together()
    return WorkDone(
        rows=int(rows),
        shared=explainer.shared,
        forwards=int(forwards) if explainer.shared else None,
        separate=int(separate),
        seconds=round(time.monotonic() - begun, 3),
    )


def _described(example: Explanation, explainer: RowExplainer) -> dict[str, Any]:
    """The other entries of the manifest that hold for all rows."""
    return {
        "method": example.method,
        "layers": list(example.layers),
        "options": dict(example.options),
        "scale": example.scale,
        **example.placing,
        "view": list(explainer.view),
        "maps": [
            {
                "title": row.title,
                "method": row.method,
                "layers": list(row.layers),
                "options": dict(row.options),
            }
            for row in example.rows
        ],
        "shared": explainer.shared,
        "versions": dict(example.versions),
    }


def _not_strict(plan: BatchPlan) -> ComparisonError:
    lines = [line.rstrip(".") for line in _problems(plan)]
    more = f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return ComparisonError(
        f"Expected rows that can all be explained (--strict), but {len(lines)} of "
        f"{len(plan.rows)} cannot: {'; '.join(lines[:_LISTED])}{more}."
    )


def _problems(plan: BatchPlan) -> list[str]:
    """A line for each row that is known not to work."""
    rows = ((number, plan.rows[number], why) for number, why in plan.problems.items())
    return [f"{f'line {row.line}' if row.line else f'row {n}'}: {why}" for n, row, why in rows]
