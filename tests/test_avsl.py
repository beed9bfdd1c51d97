"""AVSL as a model: embeddings, distances, training state, files, and no side effects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from avsl_cases import LEVELS, Pyramid, small_avsl
from conftest import SharedNet, refusal
from torch import Tensor, nn

from simexplain import Comparison, as_similarity_model, explain, load_model, save_model
from simexplain.errors import ModelError
from simexplain.models.accelerating import accelerated
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_options import ORIGINS, PRESETS, AVSLOptions
from simexplain.models.backbones import build_backbone
from simexplain.models.writing import check_savable
from simexplain.tracing import trace


@pytest.fixture
def batch() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand((6, 3, 32, 40), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_hold_unit_levels_and_certainties(preset: str, batch: Tensor) -> None:
    model = small_avsl(preset)
    rows = model.embed(batch)
    assert rows.shape == (6, 2 * 3 * 24)
    known = model.unpacked(rows)
    for unit, sure in zip(known.embeddings, known.certainties, strict=True):
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(6, dtype=torch.float64))
        assert (sure > 0).all()
    alone = torch.cat([model.embed(image[None]) for image in batch])
    torch.testing.assert_close(rows, alone, rtol=1e-10, atol=1e-12)


def test_distance_is_that_of_the_graph_and_symmetric(batch: Tensor) -> None:
    model = small_avsl()
    with torch.no_grad():
        rows = model.embed(batch)
        matrix = model.distance(rows, rows)
        for one in range(6):
            pairs = model.pairs(rows[one].expand_as(rows), rows)
            torch.testing.assert_close(matrix[one], pairs.distance, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(matrix, matrix.T)
    assert (matrix.diagonal() == 0).all()
    assert (matrix >= 0).all()


def test_presets_differ_in_every_named_option() -> None:
    paper, official = PRESETS["paper"].to_json(), PRESETS["official"].to_json()
    same = {name for name in paper if paper[name] == official[name]}
    assert same == {"k", "momentum", "eta", "inference"}


@pytest.mark.parametrize("option", ["pooling", "certainty", "scale", "ties", "epsilon", "orphans"])
def test_each_option_alone_changes_what_it_says(option: str, batch: Tensor) -> None:
    """On edges with ties and orphans; everything else held fixed."""
    result = []
    for source in ("paper", "official"):
        options = replace(PRESETS["paper"], **{option: getattr(PRESETS[source], option)})
        torch.manual_seed(0)
        model = small_avsl(options)
        for edges in model.edges:
            edges.copy_(edges.sign())
            edges[:, :3] = -1.0
        with torch.no_grad():
            result.append(model.distance(*[model.embed(batch)] * 2))
    if option == "epsilon":
        assert 0 < (result[0] - result[1]).abs().max() < 1e-6
    else:
        assert (result[0] - result[1]).abs().max() > 1e-6


def test_orphans_keep_their_own_value_or_lose_the_doubtful_share(batch: Tensor) -> None:
    for orphans in ("keep", "drop"):
        model = small_avsl(replace(PRESETS["paper"], orphans=orphans))
        model.edges[1].fill_(-1.0)
        with torch.no_grad():
            rows = model.embed(batch)
            pairs = model.pairs(rows[:1], rows[1:2])
        if orphans == "keep":
            torch.testing.assert_close(pairs.rectified[2], pairs.nodes[2])
            torch.testing.assert_close(pairs.distance, pairs.nodes[2].sum(dim=1))
        else:
            assert (pairs.reliabilities[2] < 1).all()
            expected = pairs.reliabilities[2] * pairs.nodes[2]
            torch.testing.assert_close(pairs.rectified[2], expected)


def test_training_updates_edges_by_momentum_and_nothing_else_does(batch: Tensor) -> None:
    model = small_avsl(learned=False)
    model(batch)
    model.train()
    model.embed(batch)
    trace(model, batch, ("stage3",))
    assert int(model.edge_updates) == 0
    model(batch)
    first = [edges.clone() for edges in model.edges]
    model(batch.flip(3))
    other = small_avsl(learned=False)
    other.load_state_dict(model.state_dict())
    other.edge_updates.zero_()
    other.train()
    other(batch.flip(3))
    for start, fresh, mixed in zip(first, other.edges, model.edges, strict=True):
        torch.testing.assert_close(mixed, 0.5 * start + 0.5 * fresh)
    assert int(model.edge_updates) == 2


def test_edges_survive_saving_and_resuming_mid_training(batch: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = small_avsl(learned=False).train()
    model(batch)
    torch.save(model.state_dict(), tmp_path / "half.pt")
    model(batch.flip(2))
    resumed = small_avsl(learned=False).train()
    resumed.load_state_dict(torch.load(tmp_path / "half.pt", weights_only=True))
    assert int(resumed.edge_updates) == 1
    resumed(batch.flip(2))
    for one, other in zip(model.edges, resumed.edges, strict=True):
        assert torch.equal(one, other)


def test_levels_train_the_heads_and_the_overall_distance_trains_reliability(batch: Tensor) -> None:
    model = small_avsl()
    rows = model.embed(batch)
    levels = model.level_distances(rows, rows)
    assert levels.shape == (3, 6, 6)
    levels.sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight, _ in model.weights)
    assert all(alpha.grad is None for alpha in model.alphas)
    still = rows.detach()
    assert not model.distance(still, still).requires_grad
    model.train()
    model.distance(still, still).sum().backward()
    assert all(part.grad.abs().sum() > 0 for part in (*model.alphas, *model.betas))


def test_neighbours_are_those_of_the_distance(batch: Tensor) -> None:
    model = small_avsl()
    with torch.no_grad():
        rows = model.embed(batch)
        expected, places = model.distance(rows, rows).topk(3, dim=1, largest=False)
    result = model.neighbours(rows, rows, 3)
    torch.testing.assert_close(result.distances, expected, rtol=1e-9, atol=1e-14)
    assert torch.equal(result.indices, places)
    assert (result.margins >= 0).all()
    vectors = model.surrogate(rows).vectors(model.unpacked(rows))
    assert vectors.shape == (6, 72)


def test_certainties_carry_no_gradient(batch: Tensor) -> None:
    model = small_avsl()
    known = model.unpacked(model.embed(batch))
    loss = sum(part.sum() for part in known.certainties)
    gradients = torch.autograd.grad(loss, list(model.heads.parameters()), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_one_level_is_the_squared_euclidean_distance(batch: Tensor) -> None:
    model = small_avsl(levels=("stage2",))
    with torch.no_grad():
        rows = model.embed(batch)
    units = model.unpacked(rows).embeddings[0]
    torch.testing.assert_close(model.distance(rows, rows), torch.cdist(units, units).square())


def test_levels_may_be_named_in_any_order_and_have_their_own_widths(batch: Tensor) -> None:
    model = small_avsl(levels=("stage3", "stage1"), nodes=(5, 9))
    assert model.levels == ("stage1", "stage3")
    assert model.widths == (5, 9)
    assert model.edges[0].shape == (5, 9)
    assert model.embed(batch).shape == (6, 28)


def test_default_levels_are_the_last_three_stages() -> None:
    network = timm.create_model("resnet18", num_classes=0)
    assert AVSL(network, nodes=4).levels == ("layer2", "layer3", "layer4")


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"]
)
def test_transformers_have_levels_too(name: str) -> None:
    model = AVSL(timm.create_model(name, num_classes=0), nodes=7).eval()
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        maps = model.feature_maps(images)
        model.update_edges(maps)
        rows = model.embed(images)
        cams = model.cams(maps)
    assert len(model.levels) == 3
    for unit, level in zip(model.unpacked(rows).embeddings, cams, strict=True):
        expected = nn.functional.normalize(level.mean(dim=(2, 3)), dim=1)
        torch.testing.assert_close(unit, expected, rtol=1e-4, atol=1e-5)


def test_embedding_leaves_everything_as_it_was(batch: Tensor) -> None:
    network = Pyramid()
    network.stage3[1].train()
    network.stage1[0].eval()
    model = AVSL(network, levels=LEVELS, nodes=4).double()
    modes = [module.training for module in network.modules()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    kept, before = batch.clone(), torch.get_rng_state()
    network.eval()
    model.embed(batch)
    for module, mode in zip(network.modules(), modes, strict=True):
        module.training = mode
    assert torch.equal(batch, kept)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_explain_takes_avsl_models_and_finds_the_top_level(batch: Tensor) -> None:
    model = small_avsl()
    result = explain(model, Comparison.triplet(batch[:1], batch[1:2], batch[2:3]))
    assert result.layers == ("stage3",)
    assert result.maps.shape[:2] == (1, 3)
    with torch.no_grad():
        rows = model.embed(batch[:3])
        torch.testing.assert_close(result.distances, model.distance(rows[:1], rows[1:]))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[AVSL, Path]:
    built = build_backbone("timm:mobilenetv3_small_050", pretrained=False, size=(64, 64))
    base = as_similarity_model(built.network, preprocess=built.preprocess)
    model = AVSL(base, nodes=(6, 7, 8), preset="official", origin="labelled", report={"images": 3})
    model.eval()
    with torch.no_grad():
        model.update_edges(model.feature_maps(torch.rand(4, 3, 64, 64)))
        model.alphas[0].add_(0.5)
    save_model(model, tmp_path / "avsl.pt")
    return model, tmp_path / "avsl.pt"


def test_files_give_the_same_model_back(saved: tuple[AVSL, Path]) -> None:
    model, path = saved
    before = torch.get_rng_state()
    again = load_model(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(again, AVSL)
    assert again.to_json() == model.to_json()
    assert again.preprocess == model.preprocess
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.embed(images), model.embed(images))
        rows = model.embed(images)
        assert torch.equal(again.distance(rows, rows), model.distance(rows, rows))
    for name, value in model.state_dict().items():
        if name.startswith(("heads", "alphas", "betas", "edge")):
            assert torch.equal(again.state_dict()[name], value), name
    torch.load(path, weights_only=True)


def test_damaged_files_are_refused_in_one_sentence(saved: tuple[AVSL, Path]) -> None:
    _, path = saved
    content = torch.load(path, weights_only=True)
    assert "whose distance is its own" in refusal(path, distance="cosine")
    for change in (
        lambda c: c["state_dict"].pop("avsl.heads.1.weight"),
        lambda c: c["simexplain"]["avsl"].pop("levels"),
        lambda c: c["simexplain"]["avsl"].update(levels=["nowhere"]),
        lambda c: c["simexplain"]["avsl"].update(origin="heaven"),
        lambda c: c["simexplain"]["avsl"]["options"].update(surprise=1),
        lambda c: c["simexplain"]["avsl"]["options"].update(pooling="none"),
        lambda c: c["simexplain"]["avsl"].update(nodes=[6, 7]),
    ):
        broken = {"simexplain": {**content["simexplain"]}, "state_dict": {**content["state_dict"]}}
        record = content["simexplain"]["avsl"]
        broken["simexplain"]["avsl"] = {**record, "options": {**record["options"]}}
        change(broken)
        torch.save(broken, path)
        refusal(path)


def test_wrong_models_and_options_are_told() -> None:
    with pytest.raises(ModelError, match="different layers of Pyramid as levels, got 'stage9'"):
        AVSL(Pyramid(), levels=("stage1", "stage9"))
    with pytest.raises(ModelError, match="different layers"):
        AVSL(Pyramid(), levels=("stage1", "stage1"))
    with pytest.raises(ModelError, match="number of nodes"):
        AVSL(Pyramid(), levels=LEVELS, nodes=(3, 4))
    with pytest.raises(ModelError, match="number of nodes"):
        AVSL(Pyramid(), nodes=0)
    with pytest.raises(ModelError, match="preset of paper, official"):
        AVSL(Pyramid(), preset="best")
    with pytest.raises(ModelError, match="origin"):
        AVSL(Pyramid(), origin="luck")
    for wrong in ({"pooling": "min"}, {"k": 0}, {"scale": 0.0}, {"epsilon": -1.0},
                  {"momentum": 1.0}, {"ties": "none"}, {"orphans": "adopt"},
                  {"certainty": "entropy"}):  # fmt: skip
        with pytest.raises(ModelError, match="Expected"):
            AVSLOptions(**wrong)
    assert set(ORIGINS) == {"untrained", "labelled", "unlabelled", "trained"}
    model = small_avsl()
    with pytest.raises(ModelError, match="embed the images with the same model"):
        model.distance(torch.rand(2, 5), torch.rand(2, 5))


def test_a_shared_layer_is_named_with_its_call() -> None:
    model = AVSL(SharedNet(), levels=("act@0", "act@2"), nodes=3).eval()
    with torch.no_grad():
        first, last = model.feature_maps(torch.rand(2, 3, 24, 32))
    assert not torch.equal(first, last)


def test_half_precision_networks_give_single_precision_rows() -> None:
    model = AVSL(Pyramid().bfloat16().eval(), levels=LEVELS, nodes=4).eval()
    with torch.no_grad():
        rows = model.embed(torch.rand(2, 3, 32, 40))
    assert rows.dtype == torch.float32
    assert rows.isfinite().all()


def test_a_fast_copy_gives_the_same_rows(saved: tuple[AVSL, Path]) -> None:
    model, _ = saved
    fast = accelerated(model)
    assert isinstance(fast, AVSL)
    assert fast.to_json() == model.to_json()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fast.embed(images), model.embed(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:vit_tiny_patch16_224"])
def test_networks_remember_the_name_that_rebuilds_them(name: str, tmp_path: Path) -> None:
    """Also where the input is not of the network's own size, which changes a transformer."""
    base = load_model(name, weights="random", size=(96, 96))
    check_savable(base)
    model = AVSL(base, nodes=4).eval()
    save_model(model, tmp_path / "avsl.pt")
    again = load_model(tmp_path / "avsl.pt")
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(again.embed(images), model.embed(images))
    save_model(again, tmp_path / "again.pt")
