"""Whole methods judged: faithfulness on known networks, data sets, and the sanity check."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from avsl_cases import small_avsl
from conftest import TinyNet
from figures import written
from PIL import Image
from torch import Tensor, nn

from simexplain import Comparison, Preprocess, as_similarity_model, explain
from simexplain.errors import ComparisonError, ImageError, ModelError, OutputError
from simexplain.evaluation.evaluating import evaluate_faithfulness
from simexplain.evaluation.faithfulness import faithfulness, sanity_check
from simexplain.evaluation.items import Item, read_mask
from simexplain.evaluation.results import cost
from simexplain.methods.pixel_methods import black_of

PREPARE = Preprocess(size=(24, 24), fit="squash")


class Corner(nn.Module):
    """Its embedding is the colour of the upper left quarter, whatever is elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.keep = nn.Conv2d(3, 3, 1, bias=False)
        self.keep.weight.data = torch.eye(3).view(3, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        kept = self.keep(images)
        height, width = kept.shape[-2:]
        return kept[..., : height // 2, : width // 2].mean(dim=(2, 3))


def coloured() -> Comparison:
    """Two red corners and a blue one, in strong surroundings of other and different colours."""
    images = torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(7))
    corners = ((3, 0, 0), (3, 0.4, 0), (0, 0, 3))
    around = ((0, 30, 0), (0, 0, 30), (0, 30, 0))
    for image, corner, rest in zip(images, corners, around, strict=True):
        image += torch.tensor(rest).view(3, 1, 1)
        image[:, :12, :16] = torch.tensor(corner).view(3, 1, 1)
    return Comparison.triplet(images[:1], images[1:2], images[2:])


def corner_maps(comparison: Comparison, generator: torch.Generator | None = None) -> Tensor:
    """The true maps, or random ones."""
    shape = (comparison.batch, comparison.count, 24, 32)
    if generator is not None:
        return torch.rand(shape, generator=generator)
    maps = torch.zeros(shape)
    maps[..., :12, :16] = 1
    return maps


@pytest.mark.parametrize(
    ("perturb", "baseline"),
    [("single", "blur"), ("single", "mean"), ("single", "black"), ("joint", "blur"),
     ("joint", "mean")],
)  # fmt: skip
def test_the_true_map_is_more_faithful_than_random_ones(perturb: str, baseline: str) -> None:
    whole = coloured()
    pair = Comparison.pair(whole.anchor, whole.positives[:, 0])
    options = {"perturb": perturb, "baseline": baseline, "steps": 12}
    for comparison in (whole, pair):
        true = faithfulness(Corner(), comparison, corner_maps(comparison), **options)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            random = faithfulness(
                Corner(), comparison, corner_maps(comparison, generator), **options
            )
            assert bool((true.gain[:, :2] > random.gain[:, :2]).all())
            assert torch.equal(true.whole, random.whole)
    assert true.roles == (("all",) if perturb == "joint" else ("anchor", "positive"))


def test_scores_are_those_of_held_directions_and_of_the_margin() -> None:
    comparison, model = coloured(), Corner().eval()
    rows = [nn.functional.normalize(model(x), dim=1)[0] for x in comparison.stacked()[0][:, None]]
    anchor, near, far = (row.detach() for row in rows)
    each = faithfulness(model, comparison, corner_maps(comparison), curve_steps=2)
    expected = torch.stack((anchor @ (near - far), near @ anchor, -far @ anchor))
    assert torch.allclose(each.whole[0], expected.double(), atol=1e-6)
    joint = faithfulness(model, comparison, corner_maps(comparison), curve_steps=2, perturb="joint")
    assert float(joint.whole) == pytest.approx(float(anchor @ near - anchor @ far), abs=1e-6)


def test_two_black_pictures_are_alike_so_there_is_nothing_to_lose() -> None:
    whole = coloured()
    pair = Comparison.pair(whole.anchor, whole.positives[:, 0])
    result = faithfulness(
        Corner(), pair, corner_maps(pair), perturb="joint", baseline="black", steps=4
    )
    assert float(result.empty) == pytest.approx(1)
    assert math.isnan(result.deletion)
    assert bool(result.raw_deletion.isfinite())


def test_areas_of_a_corner_are_known() -> None:
    red = torch.zeros(1, 3, 24, 32)
    red[:, 0] = 1
    comparison = Comparison.pair(red, red.clone())
    black = Preprocess(size=(24, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    model = as_similarity_model(Corner(), preprocess=black)
    result = faithfulness(
        model, comparison, corner_maps(comparison), curve_steps=8, baseline="black"
    )
    # One direction until the corner's quarter of the pixels is black, after two of eight steps.
    assert result.deletion[0].tolist() == pytest.approx([1.5 / 8] * 2, abs=1e-6)
    assert result.insertion[0].tolist() == pytest.approx([7.5 / 8] * 2, abs=1e-6)


@pytest.mark.parametrize("perturb", ["single", "joint"])
def test_areas_are_undefined_where_covering_costs_little(perturb: str, tiny, images) -> None:
    images = images[[0, 2, 1]] if perturb == "joint" else images  # whose margin falls
    comparison = Comparison.triplet(images[:1], images[1:2], images[2:3])
    maps = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    rows = [nn.functional.normalize(tiny(x[None]), dim=1)[0].detach() for x in images[:3]]
    sizes = torch.tensor([float((rows[1] - rows[2]).norm()), 1.0, 1.0])  # of the directions
    sizes = sizes[:1] if perturb == "joint" else sizes
    free = faithfulness(tiny, comparison, maps, perturb=perturb, curve_steps=3, least=0)
    costs = (free.whole - free.empty)[0] / sizes
    assert float(costs.max()) > 0
    limit = float(costs.max()) * 0.999
    kept = faithfulness(tiny, comparison, maps, perturb=perturb, curve_steps=3, least=limit)
    assert kept.settings["least"] == limit
    assert torch.equal(kept.deletion[0].isfinite(), costs == costs.max())
    assert torch.equal(kept.insertion.isfinite(), kept.deletion.isfinite())
    assert torch.equal(kept.gain, free.gain)
    none = faithfulness(tiny, comparison, maps, perturb=perturb, curve_steps=3, least=limit * 1.01)
    assert bool(none.deletion.isnan().all())
    with pytest.raises(ComparisonError, match="least between 0 and 1"):
        faithfulness(tiny, comparison, maps, least=2)


def test_the_limit_knows_the_length_of_rows(images) -> None:
    """Rows of an AVSL model are no unit vectors."""
    model = small_avsl().float()
    comparison = Comparison.pair(images[:1], images[1:2])
    rows = model.embed(images[:2]).detach()
    free = faithfulness(model, comparison, torch.rand(1, 2, 4, 4), curve_steps=2, least=0)
    shares = (free.whole - free.empty)[0] / float(rows[0].norm() * rows[1].norm())
    for index in range(2):
        for factor, defined in ((0.99, True), (1.01, False)):
            limit = float(shares[index]) * factor
            if limit > 0:
                result = faithfulness(
                    model, comparison, torch.rand(1, 2, 4, 4), steps=2, least=limit
                )
                assert bool(result.deletion[0, index].isfinite()) is defined
    assert float(shares.max()) > 0


def test_results_do_not_depend_on_max_batch_and_take_explanations(tiny, images) -> None:
    comparison = Comparison.triplet(images[:2], images[2:4], images[4:])
    result = explain(tiny, comparison, layer="last")
    whole = faithfulness(tiny, comparison, result, curve_steps=5)
    for perturb in ("single", "joint"):
        options = {"steps": 5, "perturb": perturb}
        one = faithfulness(tiny, comparison, result.maps, **options)
        other = faithfulness(tiny, comparison, result, max_batch=1, **options)
        assert torch.allclose(one.raw_deletion, other.raw_deletion, atol=1e-6)
        assert torch.allclose(one.raw_insertion, other.raw_insertion, atol=1e-6)
    assert whole.deletion.shape == (2, 3)
    rows = whole.table()
    assert len(rows) == 6
    assert rows[4]["role"] == "positive"
    assert rows[4]["deletion"] == pytest.approx(float(whole.deletion[1, 1]), nan_ok=True)


def test_black_is_black_before_normalisation() -> None:
    result = black_of(as_similarity_model(TinyNet(), preprocess=PREPARE))
    assert torch.allclose(result.float(), PREPARE(Image.new("RGB", (24, 24)))[0][:, :1, :1])


def test_what_does_not_fit_is_refused(tiny, images) -> None:
    comparison = Comparison.pair(images[:1], images[1:2])
    with pytest.raises(ComparisonError, match=r"maps \(1,2,h,w\)"):
        faithfulness(tiny, comparison, torch.rand(1, 3, 4, 4))
    with pytest.raises(ComparisonError, match="single, joint"):
        faithfulness(tiny, comparison, torch.rand(1, 2, 4, 4), perturb="both")


class Touched:
    """What a user has in a model, to be compared before and after."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {n: v.clone() for n, v in model.state_dict().items()}
        self.modes = [module.training for module in model.modules()]
        self.gradients = [p.grad for p in model.parameters()]
        self.wanted = [p.requires_grad for p in model.parameters()]
        self.random = torch.get_rng_state()
        self.hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]

    def same_as(self, other: Touched) -> bool:
        values = all(torch.equal(v, other.values[n]) for n, v in self.values.items())
        gradients = zip(self.gradients, other.gradients, strict=True)
        return (
            values
            and all(one is two for one, two in gradients)
            and (self.modes, self.wanted, self.hooks) == (other.modes, other.wanted, other.hooks)
            and torch.equal(self.random, other.random)
        )


def test_the_users_model_is_left_as_it_was(tiny, images, tmp_path: Path) -> None:
    tiny.train()
    tiny.norm.eval()
    tiny.stem.weight.requires_grad_(False)
    tiny(images).sum().backward()
    before = Touched(tiny)
    comparison = Comparison.triplet(images[:1], images[1:2], images[2:3])
    faithfulness(tiny, comparison, torch.rand(1, 3, 3, 4, generator=torch.Generator()))
    sanity_check(tiny, comparison, layer="last", depths=2)
    paths, _ = pictures(tmp_path)
    model = as_similarity_model(tiny, preprocess=PREPARE)
    evaluate_faithfulness(model, [(paths,)], {"sam": ("sam", "last", {})}, curve_steps=2)
    assert before.same_as(Touched(tiny))


# ----------------------------------------------------------------------------------- data sets


def pictures(folder: Path, side: int = 48) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Three pictures with coloured upper left quarters on noise, and masks of these."""
    noise = np.random.default_rng(0)
    paths, masks = [], []
    for name, colour in (("a", (255, 0, 0)), ("b", (255, 60, 0)), ("c", (0, 0, 255))):
        pixels = noise.integers(90, 160, (side, side, 3), dtype=np.uint8)
        pixels[: side // 2, : side // 2] = colour
        paths.append(folder / f"{name}.png")
        Image.fromarray(pixels).save(paths[-1])
        mask = np.zeros((side, side), dtype=np.uint8)
        mask[: side // 2, : side // 2] = 255
        masks.append(folder / f"{name}_mask.png")
        Image.fromarray(mask).save(masks[-1])
    return tuple(paths), tuple(masks)


def painted(inside: bool):
    """A method that knows the corner, or everything but it."""

    def method(model, comparison, layers, *, max_batch=None):
        from simexplain.methods.similarity_attention import SimilarityAttention

        result = SimilarityAttention()(model, comparison, layers, max_batch=max_batch)
        maps = torch.zeros(*result.maps.shape[:2], 24, 24)
        maps[..., :12, :12] = 1
        maps = maps if inside else 1 - maps
        return result.__class__(
            maps, dict.fromkeys(layers, maps), result.weights, result.scores, result.embeddings
        )

    return method


RECIPES = {"inside": (painted(True), "keep", {}), "outside": (painted(False), "keep", {})}


@pytest.fixture
def model():
    return as_similarity_model(Corner(), preprocess=PREPARE)


def test_methods_are_ranked_on_a_data_set(model, tmp_path: Path) -> None:
    paths, masks = pictures(tmp_path)
    items = [Item(paths, masks=masks), (paths[:2], "siamese", (None, masks[1])), (paths, "triplet")]
    seen: list[tuple[int, int]] = []
    lines: list[float] = []
    result = evaluate_faithfulness(
        model, items, RECIPES, controls=("random", "centre"), steps=8, baseline="black",
        progress=lambda done, of: seen.append((done, of)), estimate=lines.append,
    )  # fmt: skip
    assert list(result.methods) == ["inside", "outside", "(random)", "(centre)"]
    inside, outside = result.methods["inside"], result.methods["outside"]
    for one, two in zip(inside.values["gain"], outside.values["gain"], strict=True):
        assert one > two
    assert inside.values["pointing"][:2] == (1, 1)
    assert math.isnan(inside.values["pointing"][2])  # no masks, no answer
    assert outside.values["pointing"][:2] == (0, 0)
    assert inside.values["energy"][0] > 0.9 > 0.2 > outside.values["energy"][0]
    assert inside.intervals["pointing"].count == 2
    assert result.chance == pytest.approx({"pointing": 0.25, "energy": 0.25})
    assert (inside.forwards, result.methods["(random)"].forwards) == (3, 0)
    assert inside.seconds > 0
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len(lines) == 1
    assert 0 < lines[0] < 30
    # The medians of what each item took, all together, are about what it took.
    spent = sum(scores.seconds + scores.measuring for scores in result.methods.values())
    assert 0 < spent < result.seconds
    assert f"all of it took {cost(result.seconds)} s" in str(result)
    assert result.to_json()["seconds"] == result.seconds
    assert not result.errors
    gap = result.difference("inside", "outside")
    assert gap.low > 0
    assert gap.count == 3
    rows = {row["method"]: row for row in result.table()}
    assert len({tuple(row) for row in rows.values()}) == 1
    assert rows["inside"]["pointing"] == 1
    with pytest.raises(ComparisonError, match="'nobody'"):
        result.difference("inside", "nobody")


def test_intervals_of_few_comparisons_are_marked(model, tmp_path: Path) -> None:
    paths, _ = pictures(tmp_path)
    options = {"controls": (), "steps": 2, "baseline": "black"}
    few = evaluate_faithfulness(model, [Item(paths)] * 9, RECIPES, **options)
    enough = evaluate_faithfulness(model, [Item(paths)] * 10, RECIPES, **options)
    for result, marked in ((few, True), (enough, False)):
        assert result.few is marked
        assert ("?[" in str(result)) is marked
        assert any("next to nothing" in note for note in result.to_json()["notes"]) is marked
        for scores in result.to_json()["methods"].values():
            assert scores["intervals"]["gain"]["few"] is marked
        text = " ".join(written(result.figure())).replace("\n", " ")
        assert ("too few to mean much" in text) is marked


def test_a_data_set_is_reproducible_and_saved_whole(model, tmp_path: Path) -> None:
    paths, masks = pictures(tmp_path)
    one, two = (
        evaluate_faithfulness(model, [(paths, "triplet", masks)], RECIPES, curve_steps=3, seed=5)
        for _ in range(2)
    )
    values = {name: scores.values for name, scores in one.methods.items()}
    assert str(values) == str({name: scores.values for name, scores in two.methods.items()})
    file = one.save(tmp_path / "new" / "scores.json")
    record = json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert record["kind"] == "evaluation"
    assert record["methods"]["inside"]["values"]["pointing"] == [1]
    assert record["methods"]["inside"]["intervals"]["pointing"]["low"] is None
    assert record["settings"]["seed"] == 5
    with pytest.raises(OutputError, match="there already"):
        one.save(file)
    (file.parent / "other.txt").write_text("stays", encoding="utf-8")
    two.save(file, force=True)
    assert {path.name for path in file.parent.iterdir()} == {"scores.json", "other.txt"}


def test_broken_items_are_told_and_do_not_stop_the_rest(model, tmp_path: Path) -> None:
    paths, _ = pictures(tmp_path)
    missing = (tmp_path / "none.png", *paths[1:])
    result = evaluate_faithfulness(
        model, [(missing,), (paths,)],
        {**RECIPES, "bad": ("sam", "no_layer", {})}, steps=2,
    )  # fmt: skip
    assert set(result.errors) == {"item 0", "item 1, bad"}
    assert "none.png" in result.errors["item 0"]
    assert [len(s.values["gain"]) for s in result.methods.values()] == [2, 2, 2, 2]
    assert math.isnan(result.methods["inside"].values["gain"][0])
    assert result.methods["bad"].intervals["gain"].count == 0
    with pytest.raises(ImageError, match=r"none\.png"):
        evaluate_faithfulness(model, [(missing,)], RECIPES)
    with pytest.raises(ComparisonError, match="controls"):
        evaluate_faithfulness(model, [(paths,)], RECIPES, controls=("edges",))


def test_maps_are_compared_with_masks_in_the_part_that_was_seen(tmp_path: Path) -> None:
    """The centre crop of a wide picture shows none of a mask at its left end."""
    prepare = Preprocess(size=(24, 24), fit="crop")
    paths = []
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 255, (24, 72, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{seed}.png")
        Image.fromarray(pixels).save(paths[-1])
    marked = []
    for number, columns in enumerate((slice(0, 20), slice(0, 36))):
        mask = np.zeros((24, 72), dtype=np.uint8)
        mask[:, columns] = 255
        marked.append(tmp_path / f"mask{number}.png")
        Image.fromarray(mask).save(marked[-1])
    model = as_similarity_model(Corner(), preprocess=prepare)
    result = evaluate_faithfulness(
        model, [(tuple(paths), "siamese", tuple(marked))], RECIPES, steps=2
    )
    # Of the second picture the left half of the view is marked, and the first asks nothing.
    assert result.chance["energy"] == pytest.approx(0.5)
    assert result.methods["inside"].values["pointing"] == (1,)


def test_masks_from_alpha_and_grey(tmp_path: Path) -> None:
    cut = np.full((4, 6, 4), 255, dtype=np.uint8)
    cut[:, 3:, 3] = 0
    Image.fromarray(cut).save(tmp_path / "cut.png")
    assert read_mask(tmp_path / "cut.png", (4, 6)).sum() == 12
    Image.fromarray(cut[..., 3]).save(tmp_path / "grey.png")
    assert torch.equal(
        read_mask(tmp_path / "grey.png", (4, 6)), read_mask(tmp_path / "cut.png", (4, 6))
    )
    with pytest.raises(ImageError, match="size of its picture, 4x6, got 6x4"):
        read_mask(tmp_path / "grey.png", (6, 4))
    Image.fromarray(cut[..., 3] // 255).save(tmp_path / "ones.png")
    with pytest.raises(ImageError, match="marks nothing"):
        read_mask(tmp_path / "ones.png", (4, 6))
    with pytest.raises(ImageError, match="cannot be read"):
        read_mask(tmp_path / "none.png", (4, 6))
    with pytest.raises(ComparisonError, match="for each of 2"):
        Item(("a", "b"), masks=("c",))


# ---------------------------------------------------------------------------------- the sanity


def test_maps_of_a_network_change_when_it_forgets(tiny, images, tmp_path: Path) -> None:
    comparison = Comparison.triplet(images[:2], images[2:4], images[4:])
    result = sanity_check(tiny, comparison, "sam", "body", depths=4, keep_negative=True)
    assert result.depths == (0, 1, 2, 3, 4)
    assert result.layers == ("", "head", "body", "norm", "stem")
    spearman = result.agreement["spearman"]
    assert spearman.shape == (5, 2, 3)
    assert torch.allclose(spearman[0], torch.ones(2, 3).double())
    assert float(spearman[-1].mean()) < 0.9
    assert [row["forgotten"] for row in result.table()] == [0, 1, 2, 3, 4]
    file = result.save(tmp_path / "sanity.json")
    assert json.loads(file.read_text(encoding="utf-8"))["layers"][1] == "head"
    again = sanity_check(tiny, comparison, "sam", "body", depths=4, keep_negative=True)
    assert torch.equal(again.agreement["cosine"], result.agreement["cosine"])


def test_maps_that_ignore_the_network_fail_the_sanity_check(images) -> None:
    comparison = Comparison.pair(images[:1], images[1:2])
    result = sanity_check(Corner(), comparison, painted(True), "keep")
    assert result.table()[-1]["spearman"] == pytest.approx(1)


def test_a_network_that_is_dead_after_forgetting_is_told(images) -> None:
    class Dead(Corner):
        def forward(self, given: Tensor) -> Tensor:
            alive = torch.equal(self.keep.weight[:, :, 0, 0], torch.eye(3))
            return super().forward(given) * float(alive)

    model, comparison = Dead(), Comparison.pair(images[:1], images[1:2])
    result = sanity_check(model, comparison, "sam", "keep")
    assert list(result.errors) == ["1"]
    assert bool(result.agreement["cosine"][1].isnan().all())
    assert torch.equal(model.keep.weight[:, :, 0, 0], torch.eye(3))


def test_the_sanity_check_refuses_what_it_cannot_do(tiny, images) -> None:
    comparison = Comparison.pair(images[:1], images[1:2])
    with pytest.raises(ModelError, match="between 0 and 4"):
        sanity_check(tiny, comparison, layer="last", depths=[9])
    with pytest.raises(ModelError, match="no parameters"):
        sanity_check(tiny, comparison, layer="last", order=[])
