"""Names of the last version: accepted in calls and files, with a note, and nowhere else."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyNet
from PIL import Image
from torch import Tensor

import simexplain
from simexplain import Comparison, Explanation, explain
from simexplain.arguments import typed
from simexplain.batching.batching import check_same
from simexplain.errors import ArgumentError, SimexplainError
from simexplain.evaluation.comparing import setup_from
from simexplain.evaluation.results import Evaluation, SanityScores
from simexplain.renaming import (
    ARGUMENTS_ALONE,
    MOVED,
    RENAMED,
    RENAMED_OPTIONS,
    RENAMED_VALUES,
    RENAMED_VERBS,
    RenamedWarning,
    new_name,
    renamed,
    takes_old_names,
    todays,
    with_old_names,
)
from simexplain.segmentation.result import Segmentation
from simexplain.training.options import TrainOptions, with_options
from simexplain.training.training import resolved


@typed
def verb(images: Any, *, upscale: float = 1, perturb: str = "single", **options: Any) -> Any:
    return images, upscale, perturb, options


@takes_old_names
@dataclass(frozen=True)
class Result:
    errors: dict[str, str]
    steps: int = 3

    @property
    def skipped(self) -> int:
        return len(self.errors)


def test_old_arguments_mean_the_new_ones_and_say_so() -> None:
    with pytest.warns(RenamedWarning, match="'magnify' is now called 'upscale'") as caught:
        assert verb(1, magnify=2, perturb="joint") == (1, 2, "joint", {})
    assert caught[0].filename == __file__, "the warning points at the call"
    with pytest.warns(RenamedWarning) as caught:
        assert verb(1, masking="together") == (1, 1, "joint", {})
    assert len(caught) == 2, "the name and the value"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verb(1, upscale=2, perturb="joint", steps=4) == (1, 2, "joint", {"steps": 4})
    with pytest.raises(ArgumentError, match="upscale once"):
        verb(1, magnify=2, upscale=3)
    with pytest.warns(RenamedWarning), pytest.raises(ArgumentError, match="number as upscale"):
        verb(1, magnify="large")


def test_old_attributes_and_fields_of_results() -> None:
    with pytest.warns(RenamedWarning, match="'broken' is now called 'errors'"):
        made = Result(broken={"a": "b"})  # type: ignore[call-arg]
    assert made == Result({"a": "b"}) == replace(made)
    with pytest.warns(RenamedWarning, match="'left_out' is now called 'skipped'"):
        assert made.left_out == 1  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (made.steps, made.skipped) == (3, 1)
        for name in ("magnify", "watch", "nothing"):
            assert not hasattr(made, name)
    with pytest.raises(AttributeError, match="'Result' object has no attribute 'nothing'"):
        made.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_the_table_is_in_order() -> None:
    for table in (RENAMED, RENAMED_OPTIONS):
        for old, new in table.items():
            assert old not in new
            assert new_name(old, new, table) == new[0]
            assert new_name(old, {old, *new}, table) is None, "what is there is not renamed"
    assert set(RENAMED) - set(ARGUMENTS_ALONE) <= set(RENAMED_OPTIONS)
    for name in RENAMED_VALUES:
        assert any(name in new for new in RENAMED.values())


def test_what_was_written_is_read_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = {"masking": "each", "steps": 4, "seed": 0}
        assert renamed(record, ("perturb", "seed")) == {"perturb": "single", "steps": 4, "seed": 0}
        assert renamed({"broken": 1, "errors": 2}, ("errors",)) == {"errors": 2}
    with pytest.warns(RenamedWarning):
        assert todays({"watch": 3}, ("attention_triplets",)) == {"attention_triplets": 3}


def test_json_keeps_old_keys_for_a_version() -> None:
    record = with_old_names({"errors": {"a": "b"}, "schema": 1}, "broken", "left_out")
    assert record == {"errors": {"a": "b"}, "schema": 1, "broken": {"a": "b"}}
    made = SanityScores((0,), ("",), {}, (), {"1": "no map"}, {})
    assert made.to_json()["broken"] == made.to_json()["errors"] == {"1": "no map"}
    evaluated = Evaluation({}, (), {}, {"item 0": "gone"}, {})
    assert evaluated.to_json()["broken"] == evaluated.to_json()["errors"] == {"item 0": "gone"}


def test_settings_of_training_runs_of_the_last_version() -> None:
    old = {"classes": 4, "each": 3, "watch": 1, "steps": 7, "k": 5, "ks": [1, 9], "seed": 2}
    new = TrainOptions(
        classes_per_batch=4, images_per_class=3, attention_triplets=1, batches_per_epoch=7,
        edges_per_node=5, ranks=(1, 9), seed=2,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TrainOptions.from_json(old) == new, "as options.json of a run has them"
        assert with_options(TrainOptions(), old) == new
    with pytest.warns(RenamedWarning) as caught:
        assert TrainOptions(**{**old, "ks": (1, 9)}) == new
    assert len(caught) == 6
    with pytest.warns(RenamedWarning, match="'each' is now called 'images_per_class'"):
        assert new.each == 3  # type: ignore[attr-defined]
    assert not set(old) - {"seed"} & set(new.to_json())


@pytest.fixture
def pair(images: Tensor) -> Comparison:
    return Comparison.pair(images[:1], images[1:2])


def test_explanations_of_the_last_version(pair: Comparison, tmp_path: Path) -> None:
    model = TinyNet().eval()
    with pytest.warns(RenamedWarning):
        result = explain(model, pair, "sam", magnify=2, check=False)
    assert result.options["upscale"] == 2
    result.save(tmp_path / "new")
    text = (tmp_path / "new" / "explanation.json").read_text()
    assert '"upscale": 2' in text
    (tmp_path / "new" / "explanation.json").write_text(text.replace('"upscale": 2', '"magnify": 2'))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = Explanation.load(tmp_path / "new")
    assert loaded.options == result.options
    assert loaded.title == result.title == "similarity attention, as published"
    torch.testing.assert_close(loaded.maps, result.maps)


def test_segmentations_of_the_last_version(images: Tensor, tmp_path: Path) -> None:
    with pytest.warns(RenamedWarning) as caught:
        result = simexplain.segment(
            TinyNet().eval(), images[0], images[1:3], method="sam", by="otsu", several="together"
        )
    assert len(caught) == 2
    with pytest.warns(RenamedWarning, match="'by' is now called 'refine'"):
        assert result.by == result.refine == "otsu"  # type: ignore[attr-defined]
    result.save(tmp_path / "new")
    path = tmp_path / "new" / "segmentation.json"
    record = json.loads(path.read_text())
    assert record["by"] == record.pop("refine") == "otsu"
    record["options"]["several"] = record["options"].pop("aggregate")
    path.write_text(json.dumps(record))
    loaded = Segmentation.load(tmp_path / "new")
    assert (loaded.refine, loaded.options) == (result.refine, result.options)


def test_other_verbs_take_the_old_names(tmp_path: Path) -> None:
    paths = []
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (32, 32), colour).save(paths[-1])
    model = simexplain.as_similarity_model(TinyNet().eval())
    with pytest.warns(RenamedWarning, match="'different'"):
        result = simexplain.explain_files(model, paths[:2], different=True, method="sam")
    assert result.roles == ("anchor", "negative")
    with pytest.warns(RenamedWarning, match="'magnify'"):
        assert setup_from("sam:magnify=2,weights=signed") == (
            "sam", None, {"upscale": 2.0, "weights": "signed"},
        )  # fmt: skip
    with pytest.raises(SimexplainError, match="OPTION=VALUE with an option of sam"):
        setup_from("sam:masking=each")


def test_runs_and_batches_begun_by_the_last_version_go_on(tmp_path: Path) -> None:
    state = {"options": {"classes": 4, "each": 3, "watch": 1, "ks": [1, 2]}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolved(None, {"attention_triplets": 2}, state).images_per_class == 3
        with pytest.raises(SimexplainError, match="begun with images_per_class=3"):
            resolved(None, {"images_per_class": 2}, state)
        same = {"model": {}, "digest": "", "pictures": []}
        now: dict[str, Any] = {"settings": {"upscale": 2.0, "scale": "image"}, **same}
        begun: dict[str, Any] = {"settings": {"magnify": 1.0, "scale": "image"}, **same}
        with pytest.raises(SimexplainError, match=r"begun with upscale=1\.0"):
            check_same(tmp_path, begun, now)
        probe = {"name": "m", "weights": "w", "preprocess": {}, "probe": [1.0]}
        begun = {**begun, "settings": {"magnify": 2.0, "scale": "image"}, "model": probe}
        check_same(tmp_path, begun, {**now, "model": probe})
    with pytest.warns(RenamedWarning, match="'watch'"):
        assert resolved(None, {"watch": 2}, state).attention_triplets == 2


def test_functions_of_pictures_under_their_old_names(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{name}.png") for name in "abc"]
    for number, path in enumerate(paths):
        Image.effect_noise((32, 32), 40 + 9 * number).convert("RGB").save(path)
    model = simexplain.as_similarity_model(TinyNet().eval())
    today = simexplain.explain(model, paths, arch="triplet", method="sam")
    with pytest.warns(RenamedWarning, match="'explain_files' is now 'explain'"):
        old = simexplain.explain_files(model, paths, "triplet", "sam")
    assert torch.equal(old.maps, today.maps)
    comparison = Comparison.triplet(*today.images.unbind(1))
    with pytest.warns(RenamedWarning):
        assert torch.equal(
            simexplain.explain(model, comparison=comparison, method="sam").maps, today.maps
        )
    with pytest.warns(RenamedWarning):
        table = simexplain.compare_files(model, paths, "triplet", ["sam"], steps=2)
    same = simexplain.compare(model, paths, ["sam"], curve_steps=2)["sam"].means
    assert table["sam"].means == pytest.approx(same, nan_ok=True)
    with pytest.warns(RenamedWarning):
        matched = simexplain.match_files(model, paths[0], paths[1])
    assert torch.equal(matched.matrix, simexplain.match(model, paths[0], paths[1]).matrix)
    pairs = simexplain.as_pair_model(TinyNet().eval(), TinyNet().eval())
    with pytest.warns(RenamedWarning):
        two = simexplain.explain_pair_files(pairs, paths[0], paths[1:2], paths[2:], method="sam")
    same = simexplain.explain(pairs, paths, arch="triplet", method="sam")
    assert torch.equal(two.first.maps, same.first.maps)


def test_a_list_of_tensors_is_a_comparison() -> None:
    model = simexplain.as_similarity_model(TinyNet().eval())
    images = list(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    listed = simexplain.explain(model, images, "sam")
    batch = Comparison.triplet(*(image[None] for image in images))
    assert torch.equal(listed.maps, simexplain.explain(model, batch, "sam").maps)
    with pytest.raises(SimexplainError, match="preprocessed tensors"):
        simexplain.explain(model, [images[0], "a.png"])
    with pytest.raises(SimexplainError, match="make a Comparison"):
        simexplain.explain(model, [images[0], images[1][None]])
    with pytest.raises(SimexplainError, match="has its roles already"):
        simexplain.explain(model, batch, arch="triplet")


@pytest.mark.parametrize("name", [*MOVED, *RENAMED_VERBS])
def test_names_that_left_the_top_level_are_still_there(name: str) -> None:
    assert name not in simexplain.__all__
    if name in RENAMED_VERBS:
        assert callable(getattr(simexplain, name))
        return
    with pytest.warns(RenamedWarning, match=f"simexplain.{MOVED[name]}.{name}'"):
        old = getattr(simexplain, name)
    assert old is getattr(import_module(f"simexplain.{MOVED[name]}"), name)
