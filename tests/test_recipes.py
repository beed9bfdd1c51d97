"""Recipes: every one can be run, every value has a source, the page tells what the table says."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

pytest.importorskip("pytorch_metric_learning")

from simexplain.data.datasets import DATASETS
from simexplain.errors import ModelError
from simexplain.training.building import build_model, build_objective
from simexplain.training.options import TrainOptions
from simexplain.training.recipes import RECIPES, recipe_named, recipe_page

PAGE = Path(__file__).parents[1] / "docs" / "training-recipes.md"
ANCHOR = (("alpha", 16.0), ("positive", 1.8), ("negative", 2.2))
NAMES = {field.name for field in fields(TrainOptions)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.kind in DATASETS
    assert set(recipe.values) <= NAMES
    assert all(source for _, source in recipe.values.values())
    options = recipe_named(name).options
    for setting, (value, _) in recipe.values.items():
        assert getattr(options, setting) == value
    assert TrainOptions.from_json(options.to_json()) == options


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_a_network_and_an_objective(name: str) -> None:
    """On a small network and few classes, since the settings are what is tested."""
    small = replace(
        recipe_named(name).options, backbone="timm:test_resnet", pretrained=False, size=(64, 64),
        embedding=12,
    )  # fmt: skip
    objective = build_objective(build_model(small), small, classes=5)
    assert ("avsl" in objective.terms) == small.avsl
    assert ("mining" in objective.terms) == name.startswith(("sam", "emoji-sam"))


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        # AVSL, section 4.2, and the commands of its official repository.
        ("avsl-proxyanchor-cub", "loss_options", ANCHOR),
        ("avsl-proxyanchor-cub", "lr", 1e-5),
        ("avsl-proxyanchor-cars196", "level_weights", (1.0, 4.0, 4.0)),
        ("avsl-proxyanchor-cars196", "step_epochs", 5),
        ("avsl-proxyanchor-sop", "freeze_bn", False),
        ("avsl-proxyanchor-sop", "step_factor", 0.25),
        ("avsl-margin-cub", "weight_decay", 1e-4),
        ("proxyanchor-cars196", "proxy_lr", 0.01),
        ("proxyanchor-cub", "batch_size", 180),
        ("avsl-margin-cars196", "edges_per_node", 128),
        # Similarity attention, Table 1 and section 4.2.
        ("sam-siamese-cub", "gamma", 0.25),
        ("sam-reid-market1501", "gamma", 0.2),
        ("sam-reid-cuhk03", "epochs", 40),
        ("sam-reid-cuhk03", "optimiser", "adam"),
        # PCB, sections 3.1 and 4.2.
        ("sam-reid-market1501", "backbone", "pcb:timm:resnet50"),
        ("sam-reid-market1501", "size", (384, 128)),
        ("sam-reid-market1501", "embedding", 6 * 256),
        ("pcb-market1501", "mining", "none"),
    ],
)  # fmt: skip
def test_the_papers_values_are_there(name: str, setting: str, value: object) -> None:
    assert getattr(recipe_named(name).options, setting) == value


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ModelError, match="Expected a recipe of avsl-proxyanchor-cub"):
        recipe_named("mine")


def test_the_page_tells_what_the_table_says() -> None:
    """After a change: ``python -m simexplain.training.recipes > ...`` is in the page's own head."""
    assert PAGE.read_text(encoding="utf-8").endswith(recipe_page())
