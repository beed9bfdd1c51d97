"""AVSL post hoc: heads, edges and reliabilities over a network that stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from avsl_cases import LEVELS, Pyramid
from PIL import Image
from torch import Tensor

from simexplain import as_similarity_model, attribute, fit
from simexplain.data.folders import Batches, Record, pictures_in
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ImageError, ModelError
from simexplain.fitting.posthoc import (
    FeaturePasses,
    certainty_scales,
    pca_head,
    slopes_and_offsets,
    too_few,
    trained_head,
)
from simexplain.graph.inference import overlap
from simexplain.models.avsl import AVSL
from simexplain.models.base import SimilarityModel

QUICK = {"nodes": 12, "epochs": 20, "reliability_batches": 10, "levels": LEVELS}
CLASSES, EACH = 6, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stripes of six directions and widths in random colours and phases."""
    root = tmp_path_factory.mktemp("stripes")
    random = np.random.default_rng(0)
    y, x = np.mgrid[:40, :40]
    for label in range(CLASSES):
        (root / f"class{label}").mkdir()
        for number in range(EACH):
            angle, width = np.pi * (label % 3) / 3, 4 + 6 * (label // 3)
            phase = random.uniform(0, 2 * np.pi)
            wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / width + phase)
            colour = random.uniform(0.2, 1, 3)
            pixels = (127 + 120 * wave[..., None] * colour).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{number}.png")
    return root


@pytest.fixture
def base() -> SimilarityModel:
    torch.manual_seed(0)
    network = Pyramid().eval()
    return as_similarity_model(network, preprocess=Preprocess(size=(32, 32)))


def tensors(folder: Path, base: SimilarityModel) -> tuple[Tensor, Tensor]:
    records = pictures_in(folder, labelled=True)
    images = torch.cat([images for _, images in Batches(records, base.preprocess)])
    return images, torch.arange(CLASSES).repeat_interleave(EACH)


def recall(distance: Tensor, labels: Tensor) -> float:
    nearest = distance.clone().fill_diagonal_(torch.inf).argmin(dim=1)
    return float((labels[nearest] == labels).float().mean())


def overlap_of_classes(distance: Tensor, labels: Tensor) -> float:
    """Mean distance within classes over that between them."""
    same = labels[:, None] == labels[None]
    within = distance[same & ~torch.eye(len(labels), dtype=torch.bool)]
    return float(within.mean() / distance[~same].mean())


def test_labelled_heads_find_the_classes_better_than_the_network(
    folder: Path, base: SimilarityModel
) -> None:
    model = fit(base, folder, **QUICK)
    images, labels = tensors(folder, base)
    with torch.no_grad():
        plain, rows = base.embed(images), model.embed(images)
        own = overlap_of_classes(base.distance(plain, plain).square(), labels)
        assert overlap_of_classes(model.distance(rows, rows), labels) < 0.5 * own
        assert recall(model.distance(rows, rows), labels) == 1
    assert model.origin == "labelled"
    assert model.report == {
        "images": 30,
        "seed": 0,
        "classes": 6,
        "epochs": 20,
        "steps": 10,
    }
    assert not model.training


def test_alpha_and_beta_were_trained_and_certainties_matter(
    folder: Path, base: SimilarityModel
) -> None:
    model = fit(base, folder, **QUICK)
    images, _ = tensors(folder, base)
    with torch.no_grad():
        rows = model.embed(images)
        result = model.pairs(rows[:15], rows[15:])
    for sure, beta in zip(result.reliabilities[1:], model.betas, strict=True):
        assert sure.std() > 0.05
        assert beta.std() > 0
    assert all((alpha >= 0).all() for alpha in model.alphas)  # reliable means focused


def test_edges_are_the_mean_over_all_images(folder: Path, base: SimilarityModel) -> None:
    model = fit(base, folder, batch_size=7, **QUICK)
    images, _ = tensors(folder, base)
    with torch.no_grad():
        cams = model.cams(model.feature_maps(images))
        for edges, low, high in zip(model.edges, cams, cams[1:], strict=False):
            torch.testing.assert_close(edges, overlap(low, high), rtol=1e-4, atol=1e-5)


