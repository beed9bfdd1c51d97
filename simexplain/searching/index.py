"""Making an index of a gallery and keeping it up to date: what ``simexplain index`` does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.data.folders import Record, StageProgress
from simexplain.errors import ComparisonError, ImageError, ModelError, OutputError
from simexplain.explanation import versions
from simexplain.methods.decomposition import MOST_STEPS
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.networks import full_precision
from simexplain.searching.index_embedding import (
    PARTS,
    IndexSpec,
    Pictures,
    Stat,
    absolute,
    common_basis,
    digest_of,
    keeping_for,
    pictures_of,
    run_rows,
    with_tail,
)
from simexplain.searching.index_file import (
    SCHEMA,
    Column,
    IndexWork,
    Part,
    SourceRows,
    alone,
    gathered,
    is_written_here,
    packed_texts,
)
from simexplain.searching.index_gallery import Changes, GalleryIndex, open_index
from simexplain.searching.index_models import Identity, distance_name_of


@dataclass(frozen=True)
class IndexConfig:
    """How the rows of an index come to be.

    ``distance`` is the model's by name, empty for one of its own; ``width`` is that of a common
    basis that is still to be found.
    """

    identity: Identity
    keeping: IndexSpec
    distance: str
    width: int | None = None

    @classmethod
    def of(cls, model: SimilarityModel, keeping: IndexSpec, width: int | None) -> IndexConfig:
        """For a new index."""
        identity = Identity.of(model)
        return cls(identity, keeping, distance_name_of(model, len(identity.probe)), width)

    @classmethod
    def again(cls, old: GalleryIndex) -> IndexConfig:
        """As an index was made."""
        return cls(old.identity, old.keeping, old.distance_name)

    @property
    def key(self) -> str:
        """Equal for rows that may stand in one index."""
        settings = {**self.to_json(), "width": self.width, "schema": SCHEMA}
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
        if self.keeping.basis is not None:
            digest.update(self.keeping.basis.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The metadata of an index, without tensors."""
        return {
            "model": self.identity.name,
            "weights": self.identity.weights,
            "preprocess": self.identity.preprocess.to_json(),
            "keeping": self.keeping.to_json(),
            "distance": self.distance,
        }


@dataclass(frozen=True)
class UpdatePlan:
    """Which pictures an index shall have, and from where.

    Attributes:
        root: The folder they are in.
        paths: Absolute, in the order of the index.
        stats: The file system's present entry of each.
        old: The index that is brought up to date, if any.
        kept: Places in the old index of pictures that have not changed.
        known: Places in the old index of all pictures, by the path that they have now.
        broken: Pictures outside those given that could not be read earlier.
    """

    root: str
    paths: tuple[str, ...]
    stats: Mapping[str, Stat]
    old: GalleryIndex | None = None
    kept: Mapping[str, int] = field(default_factory=dict)
    known: Mapping[str, int] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)

    @property
    def alien(self) -> bool:
        """Whether an old index has none of the pictures."""
        return self.old is not None and not self.known.keys() & set(self.paths)

    def todo(self, work: IndexWork) -> list[str]:
        """Pictures that are neither kept nor done already, in order."""
        done = {
            path: stat
            for part in work.parts
            for path, stat in [
                *part.pictures.items(),
                *((p, s) for p, (s, _) in part.broken.items()),
            ]
        }
        return [p for p in self.paths if p not in self.kept and done.get(p) != self.stats[p]]


def planned(
    paths: Sequence[str],
    root: str,
    old: GalleryIndex | None,
    *,
    drop: bool,
    progress: StageProgress | None = None,
) -> UpdatePlan:
    """Compares a gallery with its index, if there is one.

    Without ``drop``, pictures of the index that are not among the absolute ``paths`` stay.
    """
    if old is None:
        return UpdatePlan(root, tuple(paths), {path: Stat.of(path) for path in paths})
    before = absolute([old.root])[0]
    known = _located(old, before)
    if drop and not known.keys() & set(paths):
        known = _located(old, root)  # the gallery may have been moved
    order, broken = list(paths), {}
    if not drop:
        order = list(dict.fromkeys((*known, *paths)))
        root = before
        given = set(paths)
        broken = {p: why for p, why in old.errors.items() if str(Path(root, p)) not in given}
    seen = _stats_of(old)
    stats, kept = {}, {}
    for done, path in enumerate(order):
        index = known.get(path)
        stats[path] = Stat.of(path)
        if index is None:
            continue
        if not drop and path not in given:
            stats[path], kept[path] = seen[index], index
        elif _same(path, stats[path], seen[index], old.tensors["digests"][index]):
            kept[path] = index
        if progress is not None:
            progress("Comparing pictures", done + 1, len(order))
    return UpdatePlan(root, tuple(order), stats, old, kept, known, broken)


