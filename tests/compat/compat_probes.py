"""What is true of a network, found with plain hooks and plain autograd, without simexplain."""

from __future__ import annotations

from typing import Any

import torch
from compat_net import Grid, Net
from torch import Tensor, nn
from torch.nn import functional as F

LATTICE = 4


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside DataParallel and torch.compile."""
    while True:
        if isinstance(module, nn.DataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def pictures(net: Net, count: int = 3) -> Tensor:
    """Smooth random images ``(count,C,H,W)``: coarse noise enlarged, and some fine noise."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(count, net.channels, 5, 5, generator=generator)
    fine = torch.randn(count, net.channels, *net.size, generator=generator)
    return F.interpolate(coarse, size=net.size, mode="bilinear", align_corners=False) + 0.3 * fine


def ready(net: Net, *, plain: bool = False) -> nn.Module:
    """The network of a row, seeded, in eval mode, its batch norms settled."""
    torch.manual_seed(0)
    build = net.plain if plain and net.plain is not None else net.build
    module = build()
    training = module.training
    module.eval()
    if net.spread:
        spread(module)
    if not net.refused:
        settle(unwrapped(module), pictures(net, 6), net)
    return module.train(training) if net.trains else module


def spread(module: nn.Module) -> None:
    """Draws the weights of linear layers and convolutions so that signals keep their size."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def settle(module: nn.Module, images: Tensor, net: Net) -> None:
    """Gives batch norms the statistics of some images, as training would.

    With those that they start with, signals of a deep random network fade or explode until only
    rounding is left.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.running_var is not None and m.running_var.dtype == torch.float]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    if norms:
        with torch.no_grad():
            vector(net, module, images)
    for norm in norms:
        norm.momentum, norm.training = 0.1, False


def first(output: Any) -> Tensor | None:
    """The tensor of an output, or the first of a sequence or of a model's answer."""
    while not isinstance(output, Tensor):
        if hasattr(output, "to_tuple"):
            output = output.to_tuple()
        if not isinstance(output, (tuple, list)) or not output:
            return None
        output = output[0]
    return output


def vector(net: Net, module: nn.Module, images: Tensor) -> Tensor:
    """What the network gives for images: ``(M,E)``, in single precision at least."""
    reference = next((p for p in module.parameters() if p.is_floating_point()), images)
    answer = (net.forward or nn.Module.__call__)(module, images.to(reference.dtype))
    if callable(net.output):
        answer = net.output(answer)
    elif isinstance(net.output, int):
        answer = answer[net.output]
    elif isinstance(net.output, str):
        answer = answer[net.output] if isinstance(answer, dict) else getattr(answer, net.output)
    result: Tensor = answer.flatten(1)
    return result if result.dtype == torch.float64 else result.float()


