"""Settings of a training run: kinds, contradictions, and what changes nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("pytorch_metric_learning")

import torch
from PIL import Image
from training_cases import TINY, striped

from simexplain.data.dataset_split import DataSplit
from simexplain.data.folders import Record
from simexplain.errors import ImageError, ModelError
from simexplain.losses.distance_losses import DISTANCE_LOSSES
from simexplain.losses.metric_losses import LOSSES, metric_loss
from simexplain.option_fields import declared
from simexplain.training.building import build_model, build_objective, check_present
from simexplain.training.options import TrainOptions, idle_options, with_options
from simexplain.training.recipes import RECIPES
from simexplain.training.recording import Listeners
from simexplain.training.training import train

TRIPLET = {"mining": "triplet"}


def refused(**settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        with_options(TrainOptions(), settings)
    text = str(caught.value)
    assert "\n" not in text
    assert "__init__" not in text
    assert text.endswith(".")
    return text


@pytest.mark.parametrize("value", ["abc", float("nan"), float("inf"), None, "1,2", True])
@pytest.mark.parametrize("loss", ["triplet", "multi_similarity", "proxy_anchor"])
@pytest.mark.parametrize("avsl", [False, True])
def test_settings_of_losses_have_kinds(loss: str, avsl: bool, value: object) -> None:
    name = "alpha" if loss == "multi_similarity" else "margin"
    if avsl and loss == "proxy_anchor":
        name = "positive"
    record = refused(avsl=avsl, loss=loss, loss_options=((name, value),))
    assert f"{name} of loss '{loss}' to be a finite number, got {value!r}" in record


def test_other_kinds_of_settings() -> None:
    margin = {"loss": "margin"}
    assert "true or false" in refused(**margin, loss_options=(("learn_beta", "maybe"),))
    assert "to be a name, got 3" in refused(loss_options=(("negatives", 3),))
    assert "among margin, negatives, got 'foo'" in refused(loss_options=(("foo", 1),))
    assert "a list of pairs (name, value) as loss_options, got ('margin',)" in refused(
        loss_options=("margin",)
    )
    each_level = (("margin", (0.1, 0.2, "x")),)
    assert "got 'x'" in refused(avsl=True, loss="triplet", loss_options=each_level)
    with_options(TrainOptions(), {"avsl": True, "loss_options": (("margin", (0.1, 0.2, 0.3)),)})
    with pytest.raises(ModelError, match="margin of loss 'triplet' to be a finite number"):
        metric_loss("triplet", 4, 8, margin="abc")


@pytest.mark.parametrize("table", [LOSSES, DISTANCE_LOSSES])
def test_every_setting_of_every_loss_has_a_kind(table: dict[str, Any]) -> None:
    from inspect import signature

    for name, factory in table.items():
        for setting in signature(factory).parameters.values():
            if setting.kind is setting.KEYWORD_ONLY:
                chosen = {"avsl": table is DISTANCE_LOSSES, "loss": name}
                record = refused(**chosen, loss_options=((setting.name, object()),))
                assert f"{setting.name} of loss '{name}'" in record


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("beta", "none"), "beta to be a finite number, got 'none'"),
        (("through_mask", "maybe"), "through_mask to be true or false, got 'maybe'"),
        (("share", "x"), "share to be a finite number, got 'x'"),
        (("foo", 1), "options of mining among arch, weights"),
        (("share", 2), "share and masked_scale in (0, 1]"),
        (("arch", "siamese"), "mining over triplets, as set by --mining"),
    ],
)
def test_options_of_mining_are_checked(option: tuple[str, Any], said: str) -> None:
    assert said in refused(**TRIPLET, mining_options=(option,))


def test_mining_without_a_weight_is_a_contradiction() -> None:
    assert "weight above 0 for mining='triplet', got gamma of 0" in refused(**TRIPLET, gamma=0)
    with_options(TrainOptions(), {**TRIPLET, "mining_options": (("arch", "triplet"),)})
    siamese = {"bce": 0.1, "bce_mining": 0.1, "mining_options": (("arch", "siamese"),)}
    options = with_options(TrainOptions(), siamese)
    with_terms = build_objective(build_model(with_options(options, TINY)), options, 4).terms
    assert with_terms["bce_mining"].options.arch == "siamese"


def test_a_layer_that_is_not_there_is_told_before_training() -> None:
    options = with_options(TrainOptions(), {**TINY, **TRIPLET, "mining_options": {"layer": "no"}})
    with pytest.raises(ModelError, match="no layer 'no'"):
        build_objective(build_model(options), options, 4)


def test_what_python_has_for_pairs_and_numbers_is_taken() -> None:
    given = {"loss_options": {"margin": np.float32(0.5)}, "lr": np.float32(1e-3)}
    options = with_options(
        TrainOptions(), {**given, "seed": np.int64(3), "ranks": [1, np.int64(2)]}
    )
    assert options.loss_options == (("margin", 0.5),)
    assert isinstance(options.lr, float)
    assert options.seed == 3
    assert options.ranks == (1, 2)
    assert TrainOptions.from_json(options.to_json()) == options


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for accelerator, what in (("gpu", "1 GPU on"), ("mps", "1 Apple GPU on")):
        with pytest.raises(ModelError, match=f"Expected {what} this host, found none"):
            check_present(TrainOptions(accelerator=accelerator))
    check_present(TrainOptions(accelerator="cpu", devices=4))
    check_present(TrainOptions(accelerator="auto", devices=4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_present(TrainOptions(accelerator="gpu"))
    for accelerator in ("auto", "gpu"):
        with pytest.raises(ModelError, match="Expected 2 GPUs on this host, found 1"):
            check_present(TrainOptions(accelerator=accelerator, devices=2))


# ---------------------------------------------------------------- what changes nothing


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gamma": 0.2}, "gamma=0.2 has no effect without mining (--mining)."),
        ({"mining_start": 2}, "mining_start=2 has no effect without mining"),
        ({"avsl": True, "distance": "cosine"}, "distance=cosine has no effect on AVSL"),
        ({"edges_per_node": 3}, "edges_per_node=3 has no effect without AVSL"),
        ({"mask_side": "outside"}, "mask_side=outside has no effect without --mask-weight"),
        ({"step_epochs": 3}, "step_epochs=3 has no effect on any schedule but step"),
        ({"momentum": 0.5}, "momentum=0.5 has no effect on any optimiser but sgd"),
    ],
)
def test_settings_in_vain_are_told(given: dict[str, Any], said: str) -> None:
    lines = idle_options(TrainOptions(**given), DataSplit((), ()))
    assert len(lines) == 1
    assert said in lines[0]


def test_masks_and_groups_in_vain_are_told(tmp_path: Path) -> None:
    record = Record(tmp_path / "a.png", "a", "camera", tmp_path / "mask.png")
    split = DataSplit((record,), (record,))
    assert idle_options(TrainOptions(), split) == (
        "The masks of the pictures have no effect without --mask-weight.",
        "The groups of the pictures have no effect without --grouped.",
    )
    assert idle_options(TrainOptions(mask_weight=0.1, grouped=True), split) == ()


def test_no_recipe_has_a_setting_in_vain() -> None:
    assert sum(about.unless is not None for _, about in declared(TrainOptions).values()) == 18
    for recipe in RECIPES.values():
        assert idle_options(recipe.options, DataSplit((), ())) == ()


def test_a_run_tells_and_refuses_before_it_writes(tmp_path: Path) -> None:
    data, out = striped(tmp_path / "data", classes=8), tmp_path / "run"
    done = train(data, out=out, **{**TINY, "epochs": 1, "gamma": 0.3})
    assert "gamma=0.3 has no effect without mining (--mining)." in done.warnings
    Image.new("RGB", (5, 900)).save(data / "class07" / "tall.png")
    with pytest.raises(ImageError, match=re.escape("class07/tall.png of 5x900")):
        train(data, out=tmp_path / "other", **TINY)
    with pytest.raises(ModelError, match="to be a finite number"):
        train(data, out=tmp_path / "other", **TINY, loss_options={"margin": "abc"})
    assert not (tmp_path / "other").exists()


def test_a_transformer_is_trained_with_every_kind_of_mining(tmp_path: Path) -> None:
    settings = {**TINY, "backbone": "timm:test_vit", "size": (64, 64), "epochs": 1, **TRIPLET}
    data = striped(tmp_path / "data")
    done = train(data, out=tmp_path / "run", **settings, bce=0.1, bce_mining=0.1)
    assert all(np.isfinite(done.rows[-1][f"loss/{name}"]) for name in ("mining", "bce_mining"))


def test_sizes_without_a_map_are_told_before_training() -> None:
    for size in ((1, 1), (2, 2)):
        record = f"maps over the image, got {size[0]}x{size[1]}; choose a larger"
        with pytest.raises(ModelError, match=record):
            build_model(with_options(TrainOptions(), {**TINY, "size": size}))


def test_pictures_that_an_evaluation_left_out_are_told(tmp_path: Path) -> None:
    data = striped(tmp_path / "data")
    victim = data / "class07" / "0.png"

    def damage(row: dict[str, Any]) -> None:
        victim.write_text("no picture any more")

    listeners = Listeners(epoch=damage)
    done = train(data, out=tmp_path / "run", **{**TINY, "epochs": 1}, listeners=listeners)
    lines = [text for text in done.warnings if "left out" in text]
    assert len(lines) == 1
    assert lines[0].startswith("1 test picture could not be read in an evaluation")
    assert "0.png" in lines[0]
