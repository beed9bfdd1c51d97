"""Bad input on the command line: one clear line, the right exit code, nothing written or lost."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from cli_runs import FAST, NETWORK, Run, interrupted, process
from conftest import TinyNet
from PIL import Image

from simexplain.data.folders import pictures_in, read_item
from simexplain.data.images import read_picture
from simexplain.errors import ImageError

PAIR = ("--arch", "siamese")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("none.jpg", "no file"),
        ("nothing", "found none"),
        ("text.jpg", "not a picture"),
        ("empty.png", "not a picture"),
        ("cut.jpg", "cut off"),
        ("strip.png", "elongated"),
    ],
)
def test_bad_pictures(fails: Callable[..., str], here: Path, bad: str, said: str) -> None:
    (here / "nothing").mkdir()
    for order in (("a.png", bad), (bad, "a.png")):
        text = fails("explain", NETWORK, *order, *PAIR, *FAST, "--out", "out", "--json")
        assert said in text
        assert bad in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", NETWORK, "", "a.png"),
        ("explain", NETWORK, "a.png", "", "b.jpg"),
        ("compare", NETWORK, "a.png", ""),
        ("match", NETWORK, "a.png", ""),
        ("attribute", "avsl.pt", "", "a.png"),
        ("segment", NETWORK, "a.png", ""),
        ("segment", NETWORK, "a.png", "b.jpg", "--other", ""),
        ("search", NETWORK, "", "."),
        ("search", NETWORK, "a.png", ""),
        ("index", NETWORK, "", "--out", "x"),
        ("batch", NETWORK, "", "--out", "x"),
        ("bank", NETWORK, "", "--out", "x"),
        ("fit", NETWORK, "", "--out", "x"),
        ("train", "", "--out", "x"),
        ("evaluate", "retrieval", NETWORK, ""),
    ],
    ids=" ".join,
)
def test_an_empty_name_is_not_this_folder(
    fails: Callable[..., str], arguments: tuple[str, ...]
) -> None:
    assert "got an empty name" in fails(*arguments, code=2)


@pytest.mark.parametrize("read", [lambda: read_item("", pages=False), lambda: read_picture(""),
                                  lambda: pictures_in("", labelled=False)])  # fmt: skip
def test_an_empty_name_in_python(here: Path, read: Callable[[], object]) -> None:
    with pytest.raises(ImageError, match="got an empty name"):
        read()


@pytest.mark.parametrize(
    ("arch", "count", "options", "said"),
    [
        ("siamese", 3, (), "2 images for siamese"),
        ("triplet", 2, (), "3 images for triplet"),
        ("triplet", 4, (), "3 images for triplet"),
        ("quadruplet", 3, (), "4 images for quadruplet"),
        ("quadruplet", 5, (), "4 images for quadruplet"),
        ("set", 3, ("--positives", "3"), "positive"),
        ("set", 3, ("--positives", "-1"), "positive"),
        ("triplet", 3, ("--negative",), "siamese"),
    ],
)
def test_wrong_number_of_images(
    fails: Callable[..., str], arch: str, count: int, options: tuple[str, ...], said: str
) -> None:
    text = fails("explain", NETWORK, *["a.png"] * count, "--arch", arch, *options, *FAST)
    assert said in text
    assert "got" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layer", "layer9"), "did you mean layer"),
        (("--layer", "fc"), "layer"),
        (("--layer", "layer4", "--layer", "layer4"), "different layers"),
        (("--upscale", "0"), "upscale"),
        (("--upscale", "nan"), "upscale"),
        (("--cam", "grad_cam", "--cam", "layer_cam"), "cam"),
        (("--out", "a.png"), "is a file"),
        (("--out", "a.png/below"), "cannot be written"),
    ],
)
def test_bad_values(fails: Callable[..., str], options: tuple[str, ...], said: str) -> None:
    assert said in fails("explain", NETWORK, "a.png", "b.jpg", *PAIR, *FAST, *options)


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", NETWORK, "a.png", "b.jpg", "--arch", "pentuplet"),
        ("explain", NETWORK, "a.png", *PAIR),
        ("explain", NETWORK, "a.png", "b.jpg", *PAIR, "--method", "none"),
        ("explain", NETWORK, "a.png", "b.jpg", *PAIR, "--size", "0"),
        ("explain", NETWORK, "a.png", "b.jpg", *PAIR, "--size", "1x2x3"),
        ("explain", NETWORK, "a.png", "b.jpg", *PAIR, "--no-such-option"),
        ("explain", NETWORK, "a.png", "b.jpg", *PAIR, "--positives", "many"),
        ("layers",),
        ("no-such-command",),
    ],
    ids=lambda arguments: " ".join(arguments[-2:]),
)
def test_usage_errors(fails: Callable[..., str], arguments: tuple[str, ...]) -> None:
    text = fails(*arguments, code=2)
    assert "Usage" in text
    assert "Error" in text


def test_bad_model_files(fails: Callable[..., str], here: Path) -> None:
    torch.save(timm.create_model("resnet34", num_classes=0).state_dict(), here / "other.pt")
    torch.save(TinyNet(), here / "whole.pt")
    (here / "text.pt").write_text("no model", encoding="utf-8")
    (here / "empty.pt").touch()
    (here / "net.onnx").write_bytes(b"\x08\x07")
    for source, options, record in (
        ("other.pt", ("--backbone", "timm:resnet18"), "unexpected (layer1.2.conv1.weight"),
        ("other.pt", (), "--backbone"),
        ("whole.pt", (), "--trust-pickle"),
        ("text.pt", (), "text.pt"),
        ("empty.pt", (), "empty.pt"),
        ("net.onnx", (), "ONNX"),
        ("none.pt", (), "does not exist"),
        ("timm:resnet81", ("--untrained",), "resnet81"),
    ):
        assert record in fails("explain", source, "a.png", "b.jpg", *PAIR, *options)
        assert record in fails("layers", source, *options)


def test_program_that_torch_cannot_read(fails: Callable[..., str], here: Path) -> None:
    """What torch logs about it, with a traceback, is no business of the user's."""
    program = torch.export.export(TinyNet().eval(), (torch.zeros(1, 3, 16, 16),))
    torch.export.save(program, here / "good.pt2")
    with zipfile.ZipFile(here / "good.pt2") as old, zipfile.ZipFile("cut.pt2", "w") as new:
        for name in old.namelist():
            if not name.endswith("weights/weight_0"):
                new.writestr(name, old.read(name))
    assert "cut.pt2" in fails("layers", "cut.pt2")


