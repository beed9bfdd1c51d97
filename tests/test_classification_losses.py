"""The Grad-CAM baselines of Table 1 against loops and plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import TinyNet
from loss_cases import LABELS, gradients, pictures, smooth_model
from torch import Tensor
from torch.nn import functional as F

from simexplain import as_similarity_model
from simexplain.errors import ModelError
from simexplain.losses import mining
from simexplain.losses.classification import (
    ClassHead,
    ClassificationLoss,
    ClassificationMiningLoss,
)
from simexplain.losses.constraint import AttentionMaskLoss
from simexplain.losses.metric_losses import QuadrupletLoss
from simexplain.losses.mining import SimilarityMiningLoss, Tuples, disjoint_tuples
from simexplain.losses.objective import MetricLoss, Objective, run_batch

TAILS = pytest.mark.parametrize("curved", [False, True], ids=["linear tail", "curved tail"])


@pytest.fixture
def head() -> ClassHead:
    return ClassHead(3, 5, scale=4.0).double()


def test_bce_is_the_mean_over_images_and_classes(head: ClassHead) -> None:
    model, images = smooth_model(), pictures(12)
    result = ClassificationLoss(head)(run_batch(model, images, LABELS, ()))
    rows = F.normalize(model.network(images), dim=1).detach()
    weight, bias = head.linear.weight.detach(), head.linear.bias.detach()
    total = 0.0
    for row, label in zip(rows, LABELS, strict=True):
        for c in range(3):
            score = 4.0 * float(weight[c] @ row) + float(bias[c])
            right = 1 / (1 + math.exp(-score))
            total -= math.log(right if c == label else 1 - right)
    assert result.item() == pytest.approx(total / 36)


def test_every_class_starts_as_likely_as_the_others() -> None:
    head = ClassHead(40, 5)
    assert torch.allclose(head(torch.zeros(2, 5)).sigmoid(), torch.full((2, 40), 1 / 40))


def test_bce_learns_to_classify() -> None:
    head, model = ClassHead(3, 5).double(), smooth_model()
    images = pictures(12)
    objective = Objective({"bce": (1.0, ClassificationLoss(head))})
    optimiser = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=0.02)
    first = objective(model, images, LABELS).total.item()
    for _ in range(150):
        optimiser.zero_grad()
        objective(model, images, LABELS).total.backward()
        optimiser.step()
    assert objective(model, images, LABELS).total.item() < 0.1 * first
    assert torch.equal(head(model.embed(images)).argmax(dim=1), LABELS)


def plain_class_map(model, head: ClassHead, image: Tensor, label: int) -> Tensor:
    """Grad-CAM of the score of one class for one image alone, differentiable."""
    network = model.network
    grid = network.body(image[None])
    row = F.normalize(network.end(network.head(grid.mean(dim=(2, 3)))), dim=1)
    weight, bias = head.linear.weight.detach(), head.linear.bias.detach()
    score = head.scale * (row @ weight[label])[0] + bias[label]
    slope = torch.autograd.grad(score, grid, create_graph=True)[0].mean(dim=(2, 3))[0]
    return sum(slope[c] * grid[0, c] for c in range(len(slope))).relu()


def naive_mining(model, head: ClassHead, images: Tensor, places: Tensor, positives: int) -> Tensor:
    """Eq. 3 or 4 on images masked by their own class's map, image by image."""
    total = torch.zeros((), dtype=torch.float64)
    for places_of_one in places.tolist():
        masked = []
        for index in places_of_one:
            heat = plain_class_map(model, head, images[index], int(LABELS[index]))
            up = F.interpolate(heat[None, None], images.shape[2:], mode="bilinear")[0, 0]
            hidden = torch.sigmoid(10 * (up / up.max() - 0.5))
            masked.append(images[index] * (1 - hidden))
        rows = F.normalize(model.network(torch.stack(masked)), dim=1)
        near = (rows[0] - rows[1]).norm()
        for negative in rows[1 + positives :]:
            total = total + (near - (rows[0] - negative).norm()).abs()
        if len(rows) == 1 + positives:
            total = total - near
    return total / len(places)


@TAILS
def test_maps_are_grad_cam_of_the_true_class(head: ClassHead, curved: bool, monkeypatch) -> None:
    model, images = smooth_model(curved=curved), pictures(12)
    seen: dict[str, Tensor] = {}

    def keep(masked: Tensor, maps: Tensor, **options: float) -> Tensor:
        seen.update(images=masked, maps=maps)
        return mining_mask(masked, maps, **options)

    mining_mask = mining.soft_mask
    monkeypatch.setattr(mining, "soft_mask", keep)
    term = ClassificationMiningLoss(head, layer="body")
    term(run_batch(model, images, LABELS, ("body",)))
    for image, result in zip(seen["images"], seen["maps"], strict=True):
        index = int((images == image).flatten(1).all(dim=1).nonzero())
        expected = plain_class_map(model, head, image, int(LABELS[index]))
        assert expected.max() > 0
        assert torch.allclose(result, expected, atol=1e-12)


