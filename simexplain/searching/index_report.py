"""What there is to tell of an index, as plain JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from simexplain.renaming import with_old_names
from simexplain.searching.index_gallery import GalleryIndex

_SAMPLE = 4096
"""Pictures that the share of what is unexplained is measured on."""


def bytes_per_image(index: GalleryIndex) -> int:
    """What one picture takes in the file, without the text of its path."""
    own = [t for t in index.tensors.values() if t.dim() > 0 and len(t) == len(index)]
    return sum(math.prod(tensor.shape[1:]) * tensor.dtype.itemsize for tensor in own)


def _unexplained(index: GalleryIndex) -> float:
    """The share of the vectors that no position accounts for, on average over the gallery.

    For a vector ``v`` with the rest ``r``, which biases and all else give that passes by the layer,
    ``|r| / (|r| + |v - r|)``.
    """
    count = min(len(index), _SAMPLE)
    scales = index.tensors["scales"][:count]
    rest = index.tensors["rest"][:count].float() * scales[:, None]
    vectors = index.embeddings[:count].float() * index.tensors["lengths"][:count, None]
    own, others = rest.norm(dim=1), (vectors - rest).norm(dim=1)
    return float((own / (own + others).clamp_min(1e-30)).mean())


def seen_of(index: GalleryIndex) -> dict[str, Any]:
    """The share of its pictures that the network saw: the mean, the least, and of which that is."""
    shares = [index.geometry(position).seen for position in range(len(index))]
    least = min(shares)
    return {
        "mean": round(sum(shares) / len(shares), 4),
        "least": round(least, 4),
        "least_of": index.paths[shares.index(least)],
    }


def report_of(index: GalleryIndex) -> dict[str, Any]:
    """The JSON of ``simexplain index --json``; keys may be added, not changed."""
    basis: dict[str, Any] | None = None
    if index.has_basis:
        _, width, height, across = index.tensors["parts"].shape
        basis = {
            "layer": index.layer,
            "width": width,
            "grid": [height, across],
            "held": index.keeping.held,
            "residual": float(index.tensors["residuals"].max()),
            "unexplained": _unexplained(index),
            "region": list(index.keeping.region),
            "bypass": index.keeping.bypass,
        }
    report = {
        "schema": 1,
        "file": str(index.path),
        "root": str(index.root),
        "model": index.model_name,
        "fingerprint": index.fingerprint,
        "images": len(index),
        "embedding": index.embeddings.shape[1],
        "kept": index.keeping.kind,
        "basis": basis,
        "without_basis": index.without_basis,
        "bytes_per_image": bytes_per_image(index),
        "seen": seen_of(index),
        "changes": None if index.changes is None else asdict(index.changes),
        "errors": [{"path": path, "reason": why} for path, why in index.errors.items()],
        "versions": index.metadata["versions"],
    }
    return with_old_names(report, "broken")