def without(old: GalleryIndex, paths: Sequence[str]) -> UpdatePlan:
    """An index without some of its pictures; folders stand for all below them."""
    root = absolute([old.root])[0]
    known = _located(old, root)
    gone: set[str] = set()
    for path in paths:
        below = {name for name in known if _below(name, path)}
        if not below:
            raise ImageError(f"'{path}' is not in the index '{old.path}', nor anything below it.")
        gone |= below
    left = {path: index for path, index in known.items() if path not in gone}
    if not left:
        raise ImageError(
            f"Expected to leave a picture in the index '{old.path}', but that would take out all "
            f"{len(old)}; delete the file instead."
        )
    seen = _stats_of(old)
    stats = {path: seen[index] for path, index in left.items()}
    broken = {
        name: why
        for name, why in old.errors.items()
        if not any(_below(str(Path(root, name)), path) for path in paths)
    }
    return UpdatePlan(root, tuple(left), stats, old, left, known, broken)


def _below(name: str, path: str) -> bool:
    """Whether a file is this one, or lies below it."""
    return name == path or name.startswith(path.rstrip(os.sep) + os.sep)


def _located(old: GalleryIndex, root: str) -> dict[str, int]:
    """Absolute paths of the pictures of an index, if they are below this folder."""
    return {os.path.normpath(Path(root, name)): n for n, name in enumerate(old.paths)}


def _stats_of(old: GalleryIndex) -> list[Stat]:
    return [Stat(changed, size) for changed, size in old.tensors["stats"].tolist()]


def _same(path: str, now: Stat, then: Stat, digest: Tensor) -> bool:
    """Whether a picture is as it was: by its time and size, else by its content."""
    if now == then:
        return True
    if now.size != then.size:
        return False
    try:
        return digest_of(path) == bytes(digest.tolist())
    except OSError:
        return False


def relative_to(path: str, root: str) -> str:
    """Below the root with ``/``, else as it is."""
    if Path(path).is_relative_to(root):
        return Path(path).relative_to(root).as_posix()
    return path


_SHARED = ("basis", "probe", "texts", "text_ends", "broken", "stats")
"""Columns that are not one row for each picture, or are written anew."""


def publish(way: IndexConfig, plan: UpdatePlan, work: IndexWork, path: Path) -> GalleryIndex:
    """Puts the finished pieces together and the file into place.

    An index that would be the same as before is left alone.
    """
    part_rows = {p: (part, row) for part in work.parts for row, p in enumerate(part.pictures)
             if part.pictures[p] == plan.stats.get(p)}  # fmt: skip
    failed = {p: why for part in work.parts for p, (_, why) in part.broken.items()}
    order = [p for p in plan.paths if p in plan.kept or p in part_rows]
    broken = dict(plan.broken) | {
        relative_to(p, plan.root): failed[p]
        for p in plan.paths
        if p in failed and p not in part_rows
    }
    if not order:
        work.remove()
        first = next(iter(broken.values()), "the index would be empty")
        raise ImageError(f"No picture is left to index, of {len(plan.paths)} given: {first}")
    fresh = [p for p in order if p not in plan.kept]
    changed = sum(p in plan.known for p in fresh)
    changes = Changes(
        added=len(fresh) - changed,
        changed=changed,
        removed=len(plan.known.keys() - set(order)),
        kept=len(order) - len(fresh),
    )
    metadata = {
        **way.to_json(),
        "schema": SCHEMA,
        "versions": versions(),
        **_whereabouts(plan, path),
    }
    columns = _columns(way, plan, order, part_rows, broken)
    if not fresh and plan.old is not None and _unchanged(plan.old, metadata, order, plan, columns):
        work.remove()
        return replace(plan.old, changes=changes)
    work.publish(metadata, columns, path)
    return replace(open_index(path, root=plan.root), changes=changes)


