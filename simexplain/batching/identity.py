"""What a batch is known by, so that it goes on with the same or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

from simexplain.batching.options import BatchOptions, MapRequest
from simexplain.batching.planning import BatchPlan
from simexplain.errors import ModelError, OutputError
from simexplain.methods.rows import Methods
from simexplain.methods.weight_bank import probe_of
from simexplain.models.base import SimilarityModel
from simexplain.renaming import renamed
from simexplain.searching.index_models import weights_of

SCHEMA = 1
_PROBED = 16
_OTHER = 1e-3


def identity_of(
    model: SimilarityModel, plan: BatchPlan, request: MapRequest, how: BatchOptions
) -> dict[str, Any]:
    """What may not change between a batch and its resumption, in plain JSON values."""
    settings = {
        "method": _named(request.method),
        "layer": list(request.layer or ()),
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
    """Whether a batch can go on with these settings, this model and these pictures.

    Raises:
        ModelError: If settings or the model are others.
        OutputError: If rows or pictures are.
    """
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