def test_unlabelled_heads_are_the_principal_components(folder: Path, base: SimilarityModel) -> None:
    model = fit(base, folder, labelled=False, **{**QUICK, "nodes": 100})
    images, _ = tensors(folder, base)
    assert model.origin == "unlabelled"
    assert model.options.bias
    assert model.widths == (16, 24, 29)  # as many as there are channels, or images less one
    assert "classes" not in model.report
    with torch.no_grad():
        maps = model.feature_maps(images)
        vectors = maps[0].mean(dim=(2, 3)).double()
        _, _, directions = torch.linalg.svd(vectors - vectors.mean(dim=0), full_matrices=False)
        weight = model.weights[0][0].double()
        # Directions of nearly no variance are rounding; the strong ones agree up to sign.
        agreement = (weight[:4] * directions[:4]).sum(dim=1).abs()
        torch.testing.assert_close(agreement, torch.ones_like(agreement), atol=1e-4, rtol=0)
        rows = model.embed(images)
        sure = model.pairs(rows[:15], rows[15:]).reliabilities[1]
    assert 0.8 < float(sure.mean()) < 0.95


@pytest.mark.parametrize("labelled", [True, False])
def test_heads_of_more_nodes_than_pictures_carry_a_warning(
    folder: Path, base: SimilarityModel, labelled: bool
) -> None:
    """In the model, in its file and in every distance that it takes apart."""
    model = fit(base, folder, labelled=labelled, **{**QUICK, "nodes": 31})
    (record,) = model.report["warnings"]
    assert "30 pictures are fewer than the 31 nodes" in record
    images, _ = tensors(folder, base)
    assert record in attribute(model, images[:1], images[1:2]).warnings
    enough = fit(base, folder, labelled=labelled, **{**QUICK, "nodes": 30})
    assert "warnings" not in enough.report


def test_two_pictures_a_class_are_too_few_to_choose_a_head_by() -> None:
    assert too_few(12, 4, 12) == ()
    assert "fewer than 3 a class" in too_few(11, 4, 8)[0]
    assert len(too_few(11, 4, 512)) == 2
    assert too_few(11, 0, 11) == ()


@pytest.mark.parametrize("labelled", [True, False])
def test_fitting_twice_gives_the_same_and_touches_nothing(
    folder: Path, base: SimilarityModel, labelled: bool
) -> None:
    base.network.train()
    state = {key: value.clone() for key, value in base.network.state_dict().items()}
    before = torch.get_rng_state()
    one = fit(base, folder, labelled=labelled, **QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    other = fit(base, folder, labelled=labelled, max_cache=0, **QUICK)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], msg=key)
    assert all(torch.equal(value, state[key]) for key, value in base.network.state_dict().items())
    assert all(parameter.grad is None for parameter in base.network.parameters())


def test_fitting_leaves_modes_alone(folder: Path, base: SimilarityModel) -> None:
    base.network.train()
    base.network.stage3[1].eval()
    modes = [module.training for module in base.network.modules()]
    made = FeaturePasses(
        base,
        Batches(pictures_in(folder, labelled=True), base.preprocess),
        LEVELS,
        budget=0,
        progress=lambda *_: None,
    )
    assert len(list(made("once"))) == 1
    assert [module.training for module in base.network.modules()] == modes
    model = fit(base, folder, labelled=False, **QUICK)
    assert [module.training for module in base.network.modules()] == modes
    assert not model.training


def test_one_class_of_several_pictures_is_told_from_single_ones(
    folder: Path, base: SimilarityModel
) -> None:
    records = pictures_in(folder, labelled=True)
    chosen = [*records[:3], records[5], records[10]]
    model = fit(base, chosen, **QUICK)
    assert all(alpha.std() > 0 for alpha in model.alphas)


def test_the_cache_spares_the_second_pass(folder: Path, base: SimilarityModel) -> None:
    runs = []
    base.network.stage1.forward = _counting(base.network.stage1.forward, runs)
    batches = Batches(pictures_in(folder, labelled=True), base.preprocess, 8)
    lines: list[tuple[str, int, int]] = []
    one_batch = 8 * (16 * 16 * 16 + 24 * 8 * 8 + 32 * 4 * 4) * 4
    for budget, expected in ((1 << 30, 4), (0, 8), (2 * one_batch, 6)):
        runs.clear()
        passes = FeaturePasses(
            base, batches, LEVELS, budget=budget, progress=lambda *record: lines.append(record)
        )
        first, second = ([p for p, _ in passes("reading")] for _ in range(2))
        assert first == second
        assert len(runs) == expected
    assert lines[-1] == ("reading", 30, 30)


