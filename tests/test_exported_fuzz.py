"""Programs changed at random: each loads as plain tensors and operators, or is refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from canary import watched
from exported_exploits import CONSTANTS, MODEL, WEIGHTS, Archive
from torch import nn

from simexplain import load_model
from simexplain.errors import ModelError

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.usefixtures("offline")

# About 20 seconds and, among the slow tests, about 10 minutes on one core.
EXAMPLES = int(os.environ.get("SIMEXPLAIN_FUZZ_EXAMPLES", "100"))
MANY_EXAMPLES = int(os.environ.get("SIMEXPLAIN_FUZZ_EXAMPLES", "20000"))
_CODE = "__import__('sprung')"
_SPECS = ("in_spec", "out_spec")
TEXTS = (
    _CODE,
    "sprung",
    "sprung.x",
    "sprung:x",
    f"x={_CODE}",
    f"x;{_CODE}",
    f'a")or {_CODE} or("',
    f"eval({_CODE!r})",
    f"Symbol({_CODE!r})",
    f"Add(Integer(1), {_CODE})",
    "().__class__.__mro__[1].__subclasses__()",
    "__class__",
    "__globals__",
    "forward",
    "_modules",
    "torch.os.system",
    "torch.hub.load",
    "torch.ops.load_library",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.relu.overloads",
    "torch.ops.sprung.x.default",
    "torch.classes.sprung.x",
    "_operator.attrgetter",
    "math.__loader__.load_module",
    "#sprung:x",
    "collections.defaultdict",
    "collections.OrderedDict",
    "builtins.dict",
    json.dumps({"__enum__": True, "fqn": "sprung:x", "name": "x"}),
    json.dumps({"__enum__": True, "fqn": "sprung:x", "name": "x"}).replace("_", "\\u005f"),
    '["a", "b"]',
    "../../sprung",
    "/etc/passwd",
    "custom_obj_0",
    "opaque_obj_0",
    "weight_0",
    "tensor_0",
    "privateuseone",
    "L__self__,,sprung;x,a.b,sprung.C",
    "9**9**9**9",
    "u999999999",
    "Infinity",
    "",
    "\x00",
    "\ud800",
    "lambda",
)
NUMBERS = (-1, 0, 1, 2, 7, 77, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308)
KEYS = (
    "as_operator",
    "as_custom_obj",
    "as_graph",
    "as_string",
    "as_expr",
    "expr_str",
    "use_pickle",
    "path_name",
    "custom_obj",
    "token",
    "target",
    "in_spec",
    "metadata",
    "guards_code",
    "source_fn_stack",
    "custom",
    "__class__",
    "sprung",
)


class Branches(nn.Module):
    """As many kinds of JSON as fit in a few nodes: dictionaries, constants, graphs in graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.table = torch.rand(4, 1, 1)

    def forward(self, images: torch.Tensor, flag: bool = True) -> Any:
        with torch.no_grad():
            mean = images.mean()
        maps = self.norm(self.conv(images - mean)) * self.table
        rows = maps.reshape(maps.shape[0], 4, -1).mean(2)
        return {"rows": rows, "more": [rows + 1, (rows * 2,)]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Archive]]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "sprung.py").write_text("x = list\n", encoding="utf-8")
    shapes = {"images": {0: torch.export.Dim("batch", max=64)}, "flag": None}
    images = torch.rand(2, 3, 8, 8)
    program = torch.export.export(Branches().eval(), (images, True), dynamic_shapes=shapes)
    torch.export.save(program, folder / "plain.pt2")
    source = Archive.of(folder / "plain.pt2")
    # So that what Python and torch import on first use is there, on failure too.
    "\x1b".encode("unicode_escape")
    load_model(folder / "plain.pt2")
    load_model(source.write(folder / "changed.pt2"))
    harmless = deepcopy(source)
    harmless.graph["nodes"][0]["inputs"] = []
    refused(harmless.write(folder / "changed.pt2"))
    sys.path.insert(0, str(folder))
    yield folder / "changed.pt2", source
    sys.path.remove(str(folder))


def refused(path: Path) -> bool:
    """Whether a file is refused, which takes one line; anything but a refusal is raised."""
    try:
        load_model(path)
    except ModelError as error:
        return "\n" not in str(error) or pytest.fail(f"several lines: {error}")
    return False


