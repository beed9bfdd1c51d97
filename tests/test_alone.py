"""An image's numbers do not depend on the images that share its pass; equal images, equal bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from conftest import TinyNet
from pictures import noise
from torch import Tensor, nn

from simexplain import (
    METHODS,
    Comparison,
    Preprocess,
    as_similarity_model,
    build_index,
    explain,
    open_index,
    search,
)
from simexplain.data.folders import pictures_in
from simexplain.evaluation.retrieval import embedded, evaluate_retrieval
from simexplain.models.base import DISTANCES, SimilarityModel
from simexplain.models.embedder import Embedder
from simexplain.tracing import embed_alike, trace

SIZE = (32, 32)
QUICK = {
    "random_masks": {"masks": 8}, "smoothgrad": {"samples": 2},
    "integrated_gradients": {"steps": 3}, "occlusion": {"window": 0.5, "stride": 0.5},
    "sbsm": {"window": 0.5, "stride": 0.5},
}  # fmt: skip
ATTENTION = ("attention", "attention_relevance", "grad_eclip")
EXCEPT = ("avsl", "weight_bank", *ATTENTION)  # which need a model or a bank of their own
CHANCE = ("random_masks", "smoothgrad")
"""Methods that draw noise for all images of a call in turn."""


def network(name: str) -> nn.Module:
    torch.manual_seed(3)
    if name == "tiny":
        return TinyNet().eval()
    return timm.create_model(name, num_classes=0).eval()


def model_of(name: str) -> SimilarityModel:
    return as_similarity_model(network(name), preprocess=Preprocess(SIZE))


@pytest.mark.parametrize("name", ["tiny", "test_efficientnet", "resnet18", "mobilenetv3_small_050"])
def test_an_embedding_is_the_same_in_any_company(name: str) -> None:
    model, images = model_of(name), torch.rand(17, 3, *SIZE)
    alone = [trace(model, image[None], ()).embeddings[0] for image in images]
    for count in (2, 3, 8, 16, 17):
        together = trace(model, images[:count], ()).embeddings
        assert torch.equal(together, torch.stack(alone[:count])), count
        assert torch.equal(embed_alike(model, images[:count], 8), torch.stack(alone[:count]))


@pytest.mark.parametrize("method", [n for n in METHODS if n not in (*EXCEPT, *CHANCE)])
@pytest.mark.parametrize("name", ["tiny", "test_efficientnet"])
def test_an_explanation_is_the_same_in_any_company(name: str, method: str) -> None:
    model, options = model_of(name), QUICK.get(method, {})
    stack = torch.rand(4, 3, 3, *SIZE)
    whole = Comparison(stack[:, 0], stack[:, 1:2], stack[:, 2:])
    layers = {"layer": ("stem", "last")} if (method, name) == ("focus", "tiny") else {}
    together = explain(model, whole, method, **layers, **options)
    for row in range(4):
        one = Comparison(
            stack[row : row + 1, 0], stack[row : row + 1, 1:2], stack[row : row + 1, 2:]
        )
        alone = explain(model, one, method, **layers, **options)
        for part in ("embeddings", "distances"):
            assert torch.equal(getattr(alone, part)[0], getattr(together, part)[row]), part
        # What follows a pass is computed for all images of a call in one tensor, in which an
        # exponential function rounds the last few numbers in another way; focus raises maps to
        # powers, which multiplies that.
        limit = 5e-6 if method == "focus" else 1e-6
        for part in ("maps", "scores", "weights", "heatmaps"):
            a, b = getattr(alone, part)[0], getattr(together, part)[row]
            assert (a - b).abs().max() <= limit * b.abs().max(), part


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_rows_are_equally_far(distance: str) -> None:
    rows = nn.functional.normalize(torch.randn(3, 128), dim=1)
    for count in (7, 36, 1001):
        copies = rows[:1].expand(count, -1).contiguous()
        far = DISTANCES[distance](rows, copies)
        assert torch.equal(far, far[:, :1].expand(-1, count))
        assert torch.equal(DISTANCES[distance](rows[1:2], copies[:1]), far[1:2, :1])


def test_cosine_distance_is_one_minus_the_cosine() -> None:
    q, g = torch.randn(4, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(DISTANCES["cosine"](q, g), 1 - q @ g.T)
    q, g = q.requires_grad_(), g.requires_grad_()
    ours = torch.autograd.grad(DISTANCES["cosine"](q, g)[1, 2], (q, g))
    plain = torch.autograd.grad((1 - q @ g.T)[1, 2], (q, g))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    zero = torch.zeros(1, 9, dtype=torch.float64)
    torch.testing.assert_close(DISTANCES["cosine"](zero, g.detach()), torch.ones_like(g[:, :1].T))


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """Three pictures in three classes, and a copy of each in every other class."""
    for number in range(3):
        for label in "abc":
            folder = tmp_path / "pictures" / label
            folder.mkdir(parents=True, exist_ok=True)
            first = tmp_path / f"{number}.png"
            if not first.exists():
                noise(40, 40, seed=number).save(first)
            shutil.copy(first, folder / f"{number}{label}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("name", ["tiny", "test_efficientnet"])
def test_copies_of_a_picture_have_one_row_for_every_batch_size(copies: Path, name: str) -> None:
    model, records = model_of(name), pictures_in(copies, labelled=True)
    result = {size: embedded(model, records, batch_size=size) for size in (1, 2, 4, 7, 9, 32)}
    first = result[1].rows
    for size, other in result.items():
        assert torch.equal(other.rows, first), size
    for number in range(3):
        same = [
            row
            for row, r in zip(first, result[1].records, strict=True)
            if r.path.stem[0] == str(number)
        ]
        assert len(same) == 3
        assert torch.equal(same[0], same[1])
        assert torch.equal(same[0], same[2])
    results = [evaluate_retrieval(model, records, batch_size=size).to_json() for size in (1, 4, 9)]
    assert results[0]["recall"] == results[1]["recall"] == results[2]["recall"]


def test_an_index_does_not_depend_on_the_batch_size(copies: Path, tmp_path: Path) -> None:
    model = model_of("test_efficientnet")
    paths = [tmp_path / f"{size}.index" for size in (1, 4, 32)]
    for path, size in zip(paths, (1, 4, 32), strict=True):
        build_index(model, copies, path, batch_size=size)
    contents = {path.read_bytes() for path in paths}
    assert len(contents) == 1
    query = copies / "a" / "0a.png"
    hits = search(model, query, open_index(paths[0]), k=3)
    distances = [hit.distance for hit in hits.hits]
    assert distances[0] == distances[1] == 0


def test_on_other_devices_every_pass_has_one_size() -> None:
    """Stands in for a graphics card, where images go through a network together."""

    class Card(Embedder):
        def pass_size(self, count: int, limit: int | None = None, *, together: bool = False) -> int:
            return min(limit or count, count)

    sizes: list[int] = []

    class Counted(TinyNet):
        def forward(self, images: Tensor) -> Tensor:
            sizes.append(len(images))
            return super().forward(images)

    torch.manual_seed(0)
    model, images = Card(Counted().eval(), preprocess=Preprocess(SIZE)), torch.rand(9, 3, *SIZE)
    rows = embed_alike(model, images, 4)
    assert sizes == [4, 4, 4]
    assert torch.allclose(rows, model.embed(images), atol=1e-6)
    sizes.clear()
    trace(model, images, (), max_batch=4)
    assert sizes == [4, 4, 1]
