"""Making an index of a gallery and keeping it up to date: what ``simexplain index`` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.data.folders import Record, StageProgress
from simexplain.errors import ComparisonError, ModelError, OutputError
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
    keeping_for,
    pictures_of,
    run_rows,
    with_tail,
)
from simexplain.searching.index_file import IndexWork, alone, is_written_here
from simexplain.searching.index_gallery import Changes, GalleryIndex, open_index
from simexplain.searching.index_update import IndexConfig, UpdatePlan, planned, publish, without

__all__ = [
    "Changes",
    "GalleryIndex",
    "build_index",
    "open_index",
    "remove_from_index",
    "update_index",
]

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
    steps: int = 0,
    force: bool = False,
    progress: StageProgress | None = None,
) -> GalleryIndex:
    """Embeds a gallery and keeps what any later comparison with it needs, in one file.

    Beside each embedding lies what every position of a layer adds to it (``position_parts``), in
    half precision. A heatmap or a matching of a gallery picture is then a product of matrices: the
    network is not run again and the picture is not read. An AVSL model's index keeps its packed
    rows and the feature maps of its levels. Models without layers, and tails that are not linear
    unless ``steps`` are given, have embeddings alone.

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
        steps: Jacobians to average for each picture where the network above the layer is not
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
    _check(path, batch_size, width, steps, force=force)
    paths, root = pictures_of(source)
    if absolute([path])[0] in paths:
        raise OutputError(f"'{path}' is a picture of the gallery; choose another file.")
    base = as_similarity_model(model)
    keeping = keeping_for(base, layer, steps=steps, basis=basis)
    if width is not None and keeping.kind != PARTS:
        raise ModelError(f"There is nothing to project on {width} dimensions: {keeping.reason}")
    way = IndexConfig.of(base, keeping, width)
    plan = planned(paths, root, None, drop=True)
    with alone(path):
        _check(path, batch_size, width, steps, force=force)  # once more: another may have ended
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


def _check(path: Path, batch_size: int, width: int | None, steps: int, *, force: bool) -> None:
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
    limits = (("batch_size", batch_size, 1), ("width", width, 1), ("steps", steps, 0))
    for name, number, least in limits:
        if number is not None and number < least:
            raise ComparisonError(f"Expected {name} of at least {least}, got {number}.")
    if steps > MOST_STEPS:
        raise ComparisonError(f"Expected steps of at most {MOST_STEPS}, got {steps}.")