def _columns(
    way: IndexConfig,
    plan: UpdatePlan,
    order: Sequence[str],
    part_rows: Mapping[str, tuple[Part, int]],
    broken: Mapping[str, str],
) -> dict[str, Column]:
    """Every column of the new file."""
    old = plan.old

    def origin(path: str) -> int:
        return -1 if path in plan.kept else id(part_rows[path][0])

    sources = []
    for _, group in groupby(order, key=origin):
        some = list(group)
        if some[0] in plan.kept:
            assert old is not None
            tensors: Callable[[], Mapping[str, Tensor]] = lambda: old.tensors  # noqa: E731
            indices = tuple(plan.kept[p] for p in some)
        else:
            tensors = part_rows[some[0]][0].tensors
            indices = tuple(part_rows[p][1] for p in some)
        sources.append(SourceRows(tensors, indices))
    names = [name for name in sources[0].tensors() if name not in _SHARED]
    columns = {name: gathered(name, sources) for name in names}
    stats = [[plan.stats[p].changed, plan.stats[p].size] for p in order]
    shared = {
        "stats": torch.tensor(stats, dtype=torch.int64),
        "probe": way.identity.probe,
        "broken": torch.tensor(list(json.dumps(broken).encode()), dtype=torch.uint8),
        **packed_texts([relative_to(p, plan.root) for p in order]),
    }
    if way.keeping.basis is not None:
        shared["basis"] = way.keeping.basis
    return columns | {name: Column.of(tensor) for name, tensor in shared.items()}


def _unchanged(
    old: GalleryIndex,
    metadata: Mapping[str, Any],
    order: Sequence[str],
    plan: UpdatePlan,
    columns: Mapping[str, Column],
) -> bool:
    """Whether the new file would say what the old one does."""
    if [plan.kept[p] for p in order] != list(range(len(old))):
        return False
    if metadata["root"] != old.metadata["root"]:
        return False
    return all(
        torch.equal(next(columns[name].pieces()), old.tensors[name])
        for name in ("stats", "broken", "texts")
    )


def _whereabouts(plan: UpdatePlan, path: Path) -> dict[str, str]:
    """The folder of the pictures, absolute and as seen from the file."""
    try:
        relative = os.path.relpath(plan.root, path.absolute().parent)
    except ValueError:  # on another drive
        relative = ""
    return {"root": plan.root, "root_from_here": Path(relative).as_posix() if relative else ""}


GallerySource = str | Path | Sequence[Record | str | Path]

_SAMPLE = 256
"""Pictures from whose positions a common basis is found."""


@typed
@full_precision()
def build_index(
    model: nn.Module,
    source: GallerySource,
    path: str | Path,
    *,
    layer: str | None = None,
    batch_size: int = 32,
    basis: bool = True,
    width: int | None = None,
    jacobians: int = 0,
    force: bool = False,
    progress: StageProgress | None = None,
) -> GalleryIndex:
    """Embeds a gallery and keeps what any later comparison with it needs, in one file.

    Beside each embedding lies what every position of a layer adds to it (``position_parts``), in
    half precision. A heatmap or a matching of a gallery picture is then a product of matrices: the
    network is not run again and the picture is not read. An AVSL model's index keeps its packed
    rows and the feature maps of its levels. Models without layers, and tails that are not linear
    unless ``jacobians`` are given, have embeddings alone.

    Work that was killed goes on where it was when the same is called again, and gives the same
    file as if it had never stopped. Pictures that cannot be read are listed and left out. The file
    is written atomically.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        source: A folder, searched with all below it, or pictures.
        path: The file to write.
        layer: The layer whose positions are kept; the model's default unless given.
        batch_size: Pictures in one forward pass.
        basis: Whether to keep anything beside the embeddings.
        width: Project what positions add on so many dimensions, the principal axes of a sample of
            the gallery. Exact without; what lies outside them is lost from maps, most of it in
            pictures unlike the sample.
        jacobians: Jacobians to average for each picture where the network above the layer is not
            linear; 0 keeps nothing there. Slow: each takes a backward pass through that part
            for every dimension of the embedding.
        force: Replace an index that is there; any other file is left alone.
        progress: Called with what is done, how far it is, and how far it goes.

    Raises:
        ImageError: If no picture is given, or none can be read.
        ModelError: If the model or the layer cannot be used.
        OutputError: If the file exists already, is not an index and so not replaced, is being
            written by another process, or cannot be written.
    """
    path = Path(path)
    _check(path, batch_size, width, jacobians, force=force)
    paths, root = pictures_of(source)
    if absolute([path])[0] in paths:
        raise OutputError(f"'{path}' is a picture of the gallery; choose another file.")
    base = as_similarity_model(model)
    keeping = keeping_for(base, layer, steps=jacobians, basis=basis)
    if width is not None and keeping.kind != PARTS:
        raise ModelError(f"There is nothing to project on {width} dimensions: {keeping.reason}")
    way = IndexConfig.of(base, keeping, width)
    plan = planned(paths, root, None, drop=True)
    with alone(path):
        _check(path, batch_size, width, jacobians, force=force)  # once more: another may have ended
        return _made(base, way, plan, path, batch_size, progress)


