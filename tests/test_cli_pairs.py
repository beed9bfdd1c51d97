"""Models of two images on the command line: files that score pairs, and two towers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import Run
from pictures import noise
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import (
    Comparison,
    PairExplanation,
    Preprocess,
    as_pair_model,
    explain,
    load_model,
    load_pair_model,
)
from simexplain.data.images import read_picture
from simexplain.errors import ModelError, TwoImagesError


class Score(nn.Module):
    """Two towers of their own and the sum of the products of their pooled maps."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 3))
        self.two = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 3))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.one(first).mean((2, 3)), self.two(second).mean((2, 3))
        return (a * b).sum(dim=1)


class Both(Score):
    """Gives embeddings of both in place of a score."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.stack((self.one(first).mean((2, 3)), self.two(second).mean((2, 3))))


class Words(Score):
    """The second input is not an image."""

    def forward(self, first: Tensor, tokens: Tensor) -> Tensor:
        return self.one(first).mean((1, 2, 3)) + F.embedding(tokens, torch.ones(9, 1))[:, 0, 0]


@pytest.fixture
def scorer() -> Score:
    torch.manual_seed(0)
    return Score().eval()


def saved(network: nn.Module, path: Path, *, exported: bool) -> Path:
    if not exported:
        torch.save(network, path)
        return path
    batch = torch.export.Dim("batch", min=1, max=64)
    images = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 48, 48)
    program = torch.export.export(network, images, dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("exported", [False, True])
def test_a_file_that_scores_two_images(
    scorer: Score, exported: bool, run: Callable[..., Run], here: Path
) -> None:
    path = saved(scorer, here / ("m.pt2" if exported else "m.pt"), exported=exported)
    sizes = () if exported else ("--trust-pickle", "--size", "32", "--second-size", "48")
    plain = ("--fit", "squash", "--mean", "0.5", "--std", "0.25")
    done = run("explain", path, "a.png", "b.jpg", *sizes, *plain, "--out", "o", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    result = PairExplanation.load(here / "o")
    assert record["score"] == pytest.approx(result.score.tolist())
    prepare = Preprocess(size=(32, 32), fit="squash", mean=(0.5,) * 3, std=(0.25,) * 3,
                         crop_fraction=1.0)  # fmt: skip
    other = Preprocess(size=(48, 48), fit="squash", mean=(0.5,) * 3, std=(0.25,) * 3,
                       crop_fraction=1.0)  # fmt: skip
    images = [
        one(read_picture(here / name).image)[0][None]
        for one, name in ((prepare, "a.png"), (other, "b.jpg"))
    ]
    torch.testing.assert_close(result.score, scorer(*images).detach(), rtol=1e-4, atol=1e-5)
    for side, layer in enumerate((scorer.one[2], scorer.two[2])):
        kept: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
        score = scorer(*images)
        hook.remove()
        (slope,) = torch.autograd.grad(score.sum(), kept[0])
        wanted = (slope.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu().detach()
        torch.testing.assert_close(result.maps[side][:, 0], wanted, rtol=1e-3, atol=1e-6)
    text = run("explain", path, "a.png", "b.jpg", *sizes, *plain, "--out", "p")
    assert text.code == 0, text.err
    assert "learned score" in text.out
    assert "a.png" in text.out


def test_two_towers(run: Callable[..., Run], here: Path) -> None:
    noise(30, 40, seed=7).save("c.png")
    done = run(
        "explain", "timm:test_resnet.r160_in1k", "a.png", "b.jpg", "c.png", "--arch", "triplet",
        "--second-model", "timm:test_resnet.r160_in1k", "--untrained", "--size", "64",
        "--second-size", "96", "--out", "o", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    near, far = record["first"]["distances"]
    towers = ("--second-model", "timm:test_resnet.r160_in1k", "--untrained", "--size", "64")
    text = run("explain", "timm:test_resnet.r160_in1k", "a.png", "b.jpg", "c.png", *towers,
               "--second-size", "96", "--out", "t").out  # fmt: skip
    assert f": {'holds' if near < far else 'fails'} by {abs(far - near):.3f}" in text
    pair = run("explain", "timm:test_resnet.r160_in1k", "a.png", "b.jpg", *towers,
               "--second-size", "96", "--out", "u").out  # fmt: skip
    assert f"distance {near:.3f}\n" in pair
    assert "no condition" not in pair
    assert record["score"] is None
    assert record["first"]["preprocess"]["size"] == [64, 64]
    assert record["second"]["preprocess"]["size"] == [96, 96]
    assert [image["role"] for image in record["second"]["images"]] == ["positive", "negative"]


def test_in_python(scorer: Score, tmp_path: Path) -> None:
    path = saved(scorer, tmp_path / "m.pt2", exported=True)
    pair = load_pair_model(path)
    images = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 48, 48)
    result = explain(pair, Comparison.pair(*images))
    wanted = explain(as_pair_model(scorer), Comparison.pair(*images))
    torch.testing.assert_close(result.score, wanted.score)
    for one, other in zip(result.maps, wanted.maps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    with pytest.raises(TwoImagesError, match="pairs are explained by simexplain explain"):
        load_model(path)
    with pytest.raises(ModelError, match="second-model"):
        load_pair_model("timm:test_resnet.r160_in1k")


def test_what_cannot_be_is_one_sentence(
    scorer: Score, fails: Callable[..., str], here: Path
) -> None:
    path = saved(scorer, here / "m.pt2", exported=True)
    saved(Both(), here / "both.pt", exported=False)
    saved(Words(), here / "words.pt", exported=False)
    two = ("a.png", "b.jpg", "--arch", "siamese")
    assert "pairs of images" in fails("explain", path, "a.png", "--text", "a bag", code=2)
    assert "no --upscale" in fails("explain", path, *two, "--upscale", "2")
    assert "no --sweep" in fails("explain", path, *two, "--sweep")
    assert "explain them pair by pair" in fails(
        "explain", path, "a.png", "b.jpg", "a.png", "--arch", "triplet"
    )
    assert "does not apply" in fails("explain", path, *two, "--method", "decomposition")
    assert "one score for each" in fails("explain", "both.pt", *two, "--trust-pickle")
    assert "does not run on two images" in fails("explain", "words.pt", *two, "--trust-pickle")
    assert "as_pair_model" in fails("index", "both.pt", ".", "--out", "x", "--trust-pickle")
    timm = ("timm:test_resnet.r160_in1k", "--untrained")
    assert "--second-size is for" in fails("explain", *timm, *two, "--second-size", "64", code=2)
    assert "--arch" in fails("explain", *timm, *["a.png"] * 4)
