"""Exported programs (.pt2): the same maps as the network, and no code from a tampered file."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from exported_exploits import renamed
from torch import nn

from simexplain import Comparison, as_similarity_model, explain, load_model
from simexplain.errors import ModelError

pytestmark = pytest.mark.usefixtures("offline")
Program = dict[str, Any]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(2)
    return timm.create_model("resnet18", num_classes=0).eval()


@pytest.fixture(scope="module")
def fixed(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "fixed.pt2"
    torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 64, 64),)), path)
    return path


@pytest.fixture(scope="module")
def dynamic(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "dynamic.pt2"
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (torch.zeros(2, 3, 64, 64),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


@pytest.fixture
def triplet() -> Comparison:
    stack = torch.randn(3, 1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    return Comparison.triplet(*stack)


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_same_maps_as_the_network(
    kind: str, network: nn.Module, triplet: Comparison, request: pytest.FixtureRequest
) -> None:
    model = load_model(request.getfixturevalue(kind))
    assert model.batch_size == (2 if kind == "fixed" else None)
    assert model.preprocess.size == (64, 64)
    assert "ImageNet" in model.preprocess.notes[0]
    # Three images do not divide by the fixed batch of two.
    ours = explain(model, triplet, layer="layer4")
    theirs = explain(as_similarity_model(network), triplet, layer="layer4")
    assert torch.allclose(ours.embeddings, theirs.embeddings, atol=1e-5)
    assert torch.allclose(ours.distances, theirs.distances, atol=1e-5)
    assert theirs.maps.max() > 0
    assert torch.allclose(ours.maps / theirs.maps.max(), theirs.maps / theirs.maps.max(), atol=1e-5)
    assert "layer4" in {layer.name for layer in model.layers}


def test_default_layer_is_that_of_the_network(dynamic: Path, network: nn.Module) -> None:
    own = as_similarity_model(network).layers_for(torch.zeros(1, 3, 64, 64))
    default = next(layer for layer in own if layer.default)
    result = next(layer for layer in load_model(dynamic).layers if layer.default)
    assert (result.name, result.shape, result.stride) == (
        default.name,
        default.shape,
        default.stride,
    )


def test_program_exported_in_training_mode_is_noted(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    path = tmp_path / "training.pt2"
    torch.export.save(torch.export.export(network.train(), (torch.rand(2, 3, 8, 8),)), path)
    assert any("training mode" in note for note in load_model(path).preprocess.notes)


def test_program_that_takes_no_images_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vectors.pt2"
    torch.export.save(torch.export.export(nn.Linear(4, 2), (torch.zeros(1, 4),)), path)
    with pytest.raises(ModelError, match="one batch of images"):
        load_model(path)


def tampered(
    source: Path,
    path: Path,
    change: Callable[[Program], None] | None = None,
    extra: dict[str, bytes] | None = None,
    config: Callable[[Program], None] | None = None,
) -> Path:
    """A copy of a program with its graph, its table of weights or its list of files changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            for suffix, edit in (("models/model.json", change), ("weights_config.json", config)):
                if edit and name.endswith(suffix):
                    record = json.loads(content)
                    edit(record)
                    content = json.dumps(record).encode()
            new.writestr(name, content)
        for name, content in (extra or {}).items():
            new.writestr(f"{source.stem}/{name}", content)
    return path


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    text = str(caught.value)
    assert str(path) in text
    assert "could run code" in text, text
    assert "--trust-pickle" in text
    for word in words:
        assert word in text, text


def nodes(program: Program) -> list[Program]:
    return program["graph_module"]["graph"]["nodes"]


def test_rewriting_alone_changes_nothing(fixed: Path, tmp_path: Path) -> None:
    """The other tests prove something only if an archive rewritten like this one loads."""
    images = torch.rand(2, 3, 64, 64)
    copy = load_model(tampered(fixed, tmp_path / "copy.pt2", lambda _: None))
    assert torch.equal(copy.embed(images), load_model(fixed).embed(images))


def test_pickled_objects_are_refused(fixed: Path, tmp_path: Path) -> None:
    extra = {"data/constants/custom_obj_0": b"cposix\nsystem\n(S'true'\ntR."}
    refused(tampered(fixed, tmp_path / "a.pt2", extra=extra), "custom_obj_0")

    def pickled(record: Program) -> None:
        next(iter(record["config"].values()))["use_pickle"] = True

    refused(tampered(fixed, tmp_path / "b.pt2", config=pickled), "pickled")

    def elsewhere(record: Program) -> None:
        next(iter(record["config"].values()))["path_name"] = "../custom_obj_0"

    refused(tampered(fixed, tmp_path / "c.pt2", config=elsewhere), "custom_obj_0")


@pytest.mark.parametrize("entry", ["data/aotinductor/model/wrapper.so", "other.pt", "models/a.py"])
def test_strange_entries_are_refused(fixed: Path, tmp_path: Path, entry: str) -> None:
    refused(tampered(fixed, tmp_path / "a.pt2", extra={entry: b"x"}), entry)