def opened(content: Any) -> Any:
    """The JSON with the JSON inside its texts opened as well, so that it is changed too."""
    if isinstance(content, dict):
        return {
            key: {"opened": opened(json.loads(value))}
            if key in (*_SPECS, "context") and isinstance(value, str)
            else opened(value)
            for key, value in content.items()
        }
    return [opened(value) for value in content] if isinstance(content, list) else content


def closed(content: Any, escape: bool) -> Any:
    """The counterpart of :func:`opened`; underscores and letters may be written as escapes."""
    if isinstance(content, dict) and set(content) == {"opened"}:
        text = json.dumps(closed(content["opened"], escape))
        return text.replace("_", "\\u005f").replace("enum", "\\u0065num") if escape else text
    if isinstance(content, dict):
        return {key: closed(value, escape) for key, value in content.items()}
    return [closed(value, escape) for value in content] if isinstance(content, list) else content


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys or positions."""
    result: list[tuple[Any, Any]] = []
    stack = [content]
    while stack:
        one = stack.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        result += [(one, key) for key in keys]
        stack += [one[key] for key in keys if isinstance(one[key], (dict, list))]
    return result


def deep(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"as_graph": {"name": "x", "graph": {"nodes": [value]}}}
    return value


def change(data: st.DataObject, content: Any) -> None:
    spots = places(content)
    if not spots:
        return  # an earlier change took everything away
    # Rare kinds of places are as likely as common ones.
    kinds = sorted({str(key) if isinstance(key, str) else "#" for _, key in spots})
    kind = data.draw(st.sampled_from(kinds))
    alike = [(one, key) for one, key in spots if (key if isinstance(key, str) else "#") == kind]
    where, key = data.draw(st.sampled_from(alike))
    others = st.sampled_from(spots).map(lambda spot: deepcopy(spot[0][spot[1]]))
    value = data.draw(
        st.one_of(
            st.sampled_from(TEXTS),
            st.sampled_from(TEXTS),
            st.sampled_from(NUMBERS),
            st.text(max_size=20),
            st.booleans(),
            st.none(),
            st.just([]),
            st.just({}),
            st.integers(1, 60).map(deep),
            others,
        )
    )
    action = data.draw(st.sampled_from(("set", "set", "set", "add", "rename", "drop", "append")))
    if action == "set" or (isinstance(where, list) and action != "append"):
        where[key] = value
    elif isinstance(where, list):
        where.append(value)
    elif action == "drop":
        del where[key]
    elif action == "rename":
        where[data.draw(st.sampled_from((*KEYS, *TEXTS)))] = where.pop(key)
    else:
        where[data.draw(st.sampled_from(KEYS))] = value


def check(plain: tuple[Path, Archive], data: st.DataObject) -> None:
    path, source = plain
    archive = Archive(deepcopy(source.parts), dict(source.entries))
    name = data.draw(st.sampled_from((MODEL, MODEL, MODEL, MODEL, WEIGHTS, CONSTANTS)))
    content = opened(archive.parts[name])
    for _ in range(data.draw(st.integers(1, 3))):
        change(data, content)
    archive.parts[name] = closed(content, data.draw(st.booleans()))
    archive.write(path)
    before = set(sys.modules)
    with watched() as events:
        refused(path)
    assert not events
    assert set(sys.modules) == before


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_changed_programs(plain: tuple[Path, Archive], data: st.DataObject) -> None:
    check(plain, data)


@pytest.mark.slow
@settings(
    max_examples=MANY_EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_many_changed_programs(plain: tuple[Path, Archive], data: st.DataObject) -> None:
    check(plain, data)


def test_opening_and_closing_change_nothing(plain: tuple[Path, Archive]) -> None:
    _, source = plain
    for escape in (False, True):
        content = closed(opened(source.parts[MODEL]), escape)
        spec = content["graph_module"]["module_call_graph"][0]["signature"]["in_spec"]
        own = source.signature["in_spec"]
        assert json.loads(spec) == json.loads(own)
        assert ("_" in spec) != escape


@pytest.mark.parametrize("share", range(0, 100, 5))
@pytest.mark.parametrize("bits", [0x01, 0x80, 0xFF])
def test_one_changed_byte(plain: tuple[Path, Archive], share: int, bits: int) -> None:
    path, source = plain
    content = bytearray(source.write(path).read_bytes())
    content[len(content) * share // 100] ^= bits
    path.write_bytes(content)
    with watched() as events:
        refused(path)
    assert not events