def test_unforeseen_errors_are_one_line(
    run: Callable[..., Run], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("simexplain_cli.explain.explain", broken)
    result = run("explain", NETWORK, "a.png", "b.jpg", *PAIR, *FAST)
    assert (result.code, result.out) == (1, "")
    assert "ZeroDivisionError: first line second line" in result.err
    assert result.err.count("\n") == 1
    monkeypatch.setenv("SIMEXPLAIN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("explain", NETWORK, "a.png", "b.jpg", *PAIR, *FAST)


def test_existing_results(run: Callable[..., Run], fails: Callable[..., str], here: Path) -> None:
    def arguments(count: int, *more: str) -> tuple[str, ...]:
        pictures = ["a.png"] * count
        return "explain", NETWORK, *pictures, "--arch", "set", *FAST, "--out", "out", *more

    assert run(*arguments(5)).code == 0
    (here / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    text = fails(*arguments(2))
    assert "is there already" in text
    assert "--force" in text
    # A bad picture loses nothing of what is there, even with --force.
    fails(*arguments(2, "--force")[:3], "none.png", "--arch", "siamese", "--out", "out", "--force")
    assert run(*arguments(2, "--force")).code == 0
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "explanation.json", "explanation.png",
        "heatmap_0_anchor.png", "heatmap_0_anchor_row2_focus.png",
        "heatmap_1_positive.png", "heatmap_1_positive_row2_focus.png",
        "maps.npz", "mine.txt",
    ]  # fmt: skip


def test_in_a_process_of_its_own(here: Path) -> None:
    before = sorted(here.rglob("*"))
    out = ("--out", "deep/out", "--json")
    bad = process("explain", NETWORK, "cut.jpg", "a.png", *PAIR, *FAST, *out, cwd=here)
    assert (bad.code, bad.out, bad.err.count("\n")) == (1, "", 1)
    usage = process("explain", NETWORK, "a.png", "a.png", "--arch", "x", cwd=here, script=True)
    assert (usage.code, usage.out) == (2, "")
    assert sorted(here.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("seconds", [2.0, 5.0])
def test_interrupt(here: Path, seconds: float) -> None:
    before = sorted(here.rglob("*"))
    # Enlarged so much, it runs far longer than it is given.
    done = interrupted(
        "explain", NETWORK, "a.png", "b.jpg", *PAIR, "--untrained", "--size", "224",
        "--upscale", "12", "--out", "out", cwd=here, seconds=seconds,
    )  # fmt: skip
    assert (done.code, done.out) == (130, "")
    assert done.err.strip() == "Error: Interrupted; nothing was written."
    assert sorted(here.rglob("*")) == before


def test_the_largest_picture_is_an_option(
    fails: Callable[..., str], run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, command = Image.MAX_IMAGE_PIXELS, ("explain", NETWORK, "a.png", "b.jpg", *FAST)
    monkeypatch.setenv("SIMEXPLAIN_MAX_MEGAPIXELS", "0.002")  # the pictures have 2,400 pixels
    text = fails(*command)
    assert "has more than 0.002 million pixels" in text
    assert "SIMEXPLAIN_MAX_MEGAPIXELS" in text
    monkeypatch.setenv("SIMEXPLAIN_MAX_MEGAPIXELS", "0.0025")
    assert run(*command, "--no-check").code == 0
    for value in ("0", "many", "-1", "nan", "1e9"):
        monkeypatch.setenv("SIMEXPLAIN_MAX_MEGAPIXELS", value)
        assert "to be a number of megapixels" in fails(*command, code=2)
    assert before == Image.MAX_IMAGE_PIXELS
