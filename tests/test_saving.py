"""Explanations on disk: the same after loading, atomically, and never a pickle."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyNet
from pictures import noise
from PIL import Image

from simexplain import Comparison, Explanation, as_similarity_model, explain
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import OutputError, SimexplainError
from simexplain.explanation import heat_of
from simexplain.rendering.overlay import RENDERERS

OLD = Path(__file__).parent / "saved" / "explanation"
"""An explanation of files as version 0.1.0 saved it."""
CONTRACT = {
    "schema", "architecture", "method", "layer", "images", "distances", "condition", "warnings",
    "files", "versions",
}  # fmt: skip


def explained(batch: int = 1, negatives: int = 1, **options: object) -> Explanation:
    torch.manual_seed(1)
    model = as_similarity_model(TinyNet().eval(), preprocess=Preprocess((24, 32)), name="tiny")
    stack = torch.randn(batch, 2 + negatives, 3, 24, 32)
    comparison = Comparison(stack[:, 0], stack[:, 1:2], stack[:, 2:])
    return explain(model, comparison, layer="body", **options)


@pytest.fixture
def from_files(tmp_path: Path) -> Explanation:
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = [folder / f"{name}.png" for name in "abc"]
    for number, path in enumerate(paths):
        noise(30 + number, 50, seed=number).save(path)
    torch.manual_seed(1)
    model = as_similarity_model(TinyNet().eval(), preprocess=Preprocess((24, 32)), name="tiny")
    return explain(model, paths, arch="triplet", layer="body")


def listing(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "signed", "cam": "hires_cam", "keep_negative": True},
        {"upscale": 2, "scale": "shared"},
    ],
    ids=["plain", "options", "upscaled"],
)
def test_round_trip(tmp_path: Path, batch: int, options: dict[str, object]) -> None:
    before = explained(batch, **options)
    files = before.save(tmp_path / "out")
    assert {str(path) for path in (tmp_path / "out").iterdir()} == set(files.values())
    after = Explanation.load(tmp_path / "out")
    for name in ("maps", "weights", "scores", "embeddings", "distances"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    assert torch.equal(after.layer_maps["body"], before.layer_maps["body"])
    for name in ("positives", "roles", "method", "model", "layers", "warnings", "scale"):
        assert getattr(after, name) == getattr(before, name), name
    assert dict(after.options) == dict(before.options)
    assert dict(after.versions) == dict(before.versions)
    assert after.preprocess == before.preprocess
    assert (after.moved is None) == (before.moved is None)
    assert before.moved is None or torch.equal(after.moved, before.moved)
    assert np.array_equal(after.views, before.views)
    assert torch.equal(after.heatmaps, before.heatmaps)
    assert after.peaks() == before.peaks()
    assert after.condition() == before.condition()
    after.figure(batch - 1).savefig(tmp_path / "figure.png")
    assert after.save(tmp_path / "again").keys() == files.keys()


def test_peaks_of_pictures_keep_their_unit(from_files: Explanation, tmp_path: Path) -> None:
    from_files.save(tmp_path / "out")
    after = Explanation.load(tmp_path / "out")
    assert not after.pictures
    assert after.geometries == from_files.geometries
    assert after.peaks() == from_files.peaks() != after.view_peaks()
    crosses = [
        tuple(float(v[0]) + 0.5 for v in axes.lines[0].get_data())
        for axes in after.figure().axes
        if axes.lines and axes.images  # drawn on the network's view of the picture
    ]
    assert crosses == after.view_peaks()
    after.save(tmp_path / "again")
    assert Explanation.load(tmp_path / "again").peaks() == from_files.peaks()


def test_folders_of_older_versions_load_without_geometries(tmp_path: Path) -> None:
    from_files = Explanation.load(OLD)
    shutil.copytree(OLD, tmp_path / "out")
    path = tmp_path / "out" / "explanation.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    for part in (record, record["comparisons"][0]):
        for image in part["images"]:
            del image["geometry"]
    path.write_text(json.dumps(record), encoding="utf-8")
    after = Explanation.load(tmp_path / "out")
    assert after.geometries == ()
    assert after.peaks() == after.view_peaks() == from_files.view_peaks()


def test_heatmap_files_of_maps_on_pixels_are_drawn_as_the_figure_is(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = as_similarity_model(TinyNet().eval(), preprocess=Preprocess((24, 32)), name="tiny")
    result = explain(model, Comparison.triplet(*torch.randn(3, 1, 3, 24, 32)), "saliency")
    files = result.save(tmp_path / "out")
    for index in range(3):
        drawn = np.asarray(Image.open(files[f"heatmap_{index}"]))
        picture = result.preprocess.undo(result.images[0, index])
        assert np.array_equal(drawn, RENDERERS["overlay"](picture, heat_of(result, 0)[index]))
        true = result.heatmaps[0, index].numpy()
        assert not np.array_equal(drawn, RENDERERS["overlay"](picture, true))
        assert np.array_equal(result.on_picture(index, raw=True)[1], true)


def test_float64_and_fused_layers_survive(tmp_path: Path) -> None:
    model = as_similarity_model(TinyNet().double().eval(), preprocess=Preprocess((24, 32)))
    stack = torch.randn(3, 1, 3, 24, 32, dtype=torch.float64)
    before = explain(model, Comparison.triplet(*stack), layer=("stem", "body"))
    before.save(tmp_path / "out")
    after = Explanation.load(tmp_path / "out")
    assert after.maps.dtype == torch.float64
    assert torch.equal(after.maps, before.maps)
    assert list(after.layer_maps) == ["stem", "body"]
    assert all(torch.equal(after.layer_maps[k], v) for k, v in before.layer_maps.items())


def test_manifest_keeps_the_contract(from_files: Explanation, tmp_path: Path) -> None:
    files = from_files.save(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "explanation.json").read_text(encoding="utf-8"))
    assert record.keys() >= CONTRACT
    assert record["schema"] == 1
    assert record["architecture"] == "triplet"
    assert (record["method"], record["layer"]) == ("sam", "body")
    assert [image["role"] for image in record["images"]] == ["anchor", "positive", "negative"]
    assert [image["path"] for image in record["images"]] == [p.path for p in from_files.pictures]
    for image, picture in zip(record["images"], from_files.pictures, strict=True):
        x, y = image["peak"]
        assert 0 <= x <= picture.image.width
        assert 0 <= y <= picture.image.height
    near, far = record["distances"]
    assert record["condition"].keys() == {"text", "holds", "margin"}
    assert record["condition"]["holds"] is (near < far)
    assert record["condition"]["margin"] == pytest.approx(far - near, abs=1e-6)
    assert record["files"] == files
    assert all(Path(path).is_file() for path in files.values())
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_arrays_hold_no_pickles(tmp_path: Path) -> None:
    files = explained().save(tmp_path / "out")
    with np.load(files["maps"], allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored.files)
        assert {"maps", "weights", "scores", "embeddings", "distances"} <= set(stored.files)


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    explained().save(folder)
    before = listing(folder)
    with pytest.raises(OutputError, match=r"is there already.*--force"):
        explained(weights="signed").save(folder)
    assert listing(folder) == before


def test_force_replaces_its_own_files_only(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    explained(batch=2, negatives=3).save(folder)
    strange = {"notes.txt": b"mine", "heatmap_of_mine.png": b"mine too"}
    for name, content in strange.items():
        (folder / name).write_bytes(content)
    after = explained()
    files = after.save(folder, force=True)
    names = {Path(path).name for path in files.values()}
    assert set(listing(folder)) == names | set(strange)
    assert {name: listing(folder)[name] for name in strange} == strange
    assert torch.equal(Explanation.load(folder).maps, after.maps)


def test_earlier_manifest_cannot_delete_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    explained().save(folder)
    outside = tmp_path / "heatmap_9_precious.png"
    outside.write_bytes(b"mine")
    record = json.loads((folder / "explanation.json").read_text(encoding="utf-8"))
    record["files"] = {"a": str(outside), "b": "../heatmap_9_precious.png", "c": 5}
    (folder / "explanation.json").write_text(json.dumps(record), encoding="utf-8")
    explained().save(folder, force=True)
    assert outside.read_bytes() == b"mine"


@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError(28, "No space left")])
@pytest.mark.parametrize("earlier", [False, True])
def test_failure_midway_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, earlier: bool
) -> None:
    folder = tmp_path / "deep" / "out"
    if earlier:
        explained().save(folder)
        before = listing(folder)

    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("numpy.savez_compressed", broken)  # comes after the figure
    expected = OutputError if isinstance(error, OSError) else RuntimeError
    with pytest.raises(expected):
        explained(weights="signed").save(folder, force=True)
    if earlier:
        assert listing(folder) == before
        assert [p.name for p in folder.parent.iterdir()] == ["out"]
    else:
        assert list(tmp_path.iterdir()) == []


def test_interruption_while_drawing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Explanation, "figure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        explained().save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unknown_style_writes_nothing(tmp_path: Path) -> None:
    for styles in (("glow",), ()):
        with pytest.raises(SimexplainError, match="overlay"):
            explained().save(tmp_path / "out", styles=styles)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match="is a file"):
        explained().save(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        explained().save(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "maps.npz").mkdir()
    with pytest.raises(OutputError):
        explained().save(tmp_path / "taken", force=True)
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["maps.npz"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        explained().save(tmp_path / "out")
    tmp_path.chmod(0o700)


def unreadable(folder: Path) -> str:
    with pytest.raises(OutputError) as caught:
        Explanation.load(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text
    return text


def test_folders_without_an_explanation(tmp_path: Path) -> None:
    assert "holds no explanation" in unreadable(tmp_path)
    assert "holds no explanation" in unreadable(tmp_path / "missing")
    explained().save(tmp_path / "out")
    (tmp_path / "out" / "maps.npz").unlink()
    assert "maps.npz" in unreadable(tmp_path / "out")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", "null", "{}", '{"schema": 1}', '{"schema": 7}', "\0"]
)
def test_damaged_manifest(tmp_path: Path, content: str) -> None:
    explained().save(tmp_path / "out")
    (tmp_path / "out" / "explanation.json").write_text(content, encoding="utf-8")
    record = unreadable(tmp_path / "out")
    assert re.search("schema 7" if "7" in content else "damaged", record)


@pytest.mark.parametrize("old", [False, True])
def test_damaged_values_in_the_manifest(tmp_path: Path, old: bool) -> None:
    if old:
        shutil.copytree(OLD, tmp_path / "out")
    else:
        explained().save(tmp_path / "out")
    path = tmp_path / "out" / "explanation.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    values = [
        ("layers", 5), ("preprocess", {"odd": 1}), ("scale", "none"), ("preprocess", []),
        ("layers", ["a", "b"]), ("options", []), ("versions", None), ("region", [0, 1]),
    ]  # fmt: skip
    if old:  # today's arrays have a record of their own of what is in there
        values += [("comparisons", []), ("comparisons", [{"images": 3}])]
    for key, value in values:
        path.write_text(json.dumps(whole | {key: value}), encoding="utf-8")
        assert "damaged" in unreadable(tmp_path / "out"), key


def test_damaged_arrays(tmp_path: Path) -> None:
    explained().save(tmp_path / "out")
    path = tmp_path / "out" / "maps.npz"
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 3 : len(content) // 3 + 40] = b"\xa5" * 40
    for damaged in (b"", b"text", content[:100], content[: len(content) // 2], bytes(flipped)):
        path.write_bytes(damaged)
        unreadable(tmp_path / "out")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("maps.npy", b"no array")
    unreadable(tmp_path / "out")
    np.savez(path, maps=np.array([{"a": 1}], dtype=object))
    assert "damaged" in unreadable(tmp_path / "out")
