"""A network through a file and the command line: the maps must be those of the module itself."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch
from compat_checks import Case
from compat_net import Net
from compat_probes import plain_map, vector
from pictures import noise
from torch import Tensor, nn

from simexplain import Explanation, Preprocess, save_model


class Picked(nn.Module):
    """A program gives one tensor; here the part of a network's answer that is compared."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.network = case.module
        self.net = case.net

    def forward(self, images: Tensor) -> Tensor:
        return vector(self.net, self.network, images)


def written(case: Case, folder: Path) -> list[str]:
    """Writes the network to a file the way the row says; arguments of the command line for it."""
    net = case.net
    height, width = net.size
    if net.route == "save":
        path = folder / "model.pt"
        save_model(case.module, path, preprocess=Preprocess(size=net.size))
        return [str(path)]
    if net.route == "state":
        path = folder / "weights.pth"
        torch.save(case.module.state_dict(), path)
        return [str(path), "--backbone", str(net.backbone), "--size", f"{height}x{width}"]
    assert net.route == "export"
    path = folder / "program.pt2"
    module = case.module if net.output is None else Picked(case)
    torch.export.save(exported(module, case.images[:2]), path)
    return [str(path)]


def exported(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """For any number of images where torch can do that, else for two."""
    batch = torch.export.Dim("batch", min=1, max=64)
    try:
        return torch.export.export(module, (images,), dynamic_shapes=({0: batch},))
    except (ValueError, RuntimeError):  # attention of torch.nn fixes the number
        return torch.export.export(module, (images,))


def check_file(net: Net) -> None:
    """Explains two pictures from the file and compares with plain autograd on the module."""
    case = Case(net)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = written(case, folder)
        pictures = [folder / f"{name}.png" for name in "ab"]
        for seed, path in enumerate(pictures):
            noise(net.size[0] // 4, net.size[1] // 4, seed).resize(net.size[::-1]).save(path)
        command = ["explain", model[0], *map(str, pictures), *model[1:], "--arch", "siamese"]
        started(*command, "--out", str(folder / "out"))
        compare(case, Explanation.load(folder / "out"))


def started(*arguments: str) -> None:
    """The entry point in this process, which spares the import of torch every time."""
    from simexplain_cli.main import main

    before, heard, code = sys.argv, io.StringIO(), None
    sys.argv = ["simexplain", *arguments]
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as stopped:
        code = stopped.code
    finally:
        sys.argv = before
    assert not code, heard.getvalue().strip()


def compare(case: Case, result: Explanation) -> None:
    """The maps of a loaded explanation against plain autograd."""
    net = case.net
    layer = result.layers[0]
    if net.output is not None:
        layer = layer.removeprefix("network").removeprefix(".")  # '' is the whole network
    assert layer in case.right | set(net.also), f"default '{layer}' from the file"
    assert tuple(result.maps.shape[-2:]) == case.grid_of(layer)
    weights = result.weights[0].expand(2, -1)  # one for both images, or one each
    own = torch.stack(
        [
            plain_map(
                net,
                case.module,
                layer,
                case.grid_of(layer),
                result.images[0, n : n + 1],
                weights[n],
            )
            for n in range(2)
        ]
    )
    gap = float((result.maps[0] - own).abs().max() / own.max().clamp(min=1e-12))
    # The score of two noisy pictures cancels nearly, so that rounding in batches of two shows.
    assert gap < 2e-2, f"maps from the file are {gap:.1e} of their maximum off"