def _counting(forward, runs):
    def counted(*args):
        runs.append(1)
        return forward(*args)

    return counted


def test_broken_pictures_are_skipped_and_listed(base: SimilarityModel, tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8), (90 * number, 40, 80)).save(tmp_path / label / f"{number}.png")
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    model = fit(base, tmp_path, **QUICK)
    assert model.report["skipped"] == [str(tmp_path / "a" / "1.png")]
    assert model.report["images"] == 5


def test_too_little_is_refused(base: SimilarityModel, tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / label / "0.png")
    with pytest.raises(ImageError, match="one of them with two pictures"):
        fit(base, tmp_path, **QUICK)
    with pytest.raises(ImageError, match="at least two pictures"):
        fit(base, [Record(tmp_path / "a" / "0.png")], labelled=False, **QUICK)
    with pytest.raises(ImageError, match="at least two classes"):
        fit(base, [Record(tmp_path / label / "0.png") for label in "ab"], **QUICK)
    with pytest.raises(ModelError, match="fit has the options"):
        fit(base, tmp_path, lr=3)
    with pytest.raises(ModelError, match="nodes of at least 1"):
        fit(base, tmp_path, nodes=0)


def test_fitting_again_starts_from_the_plain_network(folder: Path, base: SimilarityModel) -> None:
    once = fit(base, folder, labelled=False, **QUICK)
    twice = fit(once, folder, labelled=False, **QUICK)
    assert isinstance(twice, AVSL)
    assert twice.base is base


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_presets_fit(folder: Path, base: SimilarityModel, preset: str) -> None:
    model = fit(base, folder, preset=preset, **QUICK)
    images, labels = tensors(folder, base)
    with torch.no_grad():
        rows = model.embed(images)
        assert recall(model.distance(rows, rows), labels) > 0.5


def test_pca_is_centred_and_of_full_rank_only() -> None:
    vectors = torch.randn(20, 3) @ torch.randn(3, 9) + 4
    head = pca_head(vectors, 8)
    assert head.weight.shape == (3, 9)
    projected = vectors @ head.weight.T + head.bias
    assert projected.mean(dim=0).abs().max() < 1e-4
    covariance = torch.cov(projected.T)
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 1e-4
    assert (covariance.diagonal().diff() <= 0).all()


def test_heads_wider_than_their_input_and_without_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(5)
    vectors = torch.randn(4, 6, generator=generator)[labels]
    vectors = vectors + 0.1 * torch.randn(20, 6, generator=generator)
    head = trained_head(vectors, labels, 10, bias=False, epochs=20, generator=generator)
    assert head.weight.shape == (10, 6)
    assert head.bias is None
    assert not head.weight.requires_grad
    rows = torch.nn.functional.normalize(vectors @ head.weight.T, dim=1)
    assert recall(torch.cdist(rows, rows), labels) == 1


def test_standardised_reliability_is_equation_6() -> None:
    from avsl_cases import random_rows

    rows = random_rows(40, (3, 4), 1)
    (scale,) = certainty_scales(rows, torch.Generator().manual_seed(0))
    sure = rows.certainties[1]
    eta = (sure[:, None] * sure[None]).flatten(0, 1)
    assert scale.mean == pytest.approx(float(eta.mean()), rel=0.1)
    slopes, offsets = slopes_and_offsets([scale], [torch.full((4,), 2.0)], [torch.full((4,), 0.5)])
    z = (eta[:5] - scale.mean) / scale.deviation
    torch.testing.assert_close(slopes[0] * eta[:5] + offsets[0], 2 * z + 0.5)


@pytest.mark.parametrize("labelled", [False, True])
def test_features_that_are_not_finite_are_refused(
    folder: Path, base: SimilarityModel, labelled: bool
) -> None:
    with torch.no_grad():
        next(iter(base.network.parameters())).view(-1)[0] = torch.nan
    with pytest.raises(ModelError, match=r"finite features of layer .* but those of .*\.png' are"):
        fit(base, folder, labelled=labelled, **QUICK)
