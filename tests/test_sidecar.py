"""What a model file cannot say of itself: options, a JSON file beside it, and saving any module."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import Run
from conftest import SharedNet, TinyNet, refusal
from pictures import noise
from torch import Tensor, nn

from simexplain import Preprocess, as_similarity_model, explain, load_model, save_model
from simexplain.errors import ModelError, OutputError
from simexplain.models.loading import Pixels, load_pair_model

SIZE = (24, 32)
OWN = Preprocess(SIZE, "squash", 1.0, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "own training")


@pytest.fixture
def program(tmp_path: Path, tiny: nn.Module) -> Path:
    """An exported program, as anybody writes it."""
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(
        tiny, (torch.rand(2, 3, *SIZE),), dynamic_shapes=({0: batch},), strict=False
    )
    torch.export.save(exported, tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def by_hand(picture: np.ndarray, mean: list[float], std: list[float]) -> Tensor:
    """A picture of the input's own size, normalised without any library."""
    values = (picture.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)


def test_values_of_the_caller(program: Path) -> None:
    picture = noise(*SIZE)
    before = load_model(program).preprocess
    assert any("does not say how pictures are prepared" in note for note in before.notes)
    pixels = Pixels(mean=(0.5,), std=(0.25, 0.5, 1.0), interpolation="bicubic")
    prepare = load_model(program, pixels=pixels, fit="squash").preprocess
    wanted = by_hand(np.asarray(picture), [0.5] * 3, [0.25, 0.5, 1.0])
    assert torch.allclose(prepare(picture)[0], wanted, atol=1e-6)
    assert prepare.interpolation == "bicubic"
    assert not any("does not say" in note for note in prepare.notes)
    half = load_model(program, pixels=Pixels(mean=(0.5,))).preprocess
    assert any("does not say" in note for note in half.notes)
    assert load_model(program, pixels=Pixels(channels=3)).preprocess == before


def test_values_on_the_command_line(program: Path, run: Callable[..., Run]) -> None:
    line = ("explain", program, "a.png", "b.jpg", "--arch", "siamese", "--json", "--fit", "squash")
    plain = json.loads(run(*line, "--out", "plain").out)
    given = ("--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6", "--interpolation", "bicubic")
    done = run(*line, "--out", "given", *given, "--channels", "3")
    assert done.code == 0, done.err
    lines = json.loads(done.out)
    prepare = Preprocess(SIZE, "squash", 1.0, "bicubic", OWN.mean, OWN.std)
    model = as_similarity_model(load_model(program).network, preprocess=prepare)
    wanted = explain(model, ["a.png", "b.jpg"], arch="siamese").distances[0, 0]
    assert lines["distances"] == pytest.approx([float(wanted)], abs=1e-6)
    assert lines["distances"] != pytest.approx(plain["distances"], abs=1e-4)


def test_wrong_values_give_one_sentence(program: Path, fails: Callable[..., str]) -> None:
    assert "one number or 3 for mean, got 2" in fails("layers", program, "--mean", "0.5,0.5")
    assert "above 0 for std" in fails("layers", program, "--std", "0.5,0,0.5")
    assert "channels" in fails("layers", program, "--channels", "40000")
    for value in ("a", "", "0.5,,1", "nan", "inf"):
        assert "0.485,0.456,0.406" in fails("layers", program, "--mean", value, code=2)
    assert "bicubic" in fails("layers", program, "--interpolation", "cubic", code=2)
    assert "patch_mean" in fails("layers", program, "--output", "mean", code=2)
    fails("layers", program, "--channels", "0", code=2)
    record = fails("layers", program, "--channels", "1", "--mean", "0.5", "--std", "0.5")
    assert "Expected images of 3 channels, as the exported program takes, got 1" in record


