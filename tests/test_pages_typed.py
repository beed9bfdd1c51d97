"""README and quick start as a reader types them: every block and command, in order, in one folder.

No hub is reached. Behind every name of timm and torchvision is a small random network; the names
of Hugging Face lie in the hub's own cache as a download would leave them, so that the commands are
those of the pages to the letter. Left out are blocks marked as not run, and ``pip`` and ``make``.
"""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torchvision
from cli_runs import simexplain as typed
from conftest import DEMO
from hub_cases import written
from person_cases import market
from pictures import noise
from torch import Tensor, nn

from simexplain.models import backbones

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "quick-start.md")
HUB = {"facebook/dinov2-small": "DINOv2", "openai/clip-vit-base-patch32": "CLIP"}
_BLOCK = re.compile(
    r"(?P<skip><!-- not run: .+? -->\n)?```(?P<kind>python|bash)\n(?P<code>.*?)^```$", re.S | re.M
)
_SMALL = {"input_size": (3, 64, 64)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> Path:
    """A fresh folder with the pictures that the pages speak of, and small networks behind names."""
    for letter, role in zip("abcde", ("anchor", "positive", "negative") * 2, strict=False):
        shutil.copy(DEMO / f"{role}.jpg", tmp_path / f"{letter}.jpg")
    shutil.copy(DEMO / "anchor.jpg", tmp_path / "query.jpg")
    shutil.copy(DEMO / "positive.jpg", tmp_path / "test.jpg")
    for kind in range(4):
        for number in range(4):
            for name in ("pictures", "photos"):
                path = tmp_path / name / f"kind{kind}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise(48, 48, seed=10 * kind + number).save(path)
    market(tmp_path / "Market-1501-v15.09.15")
    with (tmp_path / "comparisons.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["anchor", "positive", "negative"], ["a.jpg", "b.jpg", "c.jpg"]]
        )
    written("ViT", tmp_path / "my-folder")
    cache = tmp_path.with_name(f"{tmp_path.name}-hub")
    for name, family in HUB.items():
        at = cache / f"models--{name.replace('/', '--')}"
        written(family, at / "snapshots" / "0123456789abcdef")
        (at / "refs").mkdir()
        (at / "refs" / "main").write_text("0123456789abcdef")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    small_zoos(monkeypatch)
    return tmp_path


def small_zoos(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small random network for every name of timm and torchvision."""
    create = timm.create_model

    def of_timm(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        name = name if name == "resnet18" else "test_resnet.r160_in1k"  # whose width counts
        return create(name, pretrained_cfg_overlay=_SMALL, **options)

    def of_torchvision(*_: object, **__: object) -> nn.Module:
        return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])

    monkeypatch.setattr(timm, "create_model", of_timm)
    # Weights by a plain name are fetched once, which is looked into before.
    monkeypatch.setattr(backbones, "hub_offline_if_unreachable", nullcontext)
    monkeypatch.setitem(backbones.PACKAGED, "tf_efficientnet_lite0", lambda: {"none": Tensor()})
    monkeypatch.setattr(backbones, "_load_in_order", lambda *_, **__: None)
    for name in ("get_model", "resnet18", "resnet50"):
        monkeypatch.setattr(torchvision.models, name, of_torchvision)


def steps(page: Path) -> Iterator[tuple[str, str]]:
    """The Python blocks and ``simexplain`` commands of a page, in order."""
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["skip"]:
            continue
        if block["kind"] == "python":
            yield "python", block["code"]
            continue
        for line in block["code"].replace("\\\n", " ").splitlines():
            if line.startswith("simexplain "):
                yield "command", line


@pytest.mark.slow
def test_pages_run_as_they_are_typed(folder: Path) -> None:
    pytest.importorskip("lightning")
    count, failed = {"python": 0, "command": 0}, []
    for page in PAGES:
        namespace: dict[str, object] = {"__name__": "typed"}
        for kind, text in steps(page):
            count[kind] += 1
            if kind == "python":
                try:
                    exec(compile(text, str(page), "exec"), namespace)
                except Exception as error:  # the others are of use, too
                    failed.append(f"{page.name}: {text}\n{error!r}")
                continue
            done = typed(*shlex.split(text)[1:])
            if done.code:
                failed.append(f"{page.name}: {text}\n{done.err}")
    assert not failed, "\n".join(failed)
    assert count["python"] >= 12
    assert count["command"] >= 35
    for name in ("explanation", "reasons"):
        assert (folder / name / "explanation.png").stat().st_size > 10_000