@typed
@full_precision()
def update_index(
    model: nn.Module,
    source: GallerySource,
    path: str | Path,
    *,
    drop: bool = True,
    batch_size: int = 32,
    progress: StageProgress | None = None,
) -> GalleryIndex:
    """Brings an index up to date with its gallery: new, changed and missing pictures.

    A picture has changed if its time or size has and then its content as well. What has not is
    copied, not embedded again. The layer and all other choices stay those of the index. A gallery
    that was moved is known again by its relative paths.

    Args:
        model: The model that the index was made with; another one is refused.
        source: As for :func:`build_index`; one picture as well where nothing is dropped.
        path: The index.
        drop: Take out pictures that are not in the source. False only adds and refreshes.
        batch_size: Pictures in one forward pass.
        progress: Called with what is done, how far it is, and how far it goes.

    Raises:
        ImageError: If no picture is given, or none can be read.
        ModelError: If it is another model.
        ComparisonError: If no picture of the index is in the source, which seems another gallery,
            or the source is a folder inside the one that was indexed.
        OutputError: If the index is missing or damaged, or cannot be written.
    """
    path = Path(path)
    if not drop and isinstance(source, (str, Path)) and Path(source).is_file():
        source = [source]
    paths, root = pictures_of(source)
    base = as_similarity_model(model)
    with alone(path):
        old = open_index(path)
        old.identity.check(base, str(path))
        plan = planned(paths, root, old, drop=drop, progress=progress)
        if drop:
            _check_same_gallery(plan, old, source)
        return _made(base, IndexConfig.again(old), plan, path, batch_size, progress)


@typed
def remove_from_index(
    path: str | Path, pictures: str | Path | Sequence[str | Path]
) -> GalleryIndex:
    """Takes pictures out of an index; no model is needed.

    Args:
        path: The index.
        pictures: Pictures, or folders, all below which is taken out. They need not exist any more.

    Raises:
        ImageError: If one of them is not in the index, or nothing would be left.
        OutputError: If the index is missing or damaged, or cannot be written.
    """
    path = Path(path)
    with alone(path):
        old, way = open_index(path), IndexConfig.again(open_index(path))
        plan = without(old, absolute([pictures] if isinstance(pictures, (str, Path)) else pictures))
        return publish(way, plan, IndexWork(path, way.key), path)