@TAILS
@pytest.mark.parametrize("arch", ["siamese", "triplet", "quadruplet"])
def test_mining_is_that_of_a_loop_and_so_is_its_gradient(
    head: ClassHead, arch: str, curved: bool
) -> None:
    model, images = smooth_model(curved=curved), pictures(12)
    batch = run_batch(model, images, LABELS, ("body",))
    result = ClassificationMiningLoss(head, layer="body", arch=arch)(batch)
    generator = torch.Generator().manual_seed(0)
    tuples = disjoint_tuples(batch.embeddings, LABELS, arch, generator=generator)
    expected = naive_mining(model, head, images, tuples.places, tuples.positives)
    assert torch.allclose(result, expected, atol=1e-10)
    pairs = zip(gradients(result, model), gradients(expected, model), strict=True)
    for own, plain in pairs:
        assert torch.allclose(own, plain, atol=1e-9)


def test_gradients_reach_what_they_should(head: ClassHead) -> None:
    """L_bce trains head and network; L_bce-sm the network alone."""
    model = smooth_model()
    batch = run_batch(model, pictures(12), LABELS, ("body",))
    bce, sm = ClassificationLoss(head), ClassificationMiningLoss(head, layer="body")
    assert all(part is not None and part.any() for part in gradients(bce(batch), model, head))
    loss = sm(batch)
    assert all(part is not None and part.any() for part in gradients(loss, model))
    assert gradients(loss, head) == [None, None]


def test_both_terms_share_one_head(head: ClassHead) -> None:
    bce, sm = ClassificationLoss(head), ClassificationMiningLoss(head, arch="siamese")
    objective = Objective({"bce": (0.5, bce), "bce_sm": (0.1, sm)})
    assert len(list(objective.parameters())) == 2
    assert sm.head is bce.head


def test_another_class_gives_another_map(head: ClassHead) -> None:
    model, images = smooth_model(), pictures(12)
    layer, tuples = "body", Tuples(torch.arange(12).view(4, 3), 1)
    batch = run_batch(model, images, LABELS, (layer,))
    options = mining.MiningOptions(layer=layer)
    with torch.no_grad():
        right = mining.mined_along(batch, tuples, head.directions(LABELS), options)
        wrong = mining.mined_along(batch, tuples, head.directions(2 - LABELS), options)
    assert not torch.allclose(right, wrong, rtol=1e-3)


def test_everything_combines_in_one_objective() -> None:
    """With losses of another library; the total is the weighted sum and trains everything."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    model = as_similarity_model(TinyNet())
    model.train()
    images, masks = pictures(12, 24).float(), torch.ones(12, 24, 24)
    masks[:, :, :12] = 0
    masks[3] = torch.nan
    head = ClassHead(3, 10)
    terms = {
        "triplet": (1.0, MetricLoss(losses.TripletMarginLoss(0.2), miners.BatchHardMiner())),
        "quadruplet": (0.5, MetricLoss(QuadrupletLoss())),
        "contrastive": (0.5, MetricLoss(losses.ContrastiveLoss())),
        "mining": (0.05, SimilarityMiningLoss()),
        "bce": (0.2, ClassificationLoss(head)),
        "bce_sm": (0.05, ClassificationMiningLoss(head, arch="siamese")),
        "mask": (0.1, AttentionMaskLoss(arch="siamese")),
    }
    objective = Objective(terms)
    result = objective(model, images, LABELS, masks=masks, seed=3)
    expected = sum(weight * float(result.parts[name]) for name, (weight, _) in terms.items())
    assert result.total.item() == pytest.approx(expected, rel=1e-5)
    assert all(float(part) != 0 for part in result.parts.values())
    result.total.backward()
    for part in [*model.parameters(), *objective.parameters()]:
        assert part.grad is not None
        assert part.grad.isfinite().all()
    assert model.training


@pytest.mark.parametrize("labels", [LABELS - 1, LABELS + 1])
def test_labels_that_are_no_classes_are_refused(head: ClassHead, labels: Tensor) -> None:
    batch = run_batch(smooth_model(), pictures(12), labels, ("body",))
    for term in (ClassificationLoss(head), ClassificationMiningLoss(head, layer="body")):
        with pytest.raises(ModelError, match=r"from 0 to 2 .* number the training classes from 0"):
            term(batch)


def test_heads_that_do_not_fit_are_refused() -> None:
    batch = run_batch(smooth_model(), pictures(12), LABELS, ("body",))
    head = ClassHead(3, 7).double()
    for term in (ClassificationLoss(head), ClassificationMiningLoss(head, layer="body")):
        with pytest.raises(ModelError, match=r"embeddings of 7 dimensions .* got 5"):
            term(batch)
    for numbers in ((1, 4), (3, 0)):
        with pytest.raises(ModelError, match="at least two classes"):
            ClassHead(*numbers)


def test_half_precision_gives_nearly_the_same() -> None:
    """Maps in bfloat16 are summed in single precision."""
    model, head = as_similarity_model(smooth_model().network.float()), ClassHead(3, 5)
    objective = Objective(
        {
            "bce": (1.0, ClassificationLoss(head)),
            "bce_sm": (1.0, ClassificationMiningLoss(head, layer="body")),
            "mask": (1.0, AttentionMaskLoss(arch="siamese", layer="body")),
            "quadruplet": (1.0, MetricLoss(QuadrupletLoss())),
        }
    )
    images, masks = pictures(12).float(), pictures(12, seed=3)[:, 0].float().sigmoid()
    single = objective(model, images, LABELS, masks=masks)
    with torch.autocast("cpu", torch.bfloat16):
        half = objective(model, images, LABELS, masks=masks)
    half.total.backward()
    for name, part in half.parts.items():
        assert part.dtype == torch.float32
        assert part.item() == pytest.approx(single.parts[name].item(), abs=0.02)