@pytest.mark.parametrize("written", ["options", "beside"])
def test_values_of_a_pickled_module(written: str, tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    path = tmp_path / "net.pt"
    torch.save(network, path)
    pixels = Pixels()
    if written == "options":
        pixels = Pixels(mean=(0.5,), std=(0.25,), interpolation="bicubic", channels=1)
    else:
        values = {"mean": [0.5], "std": [0.25], "interpolation": "bicubic", "fit": "squash"}
        path.with_name("net.pt.json").write_text(json.dumps({"preprocess": values}))
    model = load_model(path, trust_pickle=True, size=SIZE, fit="squash", pixels=pixels)
    picture = noise(*SIZE).convert("L")
    wanted = torch.from_numpy((np.asarray(picture, dtype=np.float32) / 255 - 0.5) / 0.25)
    assert torch.allclose(model.preprocess(picture)[0], wanted[None], atol=1e-6)
    assert model.preprocess.interpolation == "bicubic"
    assert not any("does not say" in note for note in model.preprocess.notes)
    with pytest.raises(ModelError, match="of 1 channel, as the first convolution"):
        load_model(path, trust_pickle=True, size=SIZE, pixels=Pixels(channels=3)).layers  # noqa: B018


def test_a_json_file_beside_the_model(program: Path, run: Callable[..., Run]) -> None:
    beside = program.with_name("net.pt2.json")
    beside.write_text(
        json.dumps(
            {
                "preprocess": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "fit": "squash"},
                "distance": "cosine",
                "layers": {"default": "norm", "stages": ["norm", "body"]},
            }
        )
    )
    model = load_model(program)
    assert (model.preprocess.mean, model.preprocess.std) == (OWN.mean, OWN.std)
    assert model.preprocess.size == SIZE
    assert model.preprocess.notes == ()
    assert model.distance_name == "cosine"
    assert model.default_layer == "norm"
    assert set(model.stages) == {"norm", "body"}
    assert load_model(program, distance="squared").distance_name == "squared"
    assert load_model(program, pixels=Pixels(mean=(0.0,))).preprocess.mean == (0.0,) * 3
    listed = run("layers", program).out.splitlines()
    assert [row.split()[1] for row in listed if row.startswith("*")] == ["norm"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"preprocess": ', "cannot be read as JSON"),
        ({"preprocess": {"means": [0.5]}}, "unknown key 'means'"),
        ({"preprocess": {}, "distnace": "cosine"}, "unknown key 'distnace'"),
        ({"preprocess": []}, "preprocess"),
        ({"preprocess": {"std": [0.5, 0, 0.5]}}, "std"),
        ({"preprocess": {"mean": ["a"]}}, "mean"),
        ({"preprocess": {"mean": [True, 1, 1]}}, "mean"),
        ({"preprocess": {"std": [float("nan")] * 3}}, "std"),
        ({"preprocess": {"size": 224}}, "size"),
        ({"preprocess": {"size": [0, 224]}}, "size"),
        ({"preprocess": {"fit": "zoom"}}, "crop, squash, pad"),
        ({"preprocess": {"interpolation": "cubic"}}, "bicubic"),
        ({"preprocess": {"interpolation": 3}}, "interpolation"),
        ({"preprocess": {"crop_fraction": "a"}}, "crop_fraction"),
        ({"preprocess": {"crop_fraction": 0}}, "crop_fraction"),
        ({"preprocess": {"notes": "a"}}, "notes"),
        ({"distance": "far"}, "euclidean"),
        ({"output": 1.5}, "output"),
        ({"layers": "norm"}, "layers"),
        ({"simexplain": 7}, "schema"),
    ],
)
def test_a_wrong_file_beside_the_model(program: Path, content: object, part: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    program.with_name("net.pt2.json").write_text(text)
    record = refusal(program)
    assert part in record
    assert "net.pt2.json" in record or part in ("crop, squash, pad", "bicubic", "crop_fraction")


def test_a_foreign_json_file_is_left_alone(program: Path) -> None:
    for text in ('{"loss": [1, 2]}', "[1, 2]", "{}"):
        program.with_name("net.pt2.json").write_text(text)
        assert load_model(program).distance_name == "euclidean"


class Dictionary(nn.Module):
    """Returns more than the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = TinyNet()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        result = self.trunk(images)
        return {"features": result * result, "embedding": result}


class Odd(nn.Module):
    """A buffer, tied weights, one parameter in two places, and control flow on sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = TinyNet()
        wide = self.trunk(torch.zeros(1, 3, 32, 32)).shape[1]
        self.first, self.second = nn.Linear(wide, wide), nn.Linear(wide, wide)
        self.second.weight = self.first.weight
        self.inner = nn.ModuleList([self.first])
        self.register_buffer("middle", torch.rand(wide))
        self.register_buffer("left_out", torch.rand(wide), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[-1] > 100:
            images = nn.functional.avg_pool2d(images, 2)
        result = self.trunk(images) - self.middle + self.left_out
        return result, self.second(self.inner[0](result))


CASES = {
    "odd": (lambda: Odd(), 1),
    "half": (lambda: TinyNet().bfloat16(), None),
    "double": (lambda: TinyNet().double(), None),
    "channels last": (lambda: TinyNet().to(memory_format=torch.channels_last), None),
    "frozen": (lambda: TinyNet().requires_grad_(False), None),
    "plain": (lambda: TinyNet(), None),
    "shared": (lambda: SharedNet(), None),
    "key": (lambda: Dictionary(), "embedding"),
    "function": (lambda: Dictionary(), lambda result: result["features"] + 1),
    "pooled maps": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1), nn.AdaptiveAvgPool2d(1)
        ),
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_any_module_is_saved_with_what_it_needs(
    case: str, tmp_path: Path, run: Callable[..., Run]
) -> None:
    build, output = CASES[case]
    network = build().train()
    modes = [module.training for module in network.modules()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    first = as_similarity_model(network, output=output, preprocess=OWN, distance="cosine")
    torch.manual_seed(5)
    random = torch.get_rng_state()
    save_model(first, tmp_path / "net.pt2")
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert "forward" not in vars(network)
    again = load_model(tmp_path / "net.pt2")
    network.eval()
    images = torch.rand(5, 3, *SIZE)
    with torch.no_grad():
        for count in (1, 2, 5):
            wanted = first.vectors(images[:count])
            assert torch.allclose(again.vectors(images[:count]), wanted, atol=1e-5)
    assert again.preprocess == OWN
    assert again.distance_name == "cosine"
    assert again.default_layer == first.default_layer
    assert again.stages == first.stages
    assert again.batch_size is None
    done = run("explain", tmp_path / "net.pt2", "a.png", "b.jpg", "--arch", "siamese")
    assert done.code == 0, done.err
    names = {path.name for path in tmp_path.glob("net*")}
    assert names == {"net.pt2", "net.pt2.json"}


def test_what_a_bare_module_is_given_is_saved(tmp_path: Path, tiny: nn.Module) -> None:
    save_model(tiny, tmp_path / "net.pt2", preprocess=OWN, distance="squared")
    again = load_model(tmp_path / "net.pt2")
    assert again.preprocess == OWN
    assert again.distance_name == "squared"
    model = as_similarity_model(tiny)
    save_model(model, tmp_path / "other.pt2", preprocess=OWN)
    assert load_model(tmp_path / "other.pt2").preprocess == OWN
    assert model.preprocess != OWN


class Both(nn.Module):
    """Takes two images and gives their score."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = TinyNet()

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return (self.trunk(one) * self.trunk(two)).sum(dim=1)


def test_a_module_of_two_images_is_saved(tmp_path: Path, run: Callable[..., Run]) -> None:
    network = Both().train()
    save_model(network, tmp_path / "pair.pt2", preprocess=OWN)
    assert network.trunk.training
    network.eval()
    again = load_pair_model(tmp_path / "pair.pt2")
    assert (again.first.preprocess, again.second.preprocess) == (OWN, OWN)
    one, two = torch.rand(2, 5, 3, *SIZE)
    with torch.no_grad():
        for count in (1, 2, 5):
            wanted = network(one[:count], two[:count])
            assert torch.allclose(again.score(one[:count], two[:count]), wanted, atol=1e-5)
    line = ("explain", tmp_path / "pair.pt2", "a.png", "b.jpg", "--no-check")
    done = run(*line, "--method", "occlusion")
    assert done.code == 0, done.err


def test_a_network_without_layers_to_draw_is_saved(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE[0] * SIZE[1], 4)).eval()
    save_model(network, tmp_path / "net.pt2", preprocess=OWN)
    again = load_model(tmp_path / "net.pt2")
    images = torch.rand(3, 3, *SIZE)
    with torch.no_grad():
        assert torch.allclose(again.vectors(images), network(images), atol=1e-5)
    assert again.preprocess == OWN


def test_what_cannot_be_saved_for_another_reason_gets_no_advice_on_exporting(
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError) as caught:
        save_model(Odd(), tmp_path / "net.pt2", preprocess=OWN)
    assert "pick the embedding with output=" in str(caught.value)
    assert "control flow" not in str(caught.value)
    assert not list(tmp_path.glob("net*"))


class Branching(nn.Module):
    """Control flow on values cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = TinyNet()

    def forward(self, images: Tensor) -> Tensor:
        result = self.trunk(images)
        return result if result.sum() > 0 else -result


def test_what_cannot_be_exported_says_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], program: Path
) -> None:
    network = Branching()
    with pytest.raises(ModelError, match="cannot be written as an exported program") as caught:
        save_model(network, tmp_path / "net.pt2")
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert "as_similarity_model" in text
    assert "data-dependent" in text
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert network.training
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & {"net.pt2.json"}
    with pytest.raises(ModelError, match="copy its file"):
        save_model(load_model(program), tmp_path / "copy.pt2")


def test_saving_a_program_loses_nothing(tmp_path: Path, tiny: nn.Module) -> None:
    (tmp_path / "net.pt2.json").mkdir()
    (tmp_path / "net.pt2").write_text("precious")
    with pytest.raises(OutputError, match="is a folder"):
        save_model(as_similarity_model(tiny, preprocess=OWN), tmp_path / "net.pt2")
    assert (tmp_path / "net.pt2").read_text() == "precious"
    with pytest.raises(OutputError, match="cannot be written"):
        save_model(as_similarity_model(tiny, preprocess=OWN), tmp_path / "missing" / "net.pt2")
    assert len(list(tmp_path.iterdir())) == 2
