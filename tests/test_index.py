"""An index of a gallery: equal to the direct way, resumed after any kill, never half-written."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from avsl_cases import small_avsl
from cli_runs import Run, environment
from conftest import TinyNet
from pictures import noise
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

import simexplain.searching.index_file as index_work
from simexplain import (
    Preprocess,
    as_similarity_model,
    build_index,
    open_index,
    remove_from_index,
    update_index,
)
from simexplain.data.folders import Record
from simexplain.data.images import read_picture
from simexplain.errors import ComparisonError, ImageError, ModelError, OutputError, SimexplainError
from simexplain.methods.decomposition import position_parts
from simexplain.models.base import DISTANCES, SimilarityModel
from simexplain.searching.index_file import alone, work_folder
from simexplain.searching.index_gallery import GalleryIndex
from simexplain.searching.index_models import nearest

SIZE = (24, 32)
PREPARE = Preprocess(size=SIZE, fit="squash")
HALF = 2.0**-11


class Peak(TinyNet):
    """Max pooling: linear along the way from zero, but not the same for every position."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.last(self.body(self.act(self.norm(self.stem(images)))))
        return self.head(features.amax(dim=(2, 3)))


class Curved(TinyNet):
    """A tail that is not linear."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.last(self.body(self.act(self.norm(self.stem(images)))))
        return torch.tanh(self.head(features.mean(dim=(2, 3))))


def model_of(network: nn.Module, **options: object) -> SimilarityModel:
    return as_similarity_model(network.eval(), preprocess=PREPARE, **options)


def tiny_model(kind: type[nn.Module] = TinyNet, **options: object) -> SimilarityModel:
    torch.manual_seed(7)
    return model_of(kind(), **options)


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """Eleven pictures of several sizes in folders, one of them transparent."""
    root = tmp_path / "gallery"
    for number in range(10):
        folder = root / ("a", "b/c", ".")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        noise(30 + number, 40 - number, seed=number).save(folder / f"{number}.png")
    shape = noise(20, 20, seed=99)
    shape.putalpha(noise(20, 20, seed=98).convert("L"))
    shape.save(root / "shape.png")
    return root


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "gallery.index"


def tensor_of(model: SimilarityModel, path: Path) -> Tensor:
    return model.preprocess(read_picture(path).image)[0].unsqueeze(0)


def direct(model: SimilarityModel, index: GalleryIndex) -> Tensor:
    """Every picture embedded alone."""
    files = [index.file(position) for position in range(len(index))]
    with torch.no_grad():
        return torch.cat([model.embed(tensor_of(model, file)) for file in files])


def same(a: GalleryIndex, b: GalleryIndex) -> None:
    """The same pictures with the same columns, but for how images were batched."""
    assert sorted(a.paths) == sorted(b.paths)
    other = [b.paths.index(path) for path in a.paths]
    for name in ("sizes", "digests"):
        assert torch.equal(a.tensors[name], b.tensors[name][other])
    torch.testing.assert_close(a.embeddings, b.embeddings[other], rtol=0, atol=1e-6)
    result, wanted = a.factors(range(len(a))), b.factors(other)
    torch.testing.assert_close(result.parts, wanted.parts, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(result.vectors, wanted.vectors, rtol=0, atol=1e-5)


def nothing_left(out: Path) -> None:
    assert not work_folder(out).exists()
    assert not list(out.parent.glob(".simexplain-*"))


def test_rows_are_those_of_the_model(gallery: Path, out: Path) -> None:
    model = tiny_model()
    model.train()
    index = build_index(model, gallery, out, batch_size=4)
    assert model.training  # left as it was
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    assert len(index) == 11
    torch.testing.assert_close(index.embeddings, direct(model, index), rtol=0, atol=1e-6)
    assert {*index.paths} == {
        path.relative_to(gallery).as_posix() for path in gallery.rglob("*.png")
    }
    for position, path in enumerate(index.paths):
        assert index.place_of(gallery / path) == position
        picture = read_picture(gallery / path).image
        assert tuple(index.sizes[position].tolist()) == (picture.height, picture.width)
        assert index.geometry(position) == model.preprocess(picture)[1]
    assert index.place_of(out) is None
    nothing_left(out)


def test_factors_of_average_pooling_are_the_head_on_every_position(
    gallery: Path, out: Path
) -> None:
    model = tiny_model()
    index = build_index(model, gallery, out, batch_size=4)
    factors = index.factors(range(len(index)))
    network = model.network
    for position in range(len(index)):
        with torch.no_grad():
            image = tensor_of(model, index.file(position))
            grid = network.last(network.body(network.act(network.norm(network.stem(image)))))
            naive = torch.einsum("ec,chw->ehw", network.head.weight, grid[0]) / grid[0, 0].numel()
        assert (factors.parts[position] - naive).abs().max() <= HALF * naive.abs().max()
        assert (factors.rest[position] - network.head.bias).abs().max() <= HALF * max(
            naive.abs().max(), network.head.bias.abs().max()
        )
        torch.testing.assert_close(factors.vectors[position], network(image)[0].detach())
    sums = factors.parts.sum(dim=(2, 3)) + factors.rest
    torch.testing.assert_close(sums, factors.vectors, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("kind", "steps"), [(TinyNet, 0), (Peak, 0), (Curved, 4)])
@pytest.mark.parametrize("layer", [None, "act"])
def test_factors_are_position_parts_in_half_precision(
    kind: type[nn.Module], steps: int, layer: str | None, gallery: Path, out: Path
) -> None:
    model = tiny_model(kind)
    if layer == "act":
        steps = 4  # a convolution and a ReLU above it
    index = build_index(model, gallery, out, layer=layer, jacobians=steps, batch_size=3)
    assert index.has_basis
    assert index.layer == (layer or model.default_layer)
    for position in (0, 5, 10):
        image = tensor_of(model, index.file(position))
        wanted = position_parts(model, image, index.layer, steps=steps or 16)
        result = index.factors([position])
        top = max(float(wanted.parts.abs().max()), float(wanted.rest.abs().max()))
        assert (result.parts - wanted.parts).abs().max() <= 1.01 * HALF * top
        assert (result.rest - wanted.rest).abs().max() <= 1.01 * HALF * top
        torch.testing.assert_close(result.vectors, wanted.vectors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_half_precision_holds_for_any_size_of_numbers(
    scale: float, gallery: Path, out: Path
) -> None:
    torch.manual_seed(7)
    network = TinyNet()
    network.head.weight.data *= scale
    network.head.bias.data *= scale
    index = build_index(model_of(network), gallery, out)
    factors = index.factors([0, 1])
    assert factors.parts.isfinite().all()
    image = tensor_of(model_of(network), index.file(1))
    wanted = position_parts(model_of(network), image, index.layer).parts[0]
    assert (factors.parts[1] - wanted).abs().max() <= 1.01 * HALF * wanted.abs().max()


def test_a_narrow_basis_is_a_projection(gallery: Path, out: Path) -> None:
    model = tiny_model()
    whole = build_index(model, gallery, out)
    narrow = build_index(model, gallery, out.with_name("narrow"), width=4)
    basis = narrow.keeping.basis
    assert basis is not None
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), rtol=0, atol=1e-5)
    assert narrow.tensors["parts"].shape[1] == 4
    every = range(len(whole))
    projected = torch.einsum("ed,fd,mfhw->mehw", basis, basis, whole.factors(every).parts)
    result = narrow.factors(every)
    torch.testing.assert_close(result.parts, projected, rtol=0, atol=2e-3)
    torch.testing.assert_close(result.vectors, whole.factors(every).vectors)
    # It holds the share that it says: the axes were found on these very pictures.
    squares = whole.factors(every).parts.double().square().sum()
    assert float(result.parts.double().square().sum() / squares) == pytest.approx(
        narrow.keeping.held, abs=1e-3
    )
    assert narrow.keeping.held < 1
    exact = build_index(model, gallery, out.with_name("wide"), width=10)
    assert exact.keeping.basis is None


def test_what_cannot_be_taken_apart_is_said(gallery: Path, out: Path) -> None:
    curved = build_index(tiny_model(Curved), gallery, out)
    assert not curved.has_basis
    assert "not linear" in curved.without_basis
    with pytest.raises(ModelError, match=r"keeps no basis.*not linear"):
        curved.factors([0])
    program = torch.jit.trace(tiny_model().network, torch.rand(1, 3, *SIZE))
    sealed = as_similarity_model(program, preprocess=PREPARE)
    index = build_index(sealed, gallery, out, force=True)
    assert "black box" in index.without_basis
    torch.testing.assert_close(index.embeddings, direct(sealed, index), rtol=0, atol=1e-6)
    sealed_query = index.embeddings[3:4]
    assert int(index.neighbours(sealed_query, 1)[1]) == 3
    with pytest.raises(ModelError, match=r"other weights|differently"):
        index.check_model(
            as_similarity_model(
                torch.jit.trace(TinyNet().eval(), torch.rand(1, 3, *SIZE)), preprocess=PREPARE
            )
        )
    index.check_model(sealed)
    plain = build_index(tiny_model(), gallery, out, basis=False, force=True)
    assert "parts" not in plain.tensors
    with pytest.raises(ModelError, match="no layer 'nowhere'"):
        build_index(tiny_model(), gallery, out, layer="nowhere", force=True)


def test_a_fixed_batch_is_obeyed(gallery: Path, out: Path) -> None:
    class Fixed(TinyNet):
        def forward(self, images: Tensor) -> Tensor:
            assert len(images) == 4
            return super().forward(images)

    torch.manual_seed(7)
    index = build_index(model_of(Fixed(), batch_size=4), gallery, out)
    same(index, build_index(tiny_model(), gallery, out.with_name("free")))


def brute(q: Tensor, g: Tensor, k: int, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Places by all distances in float64, one pair at a time; the smaller place first."""
    table = torch.stack(
        [torch.cat([distance(a[None], b[None])[0] for b in g.double()]) for a in q.double()]
    )
    return table.argsort(dim=1, stable=True)[:, :k]


