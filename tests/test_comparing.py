"""Methods side by side: the numbers are those of explain and faithfulness, the files are whole."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyNet
from pictures import noise
from PIL import Image
from test_faithfulness import PREPARE, RECIPES, Corner, Touched, painted, pictures
from torch import Tensor

from simexplain import (
    METHODS,
    Comparison,
    MethodComparison,
    as_similarity_model,
    compare,
    evaluate_faithfulness,
    explain,
)
from simexplain.errors import ComparisonError, ImageError, ModelError, OutputError
from simexplain.evaluation.comparing import quick_methods, setup_from
from simexplain.evaluation.faithfulness import faithfulness
from simexplain.evaluation.items import Item, read_comparisons, sample_comparisons
from simexplain.models.blackbox import BlackBox
from simexplain.publishing import KINDS
from simexplain.rendering.sheet import png_of

CONTRACT = {
    "schema", "architecture", "model", "images", "distances", "condition", "methods", "random",
    "chance", "skipped", "undefined", "settings", "seconds", "warnings", "files", "versions",
}  # fmt: skip
METHOD_CONTRACT = {
    "name", "method", "layer", "layers", "options", "asked", "deletion", "insertion", "gain",
    "agreement", "forwards", "seconds", "measuring", "warnings", "per_image", "maps",
}  # fmt: skip
TEXTS = ("sam", "sam@last:weights=signed", "similarity_cam:score=held", "saliency")
FINE = (
    "saliency",
    "decomposition:keep_negative=true",
    "sam@stem:weights=signed",
    "sbsm:window=0.5",
)


@pytest.fixture
def triplet(images: Tensor) -> Comparison:
    return Comparison.triplet(images[:1], images[1:2], images[2:3])


@pytest.fixture
def named(tiny: TinyNet):
    return as_similarity_model(tiny, preprocess=PREPARE, name="tiny")


# ------------------------------------------------------------------------------------- numbers


def test_every_number_is_that_of_the_method_alone(tiny, triplet) -> None:
    scipy = pytest.importorskip("scipy.stats")
    result = compare(tiny, triplet, FINE, curve_steps=4, baseline="mean")
    assert [method.name for method in result.methods] == list(FINE)
    alone = [
        explain(tiny, triplet, "saliency"),
        explain(tiny, triplet, "decomposition"),
        explain(tiny, triplet, "sam", "stem", weights="signed"),
        explain(tiny, triplet, "sbsm", window=0.5),
    ]
    for method, own in zip(result.methods, alone, strict=True):
        assert torch.equal(method.explanation.maps, own.maps)
        scores = faithfulness(tiny, triplet, own, curve_steps=4, baseline="mean")
        for name in ("deletion", "insertion", "gain"):
            values = getattr(scores, name)[0].tolist()
            assert method.scores[name] == pytest.approx(values, nan_ok=True)
            known = [value for value in values if value == value] or [math.nan]
            assert method.means[name] == pytest.approx(np.mean(known), nan_ok=True)
        ranks = [
            scipy.spearmanr(one.flatten(), two.flatten()).statistic
            for one, two in zip(own.heatmaps[0], alone[0].heatmaps[0], strict=True)
            if one.amax() > one.amin()  # the correlation with a flat map is not defined
        ]
        assert method.agreement["spearman"] == pytest.approx(np.mean(ranks), abs=1e-6)
    assert result["saliency"].agreement["cosine"] == pytest.approx(1)
    assert [method.forwards for method in result.methods[:3]] == [6, 3, 3]
    assert all(method.seconds > 0 for method in result.methods)
    assert not result.skipped


def test_together_there_is_one_score_for_all_images(tiny, triplet) -> None:
    result = compare(tiny, triplet, ["sam"], curve_steps=3, perturb="joint")
    scores = faithfulness(tiny, triplet, explain(tiny, triplet), curve_steps=3, perturb="joint")
    assert result["sam"].scores["gain"] == pytest.approx(scores.gain[0].tolist())
    assert len(result["sam"].scores["gain"]) == 1
    assert png_of(result.figure())


def test_files_are_compared_as_explain_explains_them(named, tmp_path: Path) -> None:
    paths, masks = pictures(tmp_path)
    result = compare(
        named, paths, ["sam", "sam:upscale=2"], arch="triplet", masks=masks, curve_steps=2
    )
    for method, upscale in zip(result.methods, (1, 2), strict=True):
        own = explain(named, paths, arch="triplet", upscale=upscale)
        assert torch.allclose(method.explanation.maps, own.maps, atol=1e-6)
        assert method.explanation.peaks() == own.peaks()


def test_masks_are_pointed_at_and_the_best_is_known(tmp_path: Path) -> None:
    model = as_similarity_model(Corner(), preprocess=PREPARE)
    paths, masks = pictures(tmp_path)
    seen: list[tuple[int, int]] = []
    result = compare(
        model,
        paths,
        RECIPES,
        arch="triplet",
        masks=(masks[0], None, masks[2]),
        steps=8,
        baseline="black",
        progress=lambda done, of: seen.append((done, of)),
    )
    inside, outside = result["inside"], result["outside"]
    assert inside.scores["pointing"][::2] == (1, 1)
    assert math.isnan(inside.scores["pointing"][1])
    assert outside.means["pointing"] == 0
    assert inside.means["energy"] > 0.9
    assert result.chance == pytest.approx({"pointing": 0.25, "energy": 0.25})
    assert {result.best(metric) for metric in ("gain", "insertion", "deletion")} == {"inside"}
    assert inside.means["gain"] > result.random["gain"] > outside.means["gain"]
    assert seen == [(1, 2), (2, 2)]
    same = evaluate_faithfulness(
        model, [Item(paths, masks=(masks[0], None, masks[2]))], RECIPES, steps=8, baseline="black"
    )
    for name in RECIPES:
        values = {metric: scores[0] for metric, scores in same.methods[name].values.items()}
        assert result[name].means == pytest.approx(values)
    tensors = explain(model, paths).images[0]
    of_tensors = compare(
        model,
        Comparison.triplet(*tensors[:, None]),
        RECIPES,
        masks=[torch.ones(24, 24).tril() > 0, None, None],
        steps=2,
    )
    assert of_tensors["inside"].scores["pointing"][0] == 1


def test_the_users_model_is_left_as_it_was(tiny, triplet) -> None:
    tiny.train()
    tiny.stem.weight.requires_grad_(False)
    tiny(triplet.anchor.repeat(2, 1, 1, 1)).sum().backward()
    before = Touched(tiny)
    compare(tiny, triplet, TEXTS, curve_steps=2)
    assert before.same_as(Touched(tiny))


# ------------------------------------------------------------------------------------- methods


def test_what_does_not_apply_is_skipped_with_the_reason(tiny, triplet) -> None:
    every = list(METHODS)
    box = BlackBox(lambda images: tiny(images), name="box")
    cheap = {"occlusion": "occlusion:window=0.5,stride=0.5", "sbsm": "sbsm:window=0.5,stride=0.5",
             "random_masks": "random_masks:masks=8", "smoothgrad": "smoothgrad:samples=2",
             "integrated_gradients": "integrated_gradients:steps=2"}  # fmt: skip
    result = compare(box, triplet, [cheap.get(name, name) for name in every], curve_steps=2)
    done = {method.explanation.method for method in result.methods}
    layered = {name for name in every if getattr(METHODS[name], "uses_layers", True)}
    assert not done & layered
    assert {"occlusion", "saliency"} <= done
    assert {name.partition(":")[0] for name in result.skipped} | done == set(every)
    assert "black box" in result.skipped["sam"]
    assert all(reason.endswith((".", "?")) for reason in result.skipped.values())
    assert f"Skipped sam: {result.skipped['sam']}" in str(result)


def test_an_error_of_torch_skips_a_method_and_none_left_is_an_error(tiny, triplet) -> None:
    def broken(model, comparison, layers, *, max_batch=None):
        raise RuntimeError("sizes do not match\nat all")

    recipes = {"broken": (broken, None, {}), "sam": ("sam", None, {})}
    result = compare(tiny, triplet, recipes, curve_steps=1)
    assert result.skipped == {"broken": "RuntimeError: sizes do not match."}
    with pytest.raises(ModelError, match="no_layer"):
        compare(tiny, triplet, ["sam@no_layer"], curve_steps=1)


def test_methods_from_text() -> None:
    assert setup_from("sam") == ("sam", None, {})
    assert setup_from("sam@a.0") == ("sam", "a.0", {})
    text = "occlusion:window=0.5,stride=1e-1,fill=mean,keep_negative=false,upscale=2"
    options = {"window": 0.5, "stride": 0.1, "fill": "mean", "keep_negative": False, "upscale": 2}
    assert setup_from(text) == ("occlusion", None, options)
    assert setup_from("sam@a+b:weights=signed") == ("sam", ("a", "b"), {"weights": "signed"})
    assert {"sam", "focus", "decomposition"} <= set(quick_methods()) <= set(METHODS)
    many = {"smoothgrad", "integrated_gradients", "occlusion", "sbsm", "random_masks"}
    assert not many & set(quick_methods())


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (["smo"], "methods of sam"),
        (["sam:weights"], "OPTION=VALUE"),
        (["sam:colour=red"], "option of sam"),
        (["smoothgrad:samples=many"], "samples to be a whole number, got 'many'"),
        (["sam:keep_negative=perhaps"], "keep_negative to be true or false, got 'perhaps'"),
        (["sam@"], "layer after"),
        (["sam", "sam"], "every method once"),
        (["sam:weights=heavy"], "heavy"),
        ([], "at least one method"),
        ({"x": ("sam", None, {"colour": "red"})}, "'colour'"),
    ],
)
def test_methods_that_are_wrong_are_refused_before_any_runs(tiny, triplet, methods, said) -> None:
    with pytest.raises(ComparisonError, match=said) as caught:
        compare(tiny, triplet, methods, curve_steps=1)
    assert "\n" not in str(caught.value)


def test_images_and_settings_that_do_not_fit_are_refused(tiny, triplet, images) -> None:
    with pytest.raises(ComparisonError, match="one comparison, got 2"):
        compare(tiny, Comparison.pair(images[:2], images[2:4]))
    for masks in ([None], [torch.ones(24, 32), None, None], [torch.ones(4, 4) > 0, None, None]):
        with pytest.raises(ComparisonError, match="boolean mask"):
            compare(tiny, triplet, masks=masks)
    for wrong in ({"perturb": "both"}, {"baseline": "red"}, {"steps": 0}):
        with pytest.raises(ComparisonError, match="perturb of single"):
            compare(tiny, triplet, ["sam"], **wrong)


# --------------------------------------------------------------------------- figures and files


def test_the_figure_has_a_row_for_each_method_and_aligned_columns(named, tmp_path: Path) -> None:
    paths = [tmp_path / f"{side}$_{side}$.png" for side in (40, 80, 160)]
    for path, size in zip(paths, ((80, 40), (80, 80), (80, 160)), strict=True):
        noise(*size).save(path)
    result = compare(named, paths, TEXTS[:3], arch="triplet", curve_steps=1)
    figure = result.figure("contour")
    drawn = [axes for axes in figure.axes if axes.get_images()]
    assert len(drawn) == 4 * 3
    boxes = np.array([axes.get_position().bounds for axes in drawn]).reshape(4, 3, 4)
    assert np.allclose(boxes[:, :, 0], boxes[:1, :, 0])  # columns share their left edge
    assert np.allclose(boxes[:, :, 2:], boxes[:1, :, 2:])
    width, height = figure.get_size_inches()
    aspects = boxes[0, :, 2] * width / (boxes[0, :, 3] * height)
    assert aspects == pytest.approx([0.5, 1, 2])
    tops = boxes[:, 0, 1]
    assert (np.diff(tops) < -boxes[1:, 0, 3]).all()  # rows do not overlap
    record = " ".join(text.get_text() for text in figure.texts)
    for part in ("sam", "weights=signed", "score=held", "deletion", "reference"):
        assert part in record
    assert result._repr_html_().startswith("<img")
    with pytest.raises(ComparisonError, match="style"):
        result.figure("neon")


def test_texts_of_the_figure_stay_inside_and_apart(named, tmp_path: Path) -> None:
    paths, masks = pictures(tmp_path)
    texts = [*TEXTS, "input_x_gradient", "decomposition", "sam@last:cam=layer_cam"]
    figure = compare(named, paths, texts, arch="triplet", masks=masks, curve_steps=1).figure()
    figure.canvas.draw()
    page = figure.bbox
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    for number, box in enumerate(boxes):
        assert page.x0 <= box.x0
        assert box.x1 <= page.x1
        for other in boxes[number + 1 :]:
            width = min(box.x1, other.x1) - max(box.x0, other.x0)
            height = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert width <= 1 or height <= 4, "texts lie on each other"


def test_sets_of_many_images_show_what_fits(named, tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(14)]
    for path in paths:
        noise(24, 24, seed=int(path.stem)).save(path)
    result = compare(named, paths, ["sam"], arch="set", positives=6, curve_steps=1)
    figure = result.figure()
    assert figure.get_size_inches()[0] < 20
    shown = sum(bool(axes.get_images()) for axes in figure.axes) // 2
    assert 4 < shown < 14
    assert any(f"first {shown} of 14" in text.get_text() for text in figure.texts)


def test_a_comparison_is_saved_whole_and_keeps_the_contract(named, tmp_path: Path) -> None:
    paths, masks = pictures(tmp_path)
    texts = [*TEXTS[:2], "sam@no_layer"]
    result = compare(named, paths, texts, arch="triplet", masks=masks, curve_steps=2)
    files = result.save(tmp_path / "out")
    assert {Path(path).name for path in files.values()} == set(KINDS["MethodComparison"].names)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(
        KINDS["MethodComparison"].names
    )
    text = Path(files["manifest"]).read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=pytest.fail)
    assert record.keys() == CONTRACT | {"digests"}
    assert all(m.keys() == METHOD_CONTRACT | {"pointing", "energy"} for m in record["methods"])
    assert record["skipped"][0].keys() == {"name", "reason"}
    assert record["images"][1] == {"path": str(paths[1]), "role": "positive"}
    assert record["methods"][1]["options"]["weights"] == "signed"
    with np.load(files["maps"], allow_pickle=False) as stored:
        for index, method in enumerate(result.methods):
            assert np.array_equal(stored[f"maps_{index}"], method.explanation.maps[0].numpy())
        assert stored["views"].shape == (3, 24, 24, 3)
    assert Image.open(files["figure"]).size[0] > 800
    with pytest.raises(OutputError, match="there already"):
        result.save(tmp_path / "out")
    (tmp_path / "out" / "mine.txt").touch()
    result.save(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "mine.txt").exists()


def same(one: object, other: object) -> bool:
    return json.dumps(one) == json.dumps(other)  # where NaN is NaN


def test_a_saved_comparison_is_the_same_after_loading(named, tmp_path: Path) -> None:
    paths, masks = pictures(tmp_path)
    texts = [*TEXTS, "sam@last+act:upscale=2,cam=layer_cam", "sam@no_layer"]
    before = compare(named, paths, texts, arch="triplet", masks=masks, curve_steps=2)
    files = before.save(tmp_path / "out")
    after = MethodComparison.load(tmp_path / "out")
    assert str(after) == str(before)
    assert [method.name for method in after.methods] == texts[:-1]
    for one, other in zip(after.methods, before.methods, strict=True):
        assert same(one.scores, other.scores)
        assert same(one.agreement, other.agreement)
        assert same(one.asked, other.asked)
        for name in ("maps", "weights", "scores", "embeddings", "distances"):
            result = getattr(one.explanation, name)
            assert torch.equal(result, getattr(other.explanation, name)), name
        assert np.array_equal(one.explanation.views, other.explanation.views)
        assert one.explanation.peaks() == other.explanation.peaks()
        assert one.explanation.layers == other.explanation.layers
        for layer, maps in other.explanation.layer_maps.items():
            assert torch.equal(one.explanation.layer_maps[layer], maps)
    assert after.methods[-1].explanation.images.shape[-2:] == (48, 48)
    assert same([after.random, after.chance], [before.random, before.chance])
    assert after.skipped == before.skipped
    assert after.settings == before.settings
    assert after.masks.keys() == before.masks.keys()
    for index, mask in after.masks.items():
        assert tuple(mask.shape) == (24, 24)
        share = float(before.masks[index].double().mean())
        assert float(mask.double().mean()) == pytest.approx(share, abs=0.1)
    assert len(after.figure().axes) == len(before.figure().axes)
    again = after.save(tmp_path / "again")
    assert again.keys() == files.keys()
    with pytest.raises(OutputError, match="holds no comparison of methods"):
        MethodComparison.load(tmp_path)


def test_pointing_and_energy_are_measured_on_maps_as_they_are(named, tmp_path: Path) -> None:
    paths, masks = pictures(tmp_path)
    result = compare(named, paths, ["saliency"], arch="triplet", masks=masks, curve_steps=1)
    (method,) = result.methods
    for index, mask in result.masks.items():
        heat = torch.from_numpy(method.explanation.on_picture(index, raw=True)[1])
        left, top, right, bottom = method.explanation.geometries[index].box
        seen = slice(math.floor(top), math.ceil(bottom)), slice(math.floor(left), math.ceil(right))
        share = float((heat * mask)[seen].sum() / heat[seen].sum())
        assert method.scores["energy"][index] == pytest.approx(share, rel=1e-5)


def test_the_table_has_a_line_a_method_and_the_random_map(tiny, triplet) -> None:
    result = compare(tiny, triplet, TEXTS[:2], curve_steps=2)
    assert [row["method"] for row in result.table()] == [*TEXTS[:2], "(random)"]
    assert len({tuple(row) for row in result.table()}) == 1
    lines = str(result).splitlines()
    assert lines[0].split() == [
        "method", "deletion", "insertion", "gain", "agreement", "forwards", "seconds",
        "measuring",
    ]  # fmt: skip
    assert lines[1].startswith("sam ")
    assert f"{result['sam'].means['gain']:+.3f}" in lines[1]
    spent = sum(method.seconds + method.measuring for method in result.methods)
    assert all(method.measuring > 0 for method in result.methods)
    assert spent < result.seconds  # and the random map, which is measured as well
    assert any("all of it took" in line for line in lines)


def test_the_estimate_is_made_once_by_the_first_method(tiny, triplet) -> None:
    record: list[float] = []
    result = compare(tiny, triplet, TEXTS[:3], curve_steps=2, estimate=record.append)
    first = result.methods[0]
    assert record == [2 * (first.seconds + first.measuring)]
    compare(tiny, triplet, TEXTS[:1], curve_steps=2, estimate=record.append)
    assert len(record) == 1


# ----------------------------------------------------------------------------- data and results


def table(folder: Path, *lines: str, header: str = "anchor,positives,negatives") -> Path:
    path = folder / "comparisons.csv"
    path.write_text("\n".join((header, *lines)), encoding="utf-8-sig")
    return path


def test_comparisons_are_read_from_a_table(tmp_path: Path) -> None:
    header = "negatives,anchor,positives,positive_masks"
    path = table(
        tmp_path, "c.png,a.png,sub/b.png,", "", "c.png; d.png,a.png,b.png,m.png",
        ",a.png,b.png,", "c.png,a.png,,", "x.png,a.png,b.png;c.png,;m.png", header=header,
    )  # fmt: skip
    items = read_comparisons(path)
    assert [item.arch for item in items] == ["triplet", "quadruplet", "siamese", "siamese", "set"]
    assert items[0].paths == (tmp_path / "a.png", tmp_path / "sub/b.png", tmp_path / "c.png")
    assert items[0].masks is None
    assert items[1].masks == (None, tmp_path / "m.png", None, None)
    assert [item.different for item in items] == [False, False, False, True, False]
    assert items[4].positives == 2
    assert items[4].masks == (None, None, tmp_path / "m.png", None)


@pytest.mark.parametrize(
    ("lines", "header", "said"),
    [
        (["a,b"], "anchor,positives", "got no 'negatives'"),
        (["a,b,c,d"], "anchor,positives,negatives,anchor_masks", "got 'anchor_masks'"),
        ([], "anchor,positives,negatives", "at least one comparison"),
        (["a,,"], "anchor,positives,negatives", "line 2 .* 0 positives and 0 negatives"),
        (["a,b,c", ",b,c"], "anchor,positives,negatives", "line 3 .* 0 anchors"),
        (["a;b,c,d"], "anchor,positives,negatives", "2 anchors"),
        (["a,b,c,d"], "anchor,positives,negatives", "more cells"),
        (["a,b;c,d,m"], "anchor,positives,negatives,positive_masks", "1 for 2"),
        (['a,"b'], "anchor,positives,negatives", "not a CSV"),
    ],
)
def test_tables_that_are_wrong_are_refused_with_the_line(
    tmp_path: Path, lines: list[str], header: str, said: str
) -> None:
    with pytest.raises(ComparisonError, match=said) as caught:
        read_comparisons(table(tmp_path, *lines, header=header))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    with pytest.raises(ComparisonError, match="not a CSV file"):
        read_comparisons(tmp_path / "a.png")
    with pytest.raises(ComparisonError, match="cannot be read"):
        read_comparisons(tmp_path / "none.csv")


def classes(folder: Path, each: int = 4) -> Path:
    """Three classes; the first is cut out, the second has mask files, the third has one picture."""
    for label, count in (("cut", each), ("masked", each), ("single", 1)):
        (folder / label).mkdir(parents=True)
        for index in range(count):
            image = noise(24, 24, seed=index)
            if label == "cut":
                alpha = np.zeros((24, 24), np.uint8)
                alpha[:12] = 255
                image.putalpha(Image.fromarray(alpha))
            image.save(folder / label / f"{index}.png")
    for index in range(each):
        mask = np.zeros((24, 24), np.uint8)
        mask[:, :6] = 255
        Image.fromarray(mask).save(folder / "masked" / f"{index}_mask.png")
    opaque = noise(24, 24, seed=9)
    opaque.putalpha(255)
    opaque.save(folder / "single" / "0.png")
    return folder


def test_comparisons_are_drawn_from_classes(tmp_path: Path) -> None:
    folder = classes(tmp_path / "data")
    random = torch.get_rng_state()
    for arch, others in (("siamese", 0), ("triplet", 1), ("quadruplet", 2)):
        items = sample_comparisons(folder, 20, arch=arch, seed=3)
        assert items == sample_comparisons(folder, 20, arch=arch, seed=3)
        assert len({item.paths for item in items}) == len(items) == 20
        for item in items:
            labels = [Path(path).parent.name for path in item.paths]
            assert labels[0] == labels[1] != "single"
            assert labels[0] not in labels[2:]
            assert len(set(item.paths)) == len(labels) == 2 + others
            assert not any("_mask" in Path(path).name for path in item.paths)
            for path, mask in zip(item.paths, item.masks or (), strict=True):
                wanted = {
                    "cut": path, "masked": path.with_name(f"{path.stem}_mask.png"), "single": None,
                }  # fmt: skip
                assert mask == wanted[path.parent.name]
    assert torch.equal(random, torch.get_rng_state())
    assert sample_comparisons(folder, 20, seed=4) != sample_comparisons(folder, 20, seed=3)
    # Of eight anchors with three partners each there are no more than 24 pairs.
    assert len(sample_comparisons(folder, 500, arch="siamese")) == 24


def test_folders_without_comparisons_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="arch to be one of"):
        sample_comparisons(tmp_path, arch="set")
    with pytest.raises(ImageError, match="folder of pictures"):
        sample_comparisons(tmp_path / "none")
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        noise(8, 8).save(tmp_path / label / "0.png")
    with pytest.raises(ComparisonError, match="at least two pictures"):
        sample_comparisons(tmp_path)


def test_an_evaluation_is_drawn_and_saved(tmp_path: Path) -> None:
    model = as_similarity_model(Corner(), preprocess=PREPARE)
    items = sample_comparisons(classes(tmp_path / "data"), 4)
    recipes = {**RECIPES, "no$layer$": ("sam", "no_layer", {}), "half": (painted(True), "keep", {})}
    result = evaluate_faithfulness(
        model, items, recipes, controls=("random", "centre"), steps=2, tolerance=1
    )
    assert list(result.skipped) == ["no$layer$"]
    assert result.metrics == ("deletion", "insertion", "gain", "pointing", "energy")
    figure = result.figure()
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(result.metrics)
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == ["inside", "outside", "half", "(random)", "(centre)"]
    gain = figure.axes[2].lines
    means = {line.get_xdata()[0] for line in gain if line.get_marker() == "o"}
    assert result.methods["inside"].intervals["gain"].mean in means
    Image.open(io.BytesIO(png_of(figure))).verify()
    assert "[" in str(result)
    assert "no$layer$" not in str(result)
    files = result.write(tmp_path / "out", force=False)
    assert {Path(path).name for path in files.values()} == set(KINDS["Evaluation"].names)
    lines = Path(files["values"]).read_text(encoding="utf-8").splitlines()
    assert lines[0] == "item,anchor,method,deletion,insertion,gain,pointing,energy"
    assert len(lines) == 1 + 4 * 6
    first = lines[1].split(",")
    assert first[:3] == ["0", str(items[0].paths[0]), "inside"]
    assert float(first[5]) == result.methods["inside"].values["gain"][0]
    record = json.loads(Path(files["results"]).read_text(encoding="utf-8"))
    assert record["files"] == files
    assert list(record["skipped"]) == ["no$layer$"]
    with pytest.raises(OutputError, match="there already"):
        result.write(tmp_path / "out", force=False)
