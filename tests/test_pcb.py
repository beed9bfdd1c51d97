"""The part-based baseline: its stripes by hand, its maps, its files, its loss and its recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from cli_runs import Run
from conftest import plain_maps, refusal, varied
from person_cases import market, put_person
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, SimilarityModel, explain, load_model, match, save_model
from simexplain.errors import ModelError
from simexplain.losses.metric_losses import PartIdentityLoss
from simexplain.methods.decomposition import position_parts
from simexplain.methods.similarity_attention import similarity_weights
from simexplain.models.accelerating import accelerated
from simexplain.models.backbones import build_backbone
from simexplain.models.embedder import as_similarity_model
from simexplain.models.pcb import PARTS, PCB

NETWORK = "pcb:timm:test_resnet"
WIDTH = 4
TALL = (192, 64)


def built(size: tuple[int, int] = TALL, name: str = NETWORK) -> SimilarityModel:
    """Six stripes of four numbers, with statistics and biases that are not trivial."""
    torch.manual_seed(3)
    result = build_backbone(name, pretrained=False, outputs=PARTS * WIDTH, size=size)
    norm = result.network.reduction.norm
    nn.init.normal_(norm.bias, std=0.5)
    norm.running_mean.normal_(0, 0.1)
    norm.running_var.uniform_(0.5, 1.5)
    model = as_similarity_model(
        varied(result.network), preprocess=result.preprocess, name=result.name
    )
    model.backbone = result.name
    return model


def pictures(count: int, size: tuple[int, int] = TALL) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "name", ["timm:test_resnet", "timm:tf_efficientnet_lite0", "torchvision:resnet18"]
)
def test_the_last_stage_loses_its_stride_and_nothing_else(name: str) -> None:
    model = built(name=f"pcb:{name}")
    plain = load_model(name, weights="random", size=TALL)
    (layer,) = [layer for layer in model.layers if layer.default]
    (before,) = [layer for layer in plain.layers if layer.default]
    assert layer.shape == (before.shape[0], 2 * before.shape[1], 2 * before.shape[2])
    assert layer.name == f"base.{before.name}"
    assert layer.stride == (16, 16)
    assert model.stages[-1] == layer.name
    assert len(model.stages) == 4
    # A stride is no weight: the zoo's tensors fit as they are.
    own = {k.removeprefix("base."): v.shape for k, v in model.network.state_dict().items()}
    theirs = plain.network.state_dict()
    assert all(own[key] == value.shape for key, value in theirs.items() if key in own)
    heads = {key for key in theirs if key not in own}
    assert heads <= {"fc.weight", "fc.bias"}


def stripes_by_hand(network: PCB, images: Tensor) -> Tensor:
    """Vectors ``(M,P,e)``: the mean of each stripe's rows, linear layer, batch norm."""
    with torch.no_grad():
        maps = network.base(images)
        head, norm = network.reduction, network.reduction.norm
        rows = maps.shape[2] // network.parts
        result = []
        for image in maps:
            own = []
            for part in range(network.parts):
                g = image[:, part * rows : (part + 1) * rows].mean(dim=(1, 2))
                h = head.weight @ g
                h = (h - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
                own.append(h * norm.weight + norm.bias)
            result.append(torch.stack(own))
    return torch.stack(result)


def test_the_embedding_is_that_of_all_stripes_side_by_side() -> None:
    model = built()
    images = pictures(3)
    by_hand = stripes_by_hand(model.network, images)
    with torch.no_grad():
        torch.testing.assert_close(model.vectors(images), by_hand.flatten(1))
        wanted = F.normalize(by_hand.flatten(1), dim=1)
        torch.testing.assert_close(model.embed(images), wanted)


def test_without_a_width_the_stripes_are_what_was_pooled() -> None:
    model = load_model(NETWORK, weights="random", size=TALL)
    images = pictures(2)
    with torch.no_grad():
        maps = model.network.base(images)
        pooled = torch.stack([part.mean(dim=(2, 3)) for part in maps.chunk(PARTS, dim=2)], dim=1)
        torch.testing.assert_close(model.vectors(images), pooled.flatten(1))


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam"])
def test_maps_are_those_of_plain_autograd_through_the_stripes(method: str) -> None:
    model = built()
    images = Comparison.triplet(*(image[None] for image in pictures(3)))
    result = explain(model, images, cam=method)
    rows = model.embed(images.stacked()[0]).detach()
    weights = similarity_weights(Comparison.triplet(*(row[None] for row in rows)))
    assert weights.shape == (1, PARTS * WIDTH)
    torch.testing.assert_close(result.weights, weights)
    layer = model.network.base.layer4
    for index, image in enumerate(images.stacked()[0]):
        plain, _, gradient = plain_maps(model.network, layer, image[None], weights[0])
        if method == "hires_cam":
            with torch.no_grad():
                plain = (gradient * model.network.base(image[None])[0]).sum(dim=0).relu()
        torch.testing.assert_close(result.maps[0, index], plain, rtol=1e-4, atol=1e-7)


def test_only_hirescam_tells_one_stripe_from_another() -> None:
    """Grad-CAM gives all positions the mean gradient of all stripes; see docs/reid.md."""
    model = built()
    image = pictures(1)
    weight = torch.zeros(PARTS * WIDTH)
    weight[2 * WIDTH : 3 * WIDTH] = 1.0  # the third stripe alone
    layer = model.network.base.layer4
    mixed, row, gradient = plain_maps(model.network, layer, image, weight)
    with torch.no_grad():
        exact = gradient * model.network.base(image)[0]
    third = slice(4, 6)
    assert mixed[:4].max() > 0.1 * mixed.max()
    # The length of the whole embedding lets the other stripes in, so the raw vector is asked.
    raw = torch.autograd.functional.vjp(
        lambda maps: model.network.reduction(
            F.adaptive_avg_pool2d(maps, (PARTS, 1)).flatten(2).transpose(1, 2).flatten(0, 1)
        ).flatten(),
        model.network.base(image).detach(),
        weight,
    )[1][0]
    outside = torch.ones(12, dtype=torch.bool)
    outside[third] = False
    assert raw[:, outside].abs().max() == 0
    assert raw[:, third].abs().max() > 0
    assert exact[:, third].abs().sum() > exact[:, outside].abs().sum() / 5
    assert row.shape == (PARTS * WIDTH,)


def test_what_each_position_adds_is_exact_and_stays_in_its_stripe() -> None:
    model = built()
    images = pictures(2)
    result = position_parts(model, images, model.default_layer)
    assert result.steps == 0
    assert float(result.residual.max()) < 1e-5
    parts = result.parts.unflatten(1, (PARTS, WIDTH))  # (M,P,e,h,w)
    for part in range(PARTS):
        rows = torch.zeros(12, dtype=torch.bool)
        rows[2 * part : 2 * part + 2] = True
        assert parts[:, part][:, :, ~rows].abs().max() == 0
        assert parts[:, part][:, :, rows].abs().max() > 0
    matched = match(model, images[:1], images[1:])
    assert float(matched.residual.max()) < 1e-5


def test_a_file_has_all_of_it(tmp_path: Path) -> None:
    model, images = built(), pictures(2)
    save_model(model, tmp_path / "model.pt")
    again = load_model(tmp_path / "model.pt")
    torch.testing.assert_close(again.embed(images), model.embed(images), rtol=0, atol=0)
    assert again.preprocess.size == TALL
    assert (again.preprocess.fit, again.preprocess.crop_fraction) == ("squash", 1.0)
    assert again.backbone == NETWORK
    bare = tmp_path / "bare.pth"
    torch.save({f"module.{k}": v for k, v in model.network.state_dict().items()}, bare)
    whole = load_model(bare, backbone=NETWORK, keep_head=True, size=TALL)
    torch.testing.assert_close(whole.embed(images), model.embed(images))
    pooled = load_model(bare, backbone=NETWORK, size=TALL)
    assert pooled.embed(images).shape == (2, PARTS * 96)
    assert "--keep-head" in pooled.preprocess.notes[0]


def test_persons_are_squashed_to_384_by_128() -> None:
    model = load_model(NETWORK, weights="random")
    assert model.preprocess.size == (384, 128)
    assert model.preprocess.geometry((128, 64)).box == (0, 0, 64, 128)


def test_the_callers_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    load_model(NETWORK, weights="random", size=TALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_faster_twin_gives_the_same() -> None:
    model, images = built(), pictures(2)
    torch.testing.assert_close(
        accelerated(model).embed(images), model.embed(images), atol=1e-5, rtol=1e-4
    )


def test_what_is_refused() -> None:
    assert "it does not take other sizes" in refusal(
        "pcb:timm:vit_tiny_patch16_224", weights="random"
    )
    assert "does not work with stride 1" in refusal("pcb:timm:convnext_atto", weights="random")
    assert "pooling cannot be taken off" in refusal("pcb:torchvision:vgg11", weights="random")
    assert "got 'pcb:pcb:timm:resnet18'" in refusal("pcb:pcb:timm:resnet18", weights="random")
    assert "got 'pcb:'" in refusal("pcb:", weights="random")
    with pytest.raises(ModelError, match="share evenly, got 100"):
        build_backbone(NETWORK, pretrained=False, outputs=100)
    low = load_model(NETWORK, weights="random", size=(64, 32))
    with pytest.raises(ModelError, match="at least 6 rows, one for each stripe, got 4 of 64x32"):
        low.embed(pictures(1, (64, 32)))


def test_a_network_with_its_stride_in_a_pooling_works() -> None:
    """The shortcut of ResNet-D halves by pooling, which stride 1 turns into nothing."""
    model = built(name="pcb:timm:resnet10t")
    (layer,) = [layer for layer in model.layers if layer.default]
    assert layer.stride == (16, 16)
    names = [n for n, m in model.network.base.layer4.named_modules() if isinstance(m, nn.Identity)]
    assert any("downsample" in name for name in names)
    kept = timm.create_model("resnet10t", num_classes=0)
    assert isinstance(kept.layer4[0].downsample[0], nn.AvgPool2d)


# The loss


def test_the_identity_loss_asks_every_part_alone() -> None:
    loss = PartIdentityLoss(5, 12, parts=3, scale=2.0)
    nn.init.normal_(loss.weight)
    nn.init.normal_(loss.bias)
    rows = F.normalize(torch.randn(7, 12), dim=1).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 0])
    by_hand = torch.zeros(())
    for row, label in zip(rows, labels, strict=True):
        for part in range(3):
            h = 2.0 * 12**0.5 * row[4 * part : 4 * part + 4]
            scores = loss.weight[part] @ h + loss.bias[part]
            by_hand = by_hand - scores.log_softmax(dim=0)[label]
    torch.testing.assert_close(loss(rows, labels), by_hand / 7)
    torch.testing.assert_close(loss(rows, labels, None), loss(rows, labels))
    # A part's score knows nothing of the others.
    (slope,) = torch.autograd.grad(loss.scores(rows)[:, 1].sum(), rows)
    assert slope[:, :4].abs().max() == slope[:, 8:].abs().max() == 0
    assert slope[:, 4:8].abs().max() > 0


