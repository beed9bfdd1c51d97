"""An index of a gallery, opened: embeddings, what explains them, and the way back to pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.data.preprocessing import Geometry, Preprocess
from simexplain.errors import DAMAGED, ComparisonError, ModelError, OutputError, first_line
from simexplain.matching.factors import Factors
from simexplain.models.embedder import as_similarity_model
from simexplain.renaming import takes_old_names, with_old_names
from simexplain.searching.index_embedding import LEVELS, PARTS, IndexSpec, Stat, absolute, doubled
from simexplain.searching.index_file import read_columns, unpacked_texts
from simexplain.searching.index_models import Identity, nearest

_DIMENSIONS = {
    PARTS: {"parts": 4, "rest": 2, "scales": 1, "lengths": 1, "residuals": 1},
    LEVELS: {"level_scales": 2},
}


def check_columns(keeping: IndexSpec, tensors: Mapping[str, Tensor], count: int) -> None:
    """Whether a file has all columns for as many pictures, of the right kind."""
    wanted = {"embeddings": 2, "sizes": 2, "stats": 2, "digests": 2}
    for name, dimensions in {**wanted, **_DIMENSIONS.get(keeping.kind, {})}.items():
        if tensors[name].dim() != dimensions or len(tensors[name]) != count or count == 0:
            raise ValueError(f"its column '{name}' does not fit")
    if tensors["probe"].shape != tensors["embeddings"].shape[1:]:
        raise ValueError("its column 'probe' does not fit")


def root_of(path: Path, recorded: str, relative: str, given: str | Path | None) -> Path:
    """The folder of the pictures: the one given, that recorded, or that beside the index."""
    if given is not None:
        if not Path(given).is_dir():
            raise OutputError(f"There is no folder '{given}' for the pictures of '{path}'.")
        return Path(given)
    beside = Path(os.path.normpath(path.absolute().parent / relative)) if relative else None
    if not Path(recorded).is_dir() and beside is not None and beside.is_dir():
        return beside
    return Path(recorded)


Places = Sequence[int] | Tensor


@dataclass(frozen=True)
class Changes:
    """What making or updating an index did.

    Attributes:
        added: Pictures that are new in it.
        changed: Those embedded again, since their content had changed.
        removed: Those taken out.
        kept: Those left as they were.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    kept: int = 0