def _made(
    model: SimilarityModel,
    way: IndexConfig,
    plan: UpdatePlan,
    path: Path,
    batch_size: int,
    progress: StageProgress | None,
) -> GalleryIndex:
    """Embeds what is to be done, part by part, and publishes the index."""
    work = IndexWork(path, way.key)
    todo = plan.todo(work)
    if todo:
        way = replace(way, keeping=with_tail(way.keeping, model))
    if way.width is not None:
        way = replace(way, keeping=_with_basis(model, way, plan, work, batch_size, progress))
    total = len(plan.paths) - len(plan.kept)
    size = model.batch_size or batch_size
    pictures = Pictures([Record(Path(p)) for p in todo], model.preprocess, size)
    reported = 0
    for indices, images in pictures:
        end = (indices[0] // size + 1) * size
        bad = _failed(pictures, plan, todo[reported:end])
        columns = run_rows(way.keeping, model, images, size) | pictures.facts(indices)
        fine = columns["embeddings"].isfinite().all(dim=1)
        for index in (indices[n] for n in (~fine).nonzero().flatten().tolist()):
            why = f"The embedding of '{todo[index]}' is not finite; check the model."
            bad[todo[index]] = (plan.stats[todo[index]], why)
        kept = [todo[index] for index, good in zip(indices, fine.tolist(), strict=True) if good]
        if not bool(fine.all()):
            columns = {name: part[fine] for name, part in columns.items()}
        work.add(columns, {p: plan.stats[p] for p in kept}, bad)
        reported = end
        if progress is not None:
            progress("Embedding pictures", total - max(0, len(todo) - end), total)
    if bad := _failed(pictures, plan, todo[reported:]):
        work.add({}, {}, bad)
    return publish(way, plan, work, path)


def _failed(
    pictures: Pictures, plan: UpdatePlan, paths: Sequence[str]
) -> dict[str, tuple[Stat, str]]:
    """Those of some pictures that could not be read."""
    broken = {str(path): why for path, why in pictures.broken.items()}
    return {p: (plan.stats[p], broken[p]) for p in paths if p in broken}


def _with_basis(
    model: SimilarityModel,
    way: IndexConfig,
    plan: UpdatePlan,
    work: IndexWork,
    batch_size: int,
    progress: StageProgress | None,
) -> IndexSpec:
    """The keeping with a common basis: the one chosen when the work began, else from a sample."""
    assert way.width is not None
    known = work.basis()
    if known is not None:
        return replace(way.keeping, basis=known[0], held=known[1])
    step = -(-len(plan.paths) // _SAMPLE)
    some = [Record(Path(p)) for p in plan.paths[::step]]
    pictures = Pictures(some, model.preprocess, model.batch_size or batch_size)

    def batches() -> Iterator[Tensor]:
        for number, (_, images) in enumerate(pictures):
            yield images
            if progress is not None:
                progress("Finding a basis", number + 1, len(pictures))

    keeping = common_basis(way.keeping, model, batches(), way.width)
    if keeping.basis is not None:
        work.keep_basis(keeping.basis, keeping.held)
    return keeping


def _check_same_gallery(plan: UpdatePlan, old: GalleryIndex, source: GallerySource) -> None:
    """Refuses to take everything else out because a part of the gallery was given."""
    advice = "add them with --add (drop=False), or index anew with --force."
    if plan.alien:
        raise ComparisonError(
            f"'{old.path}' is the index of '{old.root}', and none of its {len(old)} pictures is "
            f"among those given; {advice}"
        )
    whole = Path(absolute([old.root])[0])
    if isinstance(source, (str, Path)) and whole.is_dir() and whole in Path(plan.root).parents:
        raise ComparisonError(
            f"'{old.path}' is the index of '{old.root}', of which '{source}' is a part, so all "
            f"other pictures would be taken out; give the whole folder, {advice}"
        )


def _check(path: Path, batch_size: int, width: int | None, jacobians: int, *, force: bool) -> None:
    if path.exists() and not force:
        raise OutputError(
            f"'{path}' is there already; bring it up to date with update_index, choose another "
            "file or say --force (force=True)."
        )
    if path.exists() and not (path.is_file() and is_written_here(path)):
        raise OutputError(
            f"'{path}' is not an index of a gallery, so it is not replaced; choose another file, or"
            " remove it first."
        )
    limits = (("batch_size", batch_size, 1), ("width", width, 1), ("jacobians", jacobians, 0))
    for name, number, least in limits:
        if number is not None and number < least:
            raise ComparisonError(f"Expected {name} of at least {least}, got {number}.")
    if jacobians > MOST_STEPS:
        raise ComparisonError(f"Expected jacobians of at most {MOST_STEPS}, got {jacobians}.")