def test_the_identity_loss_refuses_what_does_not_fit() -> None:
    for given in ((1, 12, 3), (5, 12, 5), (5, 12, 0)):
        with pytest.raises(ModelError, match="at least two classes, parts"):
            PartIdentityLoss(given[0], given[1], parts=given[2])
    with pytest.raises(ModelError, match="labels from 0 to 4 for 5 persons, got 0 to 5"):
        PartIdentityLoss(5, 12, parts=3)(torch.zeros(2, 12), torch.tensor([0, 5]))


# The recipe, from the command line


def test_failures_of_stripes_are_explained_by_maps_that_keep_them_apart(
    run: Callable[..., Run], here: Path
) -> None:
    data = market(here / "data")
    gallery = [p for p in (data / "bounding_box_test").iterdir() if not p.name.startswith("-1")]
    for path in (*(data / "query").iterdir(), *gallery):  # all alike: ties go against the model
        path.write_bytes(gallery[0].read_bytes())
    words = ("--untrained", "--size", "96x32")
    result = run("evaluate", "reid", NETWORK, data, *words)
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if "simexplain explain" in line]
    assert line.endswith("--cam hires_cam")
    assert run(*line.split()[1:], "--out", "why").code == 0
    plain = run("evaluate", "reid", NETWORK.removeprefix("pcb:"), data, *words)
    assert "simexplain explain" in plain.out
    assert "--cam" not in plain.out