def outputs(net: Net, module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Every module's output, by name ('' is the whole), with ``@n`` where it runs several times."""
    calls: list[tuple[str, Tensor]] = []
    handles = []
    for name, part in module.named_modules():

        def keep(_m: nn.Module, _a: Any, output: Any, name: str = name) -> None:
            result = first(output)
            if result is not None:
                calls.append((name, result.detach().clone()))

        handles.append(part.register_forward_hook(keep))
    try:
        with torch.no_grad():
            vector(net, module, images)
    finally:
        for handle in handles:
            handle.remove()
    result: dict[str, list[Tensor]] = {}
    for name, tensor in calls:
        result.setdefault(name, []).append(tensor)
    flat = {name: runs[0] for name, runs in result.items() if len(runs) == 1}
    for name, runs in result.items():
        if len(runs) > 1:
            flat.update({f"{name}@{n}": run for n, run in enumerate(runs)})
    return flat


def as_grid(net: Net, output: Tensor, grid: Grid) -> Tensor | None:
    """An output as ``(M,C,h,w)`` for a grid that is known by hand; None where it does not fit."""
    h, w = grid
    if output.dim() == 4:
        if tuple(output.shape[2:]) == grid and not (
            tuple(output.shape[1:3]) == grid and output.shape[3] > output.shape[1]
        ):
            if net.order is None:
                return output
            return output.flatten(2)[:, :, net.order(grid)].view_as(output)
        return output.permute(0, 3, 1, 2) if tuple(output.shape[1:3]) == grid else None
    if output.dim() != 3:
        return None
    for prefix in {net.prefix, 0}:
        if output.shape[1] == h * w + prefix:
            tokens = output[:, prefix:]
        elif output.shape[0] == h * w + prefix:
            tokens = output[prefix:].transpose(0, 1)
        else:
            continue
        if net.middle and prefix:
            tokens = torch.cat([output[:, : h * w // 2], output[:, h * w // 2 + prefix :]], 1)
        if net.order is not None:
            tokens = tokens[:, net.order(grid)]
        return tokens.transpose(1, 2).reshape(len(tokens), -1, h, w)
    return None


def same_maps(net: Net, module: nn.Module, images: Tensor) -> set[str]:
    """The hand-written defaults and every other name of the very same map."""
    everything = outputs(net, module, images)
    wanted = [as_grid(net, everything[name], net.grid) for name in net.default]
    result = set(net.default)
    for name, output in everything.items():
        grid = as_grid(net, output, net.grid)
        for right in wanted:
            if grid is not None and right is not None and grid.shape == right.shape:
                result |= {name} if torch.equal(grid, right) else set()
    return result


def plain_map(
    net: Net, module: nn.Module, layer: str, grid: Grid, image: Tensor, weight: Tensor
) -> Tensor:
    """Grad-CAM of ``weight . f / |f|`` for one image ``(1,C,H,W)``, by plain autograd."""
    name, _, call = layer.partition("@")
    seen: list[Tensor] = []
    values: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
        tensor = first(output)
        assert tensor is not None
        values.append(tensor.detach().clone())  # before anything works on it in place
        seen.append(tensor)
        fresh = tensor.clone()
        if isinstance(output, Tensor):
            return fresh
        if isinstance(output, (tuple, list)):
            return type(output)([fresh, *output[1:]])
        output[next(iter(output))] = fresh
        return output

    handle = dict(module.named_modules())[name].register_forward_hook(keep)
    try:
        row = F.normalize(vector(net, module, image.clone().requires_grad_() * 1), dim=1)
        index = int(call) if call else -1
        (gradient,) = torch.autograd.grad((row @ weight.to(row)).sum(), seen[index])
    finally:
        handle.remove()
    activation = as_grid(net, values[index].to(row), grid)
    slope = as_grid(net, gradient.to(row), grid)
    assert activation is not None
    assert slope is not None
    return (slope.mean((2, 3), keepdim=True) * activation).sum(1).relu()[0]


def changed(net: Net, image: Tensor) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    """An image with each of sixteen places changed in turn, ``(16,C,H,W)``, and the places."""
    other = pictures(net, 6)[5] * 3
    height, width = net.size
    changes, places = [], []
    for row in range(LATTICE):
        for column in range(LATTICE):
            top, left = row * height // LATTICE, column * width // LATTICE
            bottom, right = (row + 1) * height // LATTICE, (column + 1) * width // LATTICE
            inset = ((bottom - top) // 4, (right - left) // 4)
            index = (top + inset[0], bottom - inset[0], left + inset[1], right - inset[1])
            new = image.clone()
            new[:, index[0] : index[1], index[2] : index[3]] = other[
                :, index[0] : index[1], index[2] : index[3]
            ]
            changes.append(new)
            places.append(index)
    return torch.stack(changes), places


def followed(maps: Tensor, places: list[tuple[int, int, int, int]], size: Grid) -> int:
    """In how many of the places the map ``(1 + P,C,h,w)`` changes most: 16 of 16 is right.

    A cell's change counts against what that cell changes on average, since cells that always
    change much, such as those in the middle of a wide receptive field, would win everywhere.
    """
    change = (maps[1:] - maps[:1]).double().norm(dim=1)
    change = change / change.mean(0).clamp(min=1e-30)
    h, w = change.shape[1:]
    hits = 0
    for moved, (top, bottom, left, right) in zip(change, places, strict=True):
        cell = int(moved.argmax())
        y0, y1 = (cell // w) * size[0] / h, (cell // w + 1) * size[0] / h
        x0, x1 = (cell % w) * size[1] / w, (cell % w + 1) * size[1] / w
        hits += y0 < bottom and y1 > top and x0 < right and x1 > left
    return hits


def swap_share(net: Net, module: nn.Module, layer: str, images: Tensor) -> float:
    """How far the embedding of one image follows when a layer gives another image's output.

    1: the embedding becomes the other image's; 0: it stays.
    """
    name, _, call = layer.partition("@")
    count: list[Tensor] = []
    swapped: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = first(output)
        assert tensor is not None
        count.append(tensor.detach().clone())

    def swap(_module: nn.Module, _args: Any, output: Any) -> Any:
        swapped.append(torch.empty(0))
        if call and len(swapped) != int(call) + 1:
            return None
        other = count[int(call) if call else 0]
        if isinstance(output, Tensor):
            return other
        if isinstance(output, (tuple, list)):
            return type(output)([other, *output[1:]])
        output[next(iter(output))] = other
        return output

    part = dict(module.named_modules())[name]
    with torch.no_grad():
        own = vector(net, module, images[:1])
        handle = part.register_forward_hook(note)
        other = vector(net, module, images[1:2])
        handle.remove()
        handle = part.register_forward_hook(swap)
        mixed = vector(net, module, images[:1])
        handle.remove()
    return 1 - float((mixed - other).norm() / (own - other).norm())
