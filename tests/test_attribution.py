"""Attribution: the account adds up, equals autograd, can be drawn, saved and read again."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from avsl_cases import Pyramid, small_avsl
from torch import Tensor

from simexplain import Attribution, as_similarity_model, attribute
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ComparisonError, ImageError, ModelError, OutputError
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_options import PRESETS
from simexplain.models.base import SimilarityModel


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.rand((2, 3, 3, 32, 40), generator=generator, dtype=torch.float64)
    return drawn[0], drawn[1]


@pytest.fixture
def found(pair: tuple[Tensor, Tensor]) -> Attribution:
    return attribute(small_avsl(), *pair, roles=("positive", "negative", ""))


@pytest.fixture
def file_model() -> AVSL:
    """A small model in single precision that reads pictures."""
    model = small_avsl().float()
    base: SimilarityModel = as_similarity_model(Pyramid(), preprocess=Preprocess(size=(64, 64)))
    again = AVSL(base, levels=model.levels, nodes=24, preset=model.options, origin="unlabelled")
    again.load_state_dict(model.state_dict())
    return again.eval()


@pytest.mark.parametrize("preset", PRESETS)
def test_contributions_add_up_in_single_precision(preset: str, pair: tuple[Tensor, Tensor]) -> None:
    model = small_avsl(preset).float()
    result = attribute(model, *(side.float() for side in pair))
    total = sum(part.double().sum(dim=1) for part in result.contributions)
    assert ((total - result.distances).abs() / result.distances).max() < 1e-6
    assert (result.residual.abs() / result.distances).max() < 1e-6
    torch.testing.assert_close(result.shares.sum(dim=1), torch.ones(3))


def test_sensitivities_are_the_derivative_of_the_model_s_own_distance(
    pair: tuple[Tensor, Tensor], found: Attribution
) -> None:
    """Each unit embedding of the query is moved, and the distance with it: chain rule by hand."""
    model = small_avsl()
    with torch.no_grad():
        a, b = (model.embed(side) for side in pair)
    a = a.requires_grad_()
    for index in range(3):
        distance = model.distance(a[index : index + 1], b[index : index + 1]).sum()
        gradient = torch.autograd.grad(distance, a)[0][index]
        known = model.unpacked(gradient[None])
        for level in range(3):
            one, other = found.embeddings[level][index]
            expected = 2 * (one - other) * found.sensitivities[level][index]
            torch.testing.assert_close(known.embeddings[level][0], expected)


def test_distances_are_the_model_s(pair: tuple[Tensor, Tensor], found: Attribution) -> None:
    model = small_avsl()
    with torch.no_grad():
        a, b = (model.embed(side) for side in pair)
        torch.testing.assert_close(found.distances, model.distance(a, b).diagonal())
    assert found.residual.abs().max() < 1e-14


def test_one_image_serves_all_pairs_and_batches_do_not_matter(
    pair: tuple[Tensor, Tensor],
) -> None:
    model = small_avsl()
    a, b = pair
    whole = attribute(model, a[0], b, max_batch=2)
    assert len(whole) == 3
    for index in range(3):
        alone = attribute(model, a[:1], b[index])
        torch.testing.assert_close(whole.distances[index : index + 1], alone.distances)
        for one, other in zip(whole.contributions, alone.contributions, strict=True):
            torch.testing.assert_close(one[index], other[0])
        for one, other in zip(whole.features, alone.features, strict=True):
            torch.testing.assert_close(one[index], other[0])


def test_the_model_is_left_as_it_was(pair: tuple[Tensor, Tensor]) -> None:
    model = small_avsl().train()
    model.network.stage3[1].eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before, kept = torch.get_rng_state(), pair[0].clone()
    attribute(model, *pair)
    with pytest.raises(RuntimeError):
        attribute(model, torch.zeros(1, 5, 8, 8), torch.zeros(1, 5, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(pair[0], kept)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_identical_images_have_no_distance_and_no_shares(pair: tuple[Tensor, Tensor]) -> None:
    result = attribute(small_avsl(), pair[0], pair[0], max_batch=1)
    assert (result.distances == 0).all()
    assert (result.shares == 0).all()
    assert all(node.share == 0 for node in result.top(3))
    assert result.figure() is not None
    assert result.ranking() is not None


def test_top_is_sorted_and_covers_everything(found: Attribution) -> None:
    nodes = found.top(10_000, 1)
    assert len(nodes) == 72
    parts = [node.contribution for node in nodes]
    assert parts == sorted(parts, reverse=True)
    assert sum(parts) == pytest.approx(float(found.distances[1]))
    assert {(node.level, node.node) for node in nodes} == {
        (n, i) for n in range(3) for i in range(24)
    }
    for by in ("value", "reliability", "sensitivity"):
        least = found.top(5, 1, by=by, largest=False, level="stage2")
        values = [getattr(node, by) for node in least]
        assert values == sorted(values)
        assert {node.layer for node in least} == {"stage2"}
    assert found.top(0) == ()


def test_a_node_is_what_the_tensors_say(found: Attribution) -> None:
    node = found.node(1, 5, 2)
    assert node == found.node("stage2", 5, 2) == found.node(-2, 5, 2)
    assert node.value == float(found.nodes[1][2, 5])
    assert node.reliability == float(found.reliabilities[1][2, 5])
    assert node.contribution == pytest.approx(node.sensitivity * node.value)
    assert node.share == pytest.approx(node.contribution / float(found.distances[2]))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_decomposition_adds_up(found: Attribution, level: int) -> None:
    for node in range(24):
        apart = found.decompose(level, node, 1)
        total = apart.own + sum(part.part for part in apart.stand_ins)
        assert total == pytest.approx(apart.flow, rel=1e-9, abs=1e-15)
        assert (len(apart.stand_ins) > 0) == (level > 0)
        assert len(apart.stand_ins) <= 6
        parts = [part.part for part in apart.stand_ins]
        assert parts == sorted(parts, reverse=True)
        if apart.stand_ins:
            assert sum(part.edge for part in apart.stand_ins) == pytest.approx(1)


def test_flows_through_the_top_are_the_distance(found: Attribution) -> None:
    flows = sum(found.decompose(2, node).flow for node in range(24))
    assert flows == pytest.approx(float(found.distances[0]))


def test_cams_of_both_images_have_the_embedding_as_their_mean(
    pair: tuple[Tensor, Tensor], found: Attribution
) -> None:
    for level, stride in ((0, 2), (1, 4), (2, 8)):
        cams = found.maps(level, range(24), 1)
        assert cams.shape == (2, 24, 32 // stride, 40 // stride)
        means = torch.nn.functional.normalize(cams.mean(dim=(2, 3)), dim=1)
        torch.testing.assert_close(means, found.embeddings[level][1])
        torch.testing.assert_close(found.maps(level, 3, 1), cams[:, 3])


def test_heatmaps_lie_in_the_unit_interval_and_follow_the_sign(found: Attribution) -> None:
    heat = found.heatmaps(2, range(24), 0)
    assert heat.shape == (2, 24, 32, 40)
    assert float(heat.min()) >= 0
    assert float(heat.max()) == 1
    cams = found.maps(2, range(24), 0)
    for image in range(2):
        for node in range(24):
            cam = cams[image, node] * (-1 if cams[image, node].mean() < 0 else 1)
            row, column = divmod(int(cam.argmax()), cam.shape[1])
            peak = heat[image, node, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert float(peak.max()) > 0.9  # a plateau beside it may be the top


@pytest.mark.parametrize("preset", PRESETS)
def test_level_maps_split_each_level_s_part_over_both_images(
    preset: str, pair: tuple[Tensor, Tensor]
) -> None:
    result = attribute(small_avsl(preset), *pair)
    for level in range(3):
        maps = result.level_maps(level, 1)
        expected = result.level_contributions[1, level]
        torch.testing.assert_close(maps.sum(), expected, rtol=1e-9, atol=1e-12)


def test_the_table_has_every_node_and_adds_up(found: Attribution) -> None:
    table = found.table(2)
    assert list(table) == ["level", "layer", "node", "value", "reliability", "sensitivity",
                           "contribution"]  # fmt: skip
    assert {len(column) for column in table.values()} == {72}
    assert sum(table["contribution"]) == pytest.approx(float(found.distances[2]))


def test_saving_and_loading(found: Attribution, tmp_path: Path) -> None:
    files = found.save(tmp_path / "out", top=4, node=(2, 3))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "attribution.json", "attribution.npz", "nodes.csv", "ranking.png",
        "graph_0000.png", "graph_0001.png", "graph_0002.png",
    }  # fmt: skip
    record = json.loads(Path(files["manifest"]).read_text())
    assert {"schema", "distance", "residual", "levels", "nodes", "files", "versions"} <= set(record)
    assert record["distance"] == pytest.approx(float(found.distances[0]))
    assert len(record["nodes"]) == 4
    assert sum(level["share"] for level in record["levels"]) == pytest.approx(1)
    assert record["decomposition"]["node"]["node"] == 3
    with Path(files["table"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 72
    second = sum(float(row["contribution"]) for row in rows if row["pair"] == "1")
    assert second == pytest.approx(float(found.distances[1]))
    again = Attribution.load(tmp_path / "out")
    for one, other in zip((*again.nodes, *again.features, *again.edges),
                          (*found.nodes, *found.features, *found.edges), strict=True):  # fmt: skip
        assert torch.equal(one, other)
    assert again.top(5) == found.top(5)
    assert again.decompose(1, 2) == found.decompose(1, 2)
    assert (again.roles, again.levels, again.origin) == (found.roles, found.levels, found.origin)
    assert np.array_equal(again.views, found.views)
    assert torch.equal(again.maps(1, 4), found.maps(1, 4))


def test_saving_refuses_to_replace_and_loading_to_guess(found: Attribution, tmp_path: Path) -> None:
    one = attribute(small_avsl("official"), found.images[:1, 0], found.images[:1, 1])
    one.save(tmp_path)
    with pytest.raises(OutputError, match="is there already"):
        one.save(tmp_path)
    found.save(tmp_path, force=True)
    assert not (tmp_path / "graph.png").exists()
    assert (tmp_path / "graph_0000.png").exists()
    one.save(tmp_path, force=True)
    assert not (tmp_path / "graph_0000.png").exists()
    assert Attribution.load(tmp_path).heads[0][1] is not None
    with pytest.raises(OutputError, match="holds no attribution"):
        Attribution.load(tmp_path / "nowhere")
    (tmp_path / "attribution.npz").write_bytes(b"PK broken")
    with pytest.raises(OutputError, match="damaged"):
        Attribution.load(tmp_path)
    record = json.loads((tmp_path / "attribution.json").read_text())
    (tmp_path / "attribution.json").write_text(json.dumps({**record, "schema": 99}))
    with pytest.raises(OutputError, match="schema 99"):
        Attribution.load(tmp_path)


def test_files_keep_their_pictures(file_model: AVSL, demo_paths: list[Path]) -> None:
    result = attribute(file_model, demo_paths[0], demo_paths[1:])
    assert result.roles == ("positive", "negative")
    assert [Path(second.path) for _, second in result.pictures] == demo_paths[1:]
    assert result.images.shape == (2, 2, 3, 64, 64)
    assert any("PCA heads" in warning for warning in result.warnings)
    assert result._repr_html_().count("<img") == 2


def test_wrong_input_is_told_in_a_sentence(
    pair: tuple[Tensor, Tensor], found: Attribution, file_model: AVSL, tmp_path: Path
) -> None:
    model = small_avsl()
    with pytest.raises(ModelError, match="simexplain fit"):
        attribute(Pyramid(), *pair)
    with pytest.raises(ModelError, match="simexplain fit"):
        attribute(as_similarity_model(Pyramid()), "a", ["b"])
    for a, b in ((pair[0], pair[1][:2]), (pair[0], pair[1][..., :-1]), (pair[0][:0], pair[1]),
                 (pair[0].long(), pair[1]), (pair[0][0, 0], pair[1][0, 0])):  # fmt: skip
        with pytest.raises(ComparisonError, match="Expected two batches"):
            attribute(model, a, b)
    for roles in (("positive",), ("yes", "no", "no")):
        with pytest.raises(ComparisonError, match="Expected one role"):
            attribute(model, *pair, roles=roles)
    with pytest.raises(ComparisonError, match="at least one picture to compare with"):
        attribute(file_model, tmp_path / "a.png", [])
    with pytest.raises(ImageError, match="no file"):
        attribute(file_model, tmp_path / "a.png", [tmp_path / "b.png"])
    for level in (3, -4, "stage9"):
        with pytest.raises(ComparisonError, match="Expected a level of 0"):
            found.node(level, 0)
    with pytest.raises(ComparisonError, match="Expected a node of 0 to 23"):
        found.decompose(0, 24)
    with pytest.raises(ComparisonError, match="Expected by"):
        found.top(3, by="beauty")
    with pytest.raises(ComparisonError, match="Expected a pair below 3"):
        found.figure(3)
    with pytest.raises(ImageError, match="no file"):
        attribute(model, "a.jpg", pair[1])
    with pytest.raises(ComparisonError, match="max_batch of at least 1"):
        attribute(model, *pair, max_batch=-1)
    with pytest.raises(ComparisonError, match="Expected a node of 0 to 23"):
        found.figure(node=99)
    undefined = small_avsl()
    undefined.alphas[0].data.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN in alpha, beta"):
        attribute(undefined, *pair)
    broken = small_avsl()
    broken.network.stage1[0].weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        attribute(broken, *pair)


def test_what_to_know_is_said(pair: tuple[Tensor, Tensor]) -> None:
    fresh = small_avsl(learned=False)
    record = " ".join(attribute(fresh, *pair).warnings)
    assert "never trained" in record
    assert "edges were never set" in record
    fresh.origin = "trained"
    with torch.no_grad():
        fresh.update_edges(fresh.feature_maps(pair[0]))
    (only,) = attribute(fresh, *pair).warnings
    assert "hardly differ" in only