def test_the_recipe_trains_and_its_model_is_explained_and_evaluated(
    run: Callable[..., Run], here: Path
) -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("pytorch_metric_learning")
    data = market(here / "data", train=6, test=3)
    small = (
        "--backbone", NETWORK, "--untrained", "--size", "96x32", "--embedding", "24",
        "--classes-per-batch", "3", "--images-per-class", "2", "--epochs", "1",
        "--batches-per-epoch", "3", "--attention-triplets", "1",
        "--accelerator", "cpu",
    )  # fmt: skip
    done = run("train", data, "--recipe", "sam-reid-market1501", "--out", "run", *small, "--json")
    assert done.code == 0, done.err
    options = json.loads((here / "run" / "options.json").read_text(encoding="utf-8"))
    record = options.get("options", options)
    assert (record["loss"], record["mining"], record["gamma"]) == ("identity", "triplet", 0.2)
    header, *rows = (here / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    last = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    # Nothing is known yet: six stripes guess among six persons.
    assert float(last["loss/metric"]) == pytest.approx(6 * math.log(6), rel=0.02)
    assert 0 <= float(last["loss/mining"]) < 2
    model = here / "run" / "model.pt"
    result = run("evaluate", "reid", model, data, "--json")
    assert result.code == 0, result.err
    reached = json.loads(result.out)
    assert reached["queries"] == 6
    # Training asks the same question by groups; the best model is the one in the file.
    trained = json.loads((here / "run" / "results.json").read_text(encoding="utf-8"))
    assert reached["rank"]["1"] == pytest.approx(trained["reached"]["recall@1"])
    query = next((data / "query").glob("0007_c1*.jpg"))
    same = next((data / "bounding_box_test").glob("0007_c2*.jpg"))
    other = put_person(here / "more", "0008_c2s1_000001_00.jpg")
    explained = run("explain", model, query, same, other, "--arch", "triplet", "--json")
    assert explained.code == 0, explained.err
    record = json.loads(explained.out)
    assert record["layer"] == "base.layer4"
    assert record["images"][0]["geometry"]["original"] == [128, 64]
    assert record["images"][0]["geometry"]["size"] == [96, 32]