@takes_old_names
@dataclass(frozen=True, eq=False)
class GalleryIndex:
    """Embeddings of ``G`` pictures and what each position adds to them; see :func:`build_index`.

    Tensors are mapped into memory: opening an index reads next to nothing, whatever its size.

    Attributes:
        path: The file.
        root: The folder below which pictures are looked for.
        paths: Where each picture is, with ``/`` and relative to the root where it lies below it.
        embeddings: ``(G,E)`` as the model gives them, float32: unit rows, or AVSL's packed rows.
        sizes: ``(height, width)`` of each picture as it is drawn ``(G,2)``, int32.
        identity: What the model is known by.
        keeping: What is kept beside the embeddings, and of which layer.
        distance_name: The model's distance by name, empty where it has one of its own.
        errors: Pictures that could not be read, each with the reason.
        changes: What was done, where this index was just made or updated.
        tensors: All columns, as they lie in the file.
        metadata: The metadata of the file, as plain JSON.
    """

    path: Path
    root: Path
    paths: tuple[str, ...]
    embeddings: Tensor
    sizes: Tensor
    identity: Identity
    keeping: IndexSpec
    distance_name: str
    errors: Mapping[str, str]
    tensors: Mapping[str, Tensor] = field(repr=False)
    metadata: Mapping[str, Any] = field(repr=False)
    changes: Changes | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def model_name(self) -> str:
        """What the model is called."""
        return self.identity.name

    @property
    def fingerprint(self) -> str:
        """A digest of the model's weights."""
        return self.identity.weights

    @property
    def layer(self) -> str:
        """The layer whose positions are kept; empty where there is none, or one for each level."""
        return self.keeping.layer

    @property
    def bypass(self) -> dict[str, float]:
        """For the layer the share of the embedding that bypasses it; empty where none is known."""
        share = self.keeping.bypass
        return {} if share is None else {self.layer: share}

    @property
    def preprocess(self) -> Preprocess:
        """How every picture was made a tensor."""
        return self.identity.preprocess

    @property
    def has_basis(self) -> bool:
        """Whether :meth:`factors` has something to give."""
        return self.keeping.kind == PARTS

    @property
    def has_levels(self) -> bool:
        """Whether :meth:`level_maps` has something to give: for AVSL models."""
        return self.keeping.kind == LEVELS

    @property
    def without_basis(self) -> str:
        """Why factors are missing, as a sentence; empty if they are there."""
        if self.has_basis:
            return ""
        if self.has_levels:
            return "The index of an AVSL model keeps the maps of its levels (level_maps)."
        return self.keeping.reason

    def file(self, place: int) -> Path:
        """Where a picture is now; it need not be there."""
        return self.root / self.paths[place]

    def geometry(self, place: int) -> Geometry:
        """Where the network's view lies in a picture; the picture is not read."""
        height, width = self.sizes[place].tolist()
        return self.preprocess.geometry((height, width))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {absolute([self.file(n)])[0]: n for n in range(len(self))}

    def is_current(self, place: int) -> bool:
        """Whether a picture file is there and as it was when it was embedded, by time and size."""
        now = Stat.of(self.file(place))
        return [now.changed, now.size] == self.tensors["stats"][place].tolist()

    def place_of(self, picture: str | Path) -> int | None:
        """The place of a picture file in the index, or None if it is not in it.

        Links and other spellings of a path lead to the same file.
        """
        if (index := self._places.get(absolute([picture])[0])) is not None:
            return index
        now = Stat.of(Path(picture))
        alike = (self.tensors["stats"] == torch.tensor([now.changed, now.size])).all(dim=1)
        with suppress(OSError, ValueError):
            for number in alike.nonzero()[:, 0].tolist():
                if Path(self.file(number)).samefile(picture):
                    return int(number)
        return None

    def factors(self, places: Places) -> Factors:
        """What every position adds to the vectors of some pictures, for ``matching_from``.

        Float32 from float16 with a scale of its own for each picture: the largest number of a
        picture is stored to within ``2**-11`` of itself, and no error is larger than that one's.
        Of an index with a narrower basis, what lies outside it is missing from the parts.

        Args:
            places: ``M`` rows of the index.

        Returns:
            Parts ``(M,E,h,w)``, rest and vectors ``(M,E)``.

        Raises:
            ComparisonError: If the index has no such place.
            ModelError: If nothing is kept; the error has the reason.
        """
        if not self.has_basis:
            raise ModelError(f"'{self.path}' keeps no basis for explanations: {self.without_basis}")
        # Several times quicker than indexing with a list, and that is most of what a map costs.
        rows = torch.tensor(self._rows(places), dtype=torch.long)
        scales = self.tensors["scales"][rows]
        parts = doubled(self.tensors["parts"].index_select(0, rows), scales)
        if self.keeping.basis is not None:
            parts = torch.einsum("ed,mdhw->mehw", self.keeping.basis, parts)
        rest = doubled(self.tensors["rest"][rows], scales)
        vectors = self.embeddings[rows] * self.tensors["lengths"][rows].unsqueeze(1)
        return Factors(parts, rest, vectors)

    def level_maps(self, places: Places) -> list[Tensor]:
        """The feature maps of every level of an AVSL model, the lowest first.

        With the model's heads they give everything that explains a distance, such as
        ``directed_cams``, without running the network.

        Args:
            places: ``M`` rows of the index.

        Returns:
            For each level ``(M,C,h,w)``, float32 from float16.

        Raises:
            ComparisonError: If the index has no such place.
            ModelError: If it keeps none.
        """
        if not self.has_levels:
            raise ModelError(f"'{self.path}' keeps no maps of levels; it is of {self.model_name}.")
        rows = self._rows(places)
        scales = self.tensors["level_scales"][rows]
        names = [f"level_{number}" for number in range(scales.shape[1])]
        return [doubled(self.tensors[n][rows], scales[:, at]) for at, n in enumerate(names)]

    def neighbours(
        self, query: Tensor, k: int, model: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """The ``k`` nearest pictures of each query, exactly as if all distances were computed.

        Args:
            query: Embeddings ``(Q,E)`` of the same model.
            k: How many; no more than there are.
            model: Whose distance counts. Needed only for AVSL and other distances of a model's own.

        Returns:
            Distances ``(Q,k)``, ascending, and places ``(Q,k)``; of equal distances the smaller
            place first.

        Raises:
            ComparisonError: If queries or ``k`` do not fit.
            ModelError: If a model is needed, or faiss is missing.
        """
        return nearest(self.embeddings, query, k, self.distance_name, model)

    def check_model(self, model: nn.Module) -> None:
        """Refuses a model that the index was not made with: weights, preprocessing, answers.

        Reads all weights of the model once and runs it on one image.

        Raises:
            ModelError: If it is another one; the error has the difference.
        """
        self.identity.check(as_similarity_model(model), str(self.path))

    def _rows(self, indices: Places) -> list[int]:
        rows = [int(index) for index in indices]
        wrong = [index for index in rows if not 0 <= index < len(self)]
        if wrong:
            raise ComparisonError(
                f"Expected places between 0 and {len(self) - 1} of '{self.path}', got {wrong[0]}."
            )
        return rows


@typed
def open_index(path: str | Path, *, root: str | Path | None = None) -> GalleryIndex:
    """Opens the index of a gallery by memory map; no code in the file is ever run.

    Args:
        path: The file that :func:`build_index` wrote.
        root: Where the pictures are now, if they were moved. Unless given: where they were indexed,
            or where they are as seen from the file, if only both were moved together.

    Raises:
        OutputError: If the file does not exist, is damaged, is not an index or is of another
            version.
    """
    path = Path(path)
    metadata, tensors = read_columns(path)
    try:
        names = unpacked_texts(tensors)
        keeping = IndexSpec.of_json(metadata["keeping"], tensors.get("basis"))
        check_columns(keeping, tensors, len(names))
        return GalleryIndex(
            path=path,
            root=root_of(path, metadata["root"], metadata["root_from_here"], root),
            paths=names,
            embeddings=tensors["embeddings"],
            sizes=tensors["sizes"],
            identity=Identity(
                metadata["model"],
                metadata["weights"],
                Preprocess.from_json(metadata["preprocess"]),
                tensors["probe"],
            ),
            keeping=keeping,
            distance_name=metadata["distance"],
            errors=json.loads(bytes(tensors["broken"].tolist())),
            tensors=tensors,
            metadata=metadata,
        )
    except OutputError:
        raise
    except DAMAGED as error:
        raise OutputError(
            f"The index '{path}' is damaged ({first_line(error)}); make it again."
        ) from error


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
    shares = [index.geometry(position).seen for position in range(len(index))]
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
        "seen": {
            "mean": round(sum(shares) / len(shares), 4),
            "least": round(min(shares), 4),
            "least_of": index.paths[shares.index(min(shares))],
        },
        "changes": None if index.changes is None else asdict(index.changes),
        "errors": [{"path": path, "reason": why} for path, why in index.errors.items()],
        "versions": index.metadata["versions"],
    }
    return with_old_names(report, "broken")