@pytest.mark.parametrize("name", list(DISTANCES))
@pytest.mark.parametrize("seed", range(4))
def test_neighbours_equal_brute_force(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn((90, 6), generator=generator), dim=1)
    # Copies and near copies, whose order faiss alone would get wrong.
    rows = torch.cat((rows, rows[:20], rows[:20], F.normalize(rows[:20] + 1e-6, dim=1)))
    rows = rows[torch.randperm(len(rows), generator=generator)].contiguous()
    queries = torch.cat((rows[:6], F.normalize(torch.randn((5, 6), generator=generator), dim=1)))
    for k in (1, 3, 40, len(rows)):
        distances, places = nearest(rows, queries, k, name)
        assert torch.equal(places, brute(queries, rows, k, DISTANCES[name]))
        wanted = DISTANCES[name](queries.double(), rows.double()).gather(1, places).float()
        torch.testing.assert_close(distances, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", list(DISTANCES))
def test_more_ties_than_were_asked_for_are_broken_by_place(name: str) -> None:
    rows = F.normalize(torch.ones(500, 8), dim=1)
    rows[250:] = F.normalize(torch.arange(8.0), dim=0)
    _, places = nearest(rows, rows[:1], 3, name)
    assert places.tolist() == [[0, 1, 2]]
    _, places = nearest(rows, rows[-1:], 3, name)
    assert places.tolist() == [[250, 251, 252]]


def test_neighbours_by_a_distance_of_the_models_own() -> None:
    class City(nn.Module):
        def distance(self, q: Tensor, g: Tensor) -> Tensor:
            return torch.cdist(q, g, p=1)

    rows, queries = torch.randn(300, 6), torch.randn(5, 6)
    model = tiny_model()
    model.distance = City().distance  # type: ignore[method-assign]
    _, places = nearest(rows, queries, 7, "", model)
    assert torch.equal(places, torch.cdist(queries, rows, p=1).argsort(dim=1)[:, :7])
    with pytest.raises(ModelError, match="give the model"):
        nearest(rows, queries, 7)


def test_what_does_not_fit_is_refused(gallery: Path, out: Path) -> None:
    index = build_index(tiny_model(), gallery, out)
    for query, k in ((torch.rand(1, 9), 1), (torch.rand(1, 10), 0), (torch.rand(1, 10), 12)):
        with pytest.raises(ComparisonError, match="Expected"):
            index.neighbours(query, k)
    with pytest.raises(ModelError, match="finite"):
        index.neighbours(torch.full((1, 10), torch.nan), 1)
    for places in ([11], [-1]):
        with pytest.raises(ComparisonError, match="places between 0 and 10"):
            index.factors(places)
    with pytest.raises(ModelError, match="no maps of levels"):
        index.level_maps([0])
    for options in ({"batch_size": 0}, {"width": 0}, {"steps": -1}):
        with pytest.raises(ComparisonError, match="at least"):
            build_index(tiny_model(), gallery, out.with_name("new"), **options)
    with pytest.raises(ImageError, match="at least one picture"):
        build_index(tiny_model(), [], out.with_name("new"))


def test_avsl_keeps_rows_and_levels_and_its_own_exact_search(gallery: Path, out: Path) -> None:
    model = small_avsl()
    model.preprocess = PREPARE
    index = build_index(model, gallery, out, batch_size=4)
    rows = torch.cat(
        [model.embed(tensor_of(model, index.file(n)).double()) for n in range(len(index))]
    ).detach()
    torch.testing.assert_close(index.embeddings.double(), rows, rtol=0, atol=1e-6)
    assert index.has_levels
    assert not index.has_basis
    maps = index.level_maps([4, 2])
    wanted = model.feature_maps(
        torch.cat([tensor_of(model, index.file(n)) for n in (4, 2)]).double()
    )
    for result, level in zip(maps, wanted, strict=True):
        assert (result - level).abs().max() <= 1.01 * HALF * level.abs().max()
    distances, places = index.neighbours(rows, 4, model)
    table = model.distance(rows, index.embeddings.double())
    assert torch.equal(places, table.argsort(dim=1, stable=True)[:, :4])
    torch.testing.assert_close(distances, table.gather(1, places).detach())
    with pytest.raises(ModelError, match="give the model"):
        index.neighbours(rows, 4)
    index.check_model(model)
    model.options = small_avsl("official").options
    with pytest.raises(ModelError, match="was made with"):
        index.check_model(model)
    with pytest.raises(ModelError, match="no layer for an AVSL model"):
        build_index(model, gallery, out, layer="stage1", force=True)


class Killed(BaseException):
    """What no handler in the library may catch."""


def kill_at(monkeypatch: pytest.MonkeyPatch, call: int, share: float) -> None:
    """The n-th file is cut off in the middle of being written, and the process gone."""
    write, calls = index_work.write_columns, []

    def torn(path: Path, *arguments: object) -> None:
        write(path, *arguments)
        calls.append(path)
        if len(calls) == call:
            content = path.read_bytes()
            path.write_bytes(content[: int(share * len(content))])
            raise Killed

    monkeypatch.setattr(index_work, "write_columns", torn)


@pytest.mark.parametrize("seed", range(8))
def test_resumed_after_kills_at_random_points_it_is_the_same_file(
    seed: int, gallery: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = random.Random(seed)
    (gallery / "a" / "broken.jpg").write_bytes(b"no picture")
    (gallery / "b" / "cut.png").write_bytes((gallery / "shape.png").read_bytes()[:200])
    options = {"batch_size": drawn.choice((1, 2, 3, 5)), "width": drawn.choice((None, 3))}
    build_index(tiny_model(), gallery, out, **options)
    wanted = out.read_bytes()
    out.unlink()
    kills = 0
    while not out.exists():
        with monkeypatch.context() as patched:
            kill_at(patched, drawn.randint(1, 4), drawn.random())
            try:
                build_index(tiny_model(), gallery, out, **options)
            except Killed:
                kills += 1
                assert not out.exists()
        assert kills < 100
    assert kills
    assert out.read_bytes() == wanted
    nothing_left(out)


def test_work_of_another_model_is_not_taken_over(
    gallery: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        kill_at(patched, 3, 0.5)
        with pytest.raises(Killed):
            build_index(tiny_model(), gallery, out, batch_size=2)
    torch.manual_seed(8)
    other = model_of(TinyNet())
    index = build_index(other, gallery, out, batch_size=2)
    torch.testing.assert_close(index.embeddings, direct(other, index), rtol=0, atol=1e-6)
    nothing_left(out)


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_index as tests
class Slow(tests.TinyNet):
    def forward(self, images):
        time.sleep(0.05)
        return super().forward(images)
tests.build_index(tests.tiny_model(Slow, name="Counted"), sys.argv[2], sys.argv[3], batch_size=1)
"""


def parts_of(started: subprocess.Popen[bytes], out: Path, count: int) -> list[Path]:
    """The files of the work so far, as soon as there are so many."""
    while len(parts := list(work_folder(out).glob("0*.safetensors"))) < count:
        assert started.poll() is None
        time.sleep(0.002)
    return parts


def test_another_process_writes_alone_and_killed_its_work_goes_on(gallery: Path, out: Path) -> None:
    record = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(gallery), str(out)]
    started = subprocess.Popen(record, env=environment())
    try:
        parts_of(started, out, 1)
        with pytest.raises(OutputError, match="being written by another process"):
            build_index(tiny_model(), gallery, out)
        parts = parts_of(started, out, 3)  # the other's are left alone
    finally:
        started.kill()
    assert started.wait(timeout=60) == -signal.SIGKILL
    assert not out.exists()
    network, model = counted()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as it was begun
    try:
        resumed = build_index(model, gallery, out, batch_size=1)
        assert resumed.changes.added == 11
        content = out.read_bytes()
        out.unlink()
        whole, model = counted()
        build_index(model, gallery, out, batch_size=1)
    finally:
        torch.set_num_threads(threads)
    assert whole.seen - network.seen >= len(parts)  # those were not embedded again
    assert out.read_bytes() == content
    nothing_left(out)


def test_an_index_is_written_by_one_at_a_time(gallery: Path, out: Path) -> None:
    index = build_index(tiny_model(), gallery, out)
    with alone(out):
        for change in (
            lambda: build_index(tiny_model(), gallery, out, force=True),
            lambda: update_index(tiny_model(), gallery, out),
            lambda: remove_from_index(out, gallery / "b"),
        ):
            with pytest.raises(OutputError, match="being written"):
                change()
    assert len(open_index(out)) == len(index)
    nothing_left(out)


def test_force_replaces_an_index_and_nothing_else(gallery: Path, out: Path) -> None:
    photo = out.with_name("photo.png")
    noise(20, 20).save(photo)
    content = photo.read_bytes()
    with pytest.raises(OutputError, match="is not an index of a gallery, so it is not replaced"):
        build_index(tiny_model(), gallery, photo, force=True)
    assert photo.read_bytes() == content
    for length in (0, 300):  # nothing at all, and an index that was cut off
        build_index(tiny_model(), gallery, out, force=True)
        out.write_bytes(out.read_bytes()[:length])
    assert len(build_index(tiny_model(), gallery, out, force=True)) == 11


def test_ctrl_c_leaves_an_earlier_index_untouched(gallery: Path, out: Path) -> None:
    build_index(tiny_model(), gallery, out)
    before = out.read_bytes()
    for number in range(6):
        noise(20, 20, seed=50 + number).save(gallery / f"new{number}.png")

    def strike(what: str, done: int, total: int) -> None:
        if what == "Embedding pictures" and done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_index(tiny_model(), gallery, out, batch_size=2, progress=strike)
    assert out.read_bytes() == before
    index = update_index(tiny_model(), gallery, out, batch_size=2)
    assert (index.changes.added, index.changes.kept) == (6, 11)
    same(index, build_index(tiny_model(), gallery, out.with_name("fresh")))


def test_broken_pictures_are_listed_and_left_out(gallery: Path, out: Path) -> None:
    (gallery / "a" / "bad.jpg").write_bytes(b"nothing")
    noise(400, 2).save(gallery / "strip.png")  # can be read, if elongated
    missing = gallery / "missing.png"
    index = build_index(tiny_model(), gallery, out, batch_size=2)
    assert list(index.errors) == ["a/bad.jpg"]
    assert "bad.jpg" in index.errors["a/bad.jpg"]
    assert "strip.png" in index.paths
    records = [Record(gallery / "0.png"), Record(missing), Record(gallery / "9.png")]
    records[0] = Record(gallery / "a" / "0.png")
    listed = build_index(tiny_model(), records[:2], out.with_name("listed"))
    assert len(listed) == 1
    assert "no file" in next(iter(listed.errors.values()))
    with pytest.raises(ImageError, match=r"No picture is left to index, of 1 given: .*bad\.jpg"):
        build_index(tiny_model(), [gallery / "a" / "bad.jpg"], out.with_name("none"))
    assert not out.with_name("none").exists()
    nothing_left(out.with_name("none"))


def test_embeddings_that_are_not_finite_count_as_broken(gallery: Path, out: Path) -> None:
    class Sometimes(TinyNet):
        def forward(self, images: Tensor) -> Tensor:
            rows = super().forward(images)
            return torch.where(images.mean(dim=(1, 2, 3))[:, None] > 2, torch.nan, rows)

    from PIL import Image

    Image.new("RGB", (20, 20), (255, 255, 255)).save(gallery / "white.png")
    torch.manual_seed(7)
    index = build_index(model_of(Sometimes()), gallery, out, batch_size=4)
    assert len(index) == 11
    assert "not finite" in index.errors["white.png"]


class Counted(TinyNet):
    """Counts the images that were run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return super().forward(images)


def counted() -> tuple[Counted, SimilarityModel]:
    torch.manual_seed(7)
    network = Counted()
    return network, model_of(network)


def test_update_embeds_what_is_new_and_copies_the_rest(gallery: Path, out: Path) -> None:
    _, model = counted()
    first = build_index(model, gallery, out)
    names = first.paths
    noise(33, 33, seed=77).save(gallery / "new.png")
    noise(50, 50, seed=78).save(gallery / names[1])  # changed
    os.utime(gallery / names[2], ns=(1, 1))  # another time, the same content
    (gallery / names[3]).unlink()
    network, model = counted()
    index = update_index(model, gallery, out, batch_size=2)
    changes = index.changes
    assert (changes.added, changes.changed, changes.removed, changes.kept) == (1, 1, 1, 9)
    assert network.seen <= 2 + 10  # two pictures; the rest finds out about the model
    same(index, build_index(tiny_model(), gallery, out.with_name("fresh")))
    assert index.paths == open_index(out.with_name("fresh")).paths
    content, stamp = out.read_bytes(), out.stat().st_mtime_ns
    again = update_index(model, gallery, out)
    assert again.changes.kept == 11
    assert (out.read_bytes(), out.stat().st_mtime_ns) == (content, stamp)  # not even written
    nothing_left(out)


def test_a_change_of_equal_size_and_time_is_the_only_one_missed(gallery: Path, out: Path) -> None:
    path = gallery / "flat.bmp"
    noise(20, 20, seed=1).save(path)
    build_index(tiny_model(), gallery, out)
    noise(20, 20, seed=2).save(path)  # as many bytes, another time
    os.utime(path, ns=(5, 5))
    assert update_index(tiny_model(), gallery, out).changes.changed == 1


def test_add_and_remove(gallery: Path, out: Path, tmp_path: Path) -> None:
    model = tiny_model()
    build_index(model, gallery, out)
    other = tmp_path / "elsewhere"
    other.mkdir()
    noise(30, 30, seed=300).save(other / "x.png")
    added = update_index(model, other, out, drop=False)
    assert (added.changes.added, added.changes.kept) == (1, 11)
    assert added.paths[-1] == (other / "x.png").as_posix()
    assert added.file(11) == other / "x.png"
    torch.testing.assert_close(added.embeddings, direct(model, added), rtol=0, atol=1e-6)
    left = remove_from_index(out, [other / "x.png", gallery / "b"])
    assert left.changes.removed == 1 + len(list((gallery / "b").rglob("*.png")))
    assert not any(path.startswith("b/") for path in left.paths)
    torch.testing.assert_close(left.embeddings, direct(model, left), rtol=0, atol=1e-6)
    with pytest.raises(ImageError, match="not in the index"):
        remove_from_index(out, other)
    before = out.read_bytes()
    with pytest.raises(ImageError, match="leave a picture"):
        remove_from_index(out, gallery)
    assert out.read_bytes() == before
    with pytest.raises(ComparisonError, match="none of its"):
        update_index(model, other, out)
    nothing_left(out)


def test_a_part_of_the_gallery_does_not_take_out_the_rest(gallery: Path, out: Path) -> None:
    build_index(tiny_model(), gallery, out)
    before = out.read_bytes()
    with pytest.raises(ComparisonError, match="is a part, so all other pictures"):
        update_index(tiny_model(), gallery / "a", out)
    assert out.read_bytes() == before
    assert update_index(tiny_model(), gallery / "a", out, drop=False).changes.kept == 11


def test_what_is_taken_out_is_no_longer_listed_as_broken(gallery: Path, out: Path) -> None:
    for index in ("a", "b"):
        (gallery / index / "bad.png").write_bytes(b"none")
    assert set(build_index(tiny_model(), gallery, out).errors) == {"a/bad.png", "b/bad.png"}
    assert set(remove_from_index(out, gallery / "b").errors) == {"a/bad.png"}


def test_one_picture_is_added_or_refreshed(gallery: Path, out: Path) -> None:
    index = build_index(tiny_model(), gallery, out)
    assert index.is_current(0)
    one = index.file(0)
    noise(25, 25, seed=400).save(one)
    assert not index.is_current(0)
    index = update_index(tiny_model(), one, out, drop=False)
    assert (index.changes.changed, index.changes.kept) == (1, 10)
    assert index.is_current(0)
    with pytest.raises(ImageError, match="folder"):
        update_index(tiny_model(), one, out)  # would drop all others
    content = one.read_bytes()
    with pytest.raises(OutputError, match="is not an index of a gallery"):
        build_index(tiny_model(), gallery, one, force=True)
    assert one.read_bytes() == content
    with pytest.raises(OutputError, match="is a picture of the gallery"):
        build_index(tiny_model(), [one, gallery / "new.png"], gallery / "new.png")


def test_only_what_is_ours_is_removed(gallery: Path, out: Path) -> None:
    work_folder(out).mkdir()
    (work_folder(out) / "notes.txt").write_text("mine", encoding="utf-8")
    build_index(tiny_model(), gallery, out)
    assert [path.name for path in work_folder(out).iterdir()] == ["notes.txt"]


def test_a_moved_gallery_is_found_again(gallery: Path, tmp_path: Path) -> None:
    model = tiny_model()
    old = tmp_path / "old"
    old.mkdir()
    shutil.move(gallery, old / "gallery")
    index = build_index(model, old / "gallery", old / "index")
    new = tmp_path / "new"
    old.rename(new)
    assert open_index(new / "index").file(0) == new / "gallery" / index.paths[0]  # both moved
    (new / "gallery").rename(tmp_path / "other")
    assert open_index(new / "index", root=tmp_path / "other").file(0).is_file()
    with pytest.raises(OutputError, match="no folder"):
        open_index(new / "index", root=tmp_path / "nowhere")
    network, model = counted()
    updated = update_index(model, tmp_path / "other", new / "index")
    assert updated.changes.kept == 11
    assert network.seen < 11  # known again by their relative paths
    assert open_index(new / "index").file(0) == tmp_path / "other" / index.paths[0]


def test_a_changed_model_is_refused(gallery: Path, out: Path) -> None:
    index = build_index(tiny_model(), gallery, out)
    before = out.read_bytes()
    index.check_model(tiny_model(name="under another name"))
    index.check_model(tiny_model(distance="cosine"))
    changed = tiny_model()
    changed.network.stem.weight.data[0, 0, 0, 0] += 1e-4
    resized = as_similarity_model(tiny_model().network, preprocess=Preprocess(size=(32, 32)))
    hidden = tiny_model()
    hidden.network.forward = lambda images: TinyNet.forward(hidden.network, images).flip(1)
    for model, why in (
        (changed, "other weights"),
        (resized, "size 24x32"),
        (hidden, "differently"),
    ):
        with pytest.raises(ModelError, match=why) as caught:
            index.check_model(model)
        assert str(caught.value).count("\n") == 0
        with pytest.raises(ModelError, match=why):
            update_index(model, gallery, out)
    assert out.read_bytes() == before
    nothing_left(out)


def test_files_that_are_no_index_are_refused_in_one_sentence(gallery: Path, out: Path) -> None:
    build_index(tiny_model(), gallery, out)
    content = out.read_bytes()
    broken = out.with_name("broken")
    for size in (0, 4, 9, 300, len(content) // 2, len(content) - 1):
        broken.write_bytes(content[:size])
        with pytest.raises(OutputError, match="broken") as caught:
            open_index(broken)
        assert str(caught.value).endswith(".")
    for other in (content + b"x", content.replace(b'schema\\":1', b'schema\\":7'), b"PK" * 500,
                  content.replace(b"text_ends", b"text_endz"),
                  content.replace(b"simexplain_index", b"simexplain_indeX")):  # fmt: skip
        if other != content:
            broken.write_bytes(other)
            with pytest.raises(OutputError):
                open_index(broken)
    with pytest.raises(OutputError, match="There is no index"):
        open_index(out.with_name("none"))
    with pytest.raises(OutputError, match="already"):
        build_index(tiny_model(), gallery, out)
    assert out.read_bytes() == content


def test_the_file_is_safetensors_without_code(gallery: Path, out: Path) -> None:
    build_index(tiny_model(), gallery, out)
    with safe_open(out, framework="np") as file:
        assert file.get_slice("parts").get_shape() == [11, 10, 6, 8]
        assert file.get_tensor("embeddings").dtype == "float32"
        assert file.get_tensor("parts").dtype == "float16"


def test_a_full_disk_keeps_what_is_done(
    gallery: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(index_work, "write_columns", full)
        with pytest.raises(OutputError, match="No space left"):
            build_index(tiny_model(), gallery, out)
    assert not out.exists()


NET = ("timm:tf_efficientnet_lite0", "--size", "64")


def test_command(run: Callable[..., Run], here: Path) -> None:
    for name in ("text.jpg", "cut.jpg", "empty.png", "strip.png"):
        (here / name).rename(here / name.replace(".", "_bad."))
    (here / "pictures").mkdir()
    for name in ("a.png", "b.jpg", "whole.jpg", "cut_bad.jpg"):
        (here / name).rename(here / "pictures" / name)
    lines = run("index", NET[0], "pictures", "--out", "i", *NET[1:])
    assert lines.code == 0, lines.err
    assert "layer bn2: 3 pictures" in lines.out
    assert "3 added, 0 changed, 0 removed, 0 kept" in lines.out
    assert "2x2 positions add in 1280 dimensions" in lines.out
    assert lines.err.startswith("Warning: left out: ")
    assert "cut_bad.jpg" in lines.err
    record = json.loads(run("index", NET[0], "pictures", "--out", "i", *NET[1:], "--json").out)
    assert (record["schema"], record["images"], record["embedding"]) == (1, 3, 1280)
    assert record["changes"] == {"added": 0, "changed": 0, "removed": 0, "kept": 3}
    assert record["basis"]["width"] == 1280
    assert record["basis"]["grid"] == [2, 2]
    assert record["errors"][0]["path"] == "cut_bad.jpg"
    assert record["bytes_per_image"] == 1280 * (4 + 2 + 4 * 2) + 4 * 3 + 8 + 16 + 16 + 8
    removed = run("index", "-", "pictures/a.png", "--out", "i", "--remove")
    assert "2 pictures" in removed.out
    assert "1 removed" in removed.out
    added = run("index", NET[0], "pictures", "--out", "i", "--add", *NET[1:])
    assert "1 added, 0 changed, 0 removed, 2 kept" in added.out
    alone = run("index", NET[0], "pictures", "--out", "i", "--force", "--no-basis", *NET[1:])
    assert "embeddings alone" in alone.out


def test_command_refuses_in_one_line(
    run: Callable[..., Run], fails: Callable[..., str], here: Path
) -> None:
    (here / "pictures").mkdir()
    shutil.copy(here / "a.png", here / "pictures" / "a.png")
    assert run("index", NET[0], "pictures", "--out", "i", *NET[1:]).code == 0
    assert "index of a gallery" in fails("index", NET[0], "pictures", "--out", "text.jpg")
    assert "There is no index" in fails("index", NET[0], "pictures", "--out", "j", "--add")
    assert "is none" in fails("index", NET[0], "nowhere", "--out", "j")
    assert "is a folder" in fails("index", NET[0], "pictures", "--out", "pictures")
    assert "no folder" in fails("index", NET[0], "pictures", "--out", "no/j")
    assert "not made with --width 9" in fails(
        "index", NET[0], "pictures", "--out", "i", "--width", 9
    )
    assert "size 64x64" in fails("index", NET[0], "pictures", "--out", "i")
    assert "exclude" in fails("index", "m", "p", "--out", "i", "--add", "--remove", code=2)
    with pytest.raises(SimexplainError):
        open_index("nowhere")


def test_command_interrupted_says_how_to_go_on(
    run: Callable[..., Run], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "pictures").mkdir()
    for number in range(4):
        noise(40, 40, seed=number).save(here / "pictures" / f"{number}.png")
    record = ("index", NET[0], "pictures", "--out", "i", "--batch-size", 1, *NET[1:])
    add = index_work.IndexWork.add

    def struck(self: index_work.IndexWork, *arguments: object) -> None:
        if self.parts:
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(index_work.IndexWork, "add", struck)
        lines = run(*record)
    assert (lines.code, lines.out) == (130, "")
    assert lines.err == "Error: Interrupted; the same command goes on where it was.\n"
    assert not (here / "i").exists()
    assert "4 added" in run(*record).out
    nothing_left(here / "i")