@pytest.mark.parametrize(
    "target",
    [
        "torch.hub.load",
        "torch.load",
        "torch.os.system",
        "torch.ops.load_library",
        "torch.ops.aten.__class__",
        "#evil",
        "math.exec",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "_operator.call",
        "torch.ops.aten.from_file.default",
        "torch.ops.higher_order.print",
    ],
)
def test_foreign_operators_are_refused(fixed: Path, tmp_path: Path, target: str) -> None:
    def change(program: Program) -> None:
        nodes(program)[0]["target"] = target

    refused(tampered(fixed, tmp_path / "a.pt2", change), target)


def test_foreign_operators_as_arguments_are_refused(fixed: Path, tmp_path: Path) -> None:
    def change(program: Program) -> None:
        nodes(program)[0]["inputs"].append(
            {"name": "", "arg": {"as_operator": "torch.os.system"}, "kind": 1}
        )

    refused(tampered(fixed, tmp_path / "a.pt2", change), "torch.os.system")


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').system('true')",
        "().__class__",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "open('a')",
        "Symbol('a b')",
        "eval('1')",
        "Symbol.mro()",
        "f'{1}'",
    ],
)
def test_expressions_that_could_run_code_are_refused(
    fixed: Path, tmp_path: Path, code: str
) -> None:
    def symbolic(program: Program) -> None:
        values = program["graph_module"]["graph"]["sym_int_values"]
        values["s0"] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}

    refused(tampered(fixed, tmp_path / "a.pt2", symbolic), "expression")

    def guarded(program: Program) -> None:
        program["guards_code"] = [code]

    refused(tampered(fixed, tmp_path / "b.pt2", guarded), "guards")


def test_names_cannot_smuggle_code(fixed: Path, tmp_path: Path) -> None:
    """torch writes the names of inputs into Python source, which it then runs."""
    sprung = tmp_path / "sprung"
    code = f"x=__import__('pathlib').Path({str(sprung)!r}).touch()"

    def change(program: Program) -> None:
        changed = renamed(program, "x", code)
        program.clear()
        program.update(changed)

    path = tampered(fixed, tmp_path / "a.pt2", change)
    try:
        refused(path)
    finally:
        assert not sprung.exists(), "the file's code was run"


def test_no_module_is_imported(
    fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch imports the module of an enumeration that the layout of the inputs mentions."""
    (tmp_path / "beside_the_model.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def change(program: Program) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        spec = json.loads(signature["in_spec"])
        spec[1]["context"] = json.dumps({"__enum__": True, "fqn": "beside_the_model:x"})
        signature["in_spec"] = json.dumps(spec)

    path = tampered(fixed, tmp_path / "a.pt2", change)
    try:
        refused(path)
    finally:
        assert "beside_the_model" not in sys.modules, "the file's module was imported"


def test_an_entry_twice_is_refused(fixed: Path, tmp_path: Path) -> None:
    """Two readers of one archive may disagree on which of two equal names counts."""
    with zipfile.ZipFile(fixed) as archive:
        graph = archive.read("fixed/models/model.json")
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = tampered(fixed, tmp_path / "a.pt2", extra={"models/model.json": graph})
    refused(path, "models/model.json")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_program(fixed: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.pt2"
    content = fixed.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_suffix_does_not_decide(fixed: Path, tmp_path: Path) -> None:
    shutil.copy(fixed, tmp_path / "model.pt")
    assert load_model(tmp_path / "model.pt").batch_size == 2

    def change(program: Program) -> None:
        nodes(program)[0]["target"] = "torch.hub.load"

    refused(tampered(fixed, tmp_path / "evil.pt", change), "torch.hub.load")


def old_layout(path: Path, network: nn.Module, **other: bytes) -> Path:
    """A program as torch up to 2.7 laid it out."""
    from torch._export.serde.schema import SCHEMA_VERSION
    from torch._export.serde.serialize import serialize

    shapes = ({0: torch.export.Dim("batch")},)
    images = torch.zeros(2, 3, 64, 64)
    made = serialize(torch.export.export(network, (images,), dynamic_shapes=shapes))
    parts = {
        "serialized_exported_program.json": made.exported_program,
        "serialized_state_dict.pt": made.state_dict,
        "serialized_constants.pt": made.constants,
        "serialized_example_inputs.pt": made.example_inputs,
        "version": ".".join(map(str, SCHEMA_VERSION)).encode(),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (parts | {f"{key}.pt": value for key, value in other.items()}).items():
            archive.writestr(name, content)
    return path


def test_the_layout_of_older_torch(network: nn.Module, tmp_path: Path) -> None:
    images = torch.rand(3, 3, 64, 64)
    model = load_model(old_layout(tmp_path / "old.pt2", network))
    with torch.no_grad():
        expected = nn.functional.normalize(network(images), dim=1)
    assert torch.allclose(model.embed(images), expected, atol=1e-5)


class Trap:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", ["state_dict", "constants", "example_inputs"])
def test_pickles_in_the_layout_of_older_torch(
    part: str, network: nn.Module, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    torch.save({"x": Trap(tmp_path / "sprung")}, buffer)
    path = old_layout(tmp_path / "old.pt2", network, **{f"serialized_{part}": buffer.getvalue()})
    refused(path, "pickled objects")
    assert not (tmp_path / "sprung").exists()
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert (tmp_path / "sprung").exists(), "torch itself was not taken in"
