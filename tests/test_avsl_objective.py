"""AVSL's objective: values by loops, whom each loss trains, proxies, edges, ablations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from avsl_cases import LEVELS, Pyramid, small_avsl
from side_by_side import in_two_processes
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from simexplain import as_similarity_model, attribute, load_model, save_model
from simexplain.errors import ModelError
from simexplain.losses.avsl_objective import ABLATIONS, AVSLLoss, Proxies
from simexplain.losses.distance_losses import DistanceBatch, ProxyAnchor
from simexplain.losses.objective import Objective
from simexplain.losses.parameter_groups import parameter_groups
from simexplain.models.accelerating import accelerated
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_options import INFERENCES, PRESETS, AVSLOptions
from simexplain.models.backbones import build_backbone
from simexplain.tracing import trace

CLASSES, EACH = 4, 3
LABELS = torch.arange(CLASSES).repeat_interleave(EACH)


def refusal(call: Callable[[], object]) -> str:
    """The sentence with which a call is refused."""
    with pytest.raises(ModelError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def pictures(seed: int = 5, count: int = len(LABELS)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, 3, 32, 40), generator=generator, dtype=torch.float64)


def training(preset: str | AVSLOptions = "paper", **given) -> AVSL:
    """A model in training whose alpha and beta are not at their start."""
    return small_avsl(preset, **given).train()


def inferring(inference: str, **changes) -> AVSLOptions:
    return replace(PRESETS["paper"], inference=inference, **changes)


def loss_of(model: AVSL, *args, **given) -> AVSLLoss:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return AVSLLoss(model, *args, **{"classes": CLASSES, **given}).double()


def objective_of(model: AVSL, *args, **given) -> tuple[Objective, AVSLLoss]:
    term = loss_of(model, *args, **given)
    return Objective({"avsl": (1.0, term)}), term


def measured(distances: Tensor, labels: Tensor, columns: Tensor, **given) -> DistanceBatch:
    generator = torch.Generator().manual_seed(0)
    return DistanceBatch(distances, labels, columns, 16, generator, **given)


# --- values ---------------------------------------------------------------------------------------


def naive_cams(model: AVSL, images: Tensor) -> list[Tensor]:
    """Eq. 2 node by node."""
    maps = list(trace(model.base, images, model.levels, differentiable=True).maps.values())
    return [
        torch.stack(
            [
                torch.stack([(row[:, None, None] * z).sum(dim=0) for row in head.weight])
                for z in grid
            ]
        )
        for head, grid in zip(model.heads, maps, strict=True)
    ]


def naive_edges(cams: Sequence[Tensor], old: Sequence[Tensor], kept: float) -> list[Tensor]:
    """Eq. 3 and 4 node by node."""
    result = []
    for low, high, before in zip(cams[:-1], cams[1:], old, strict=True):
        now = torch.zeros_like(before)
        for m in range(len(low)):
            size = high.shape[2:]
            small = F.adaptive_avg_pool2d(low[m], size).flatten(1)
            large = high[m].flatten(1)
            for j in range(len(small)):
                for i in range(len(large)):
                    now[j, i] += (small[j] / small[j].norm()) @ (large[i] / large[i].norm())
        result.append(kept * before + (1 - kept) * now / len(low))
    return result


def naive_weights(edges: Tensor, k: int) -> Tensor:
    """Normalised edges of Eq. 7 and 8."""
    out = torch.zeros_like(edges)
    for i in range(edges.shape[1]):
        best = sorted(range(len(edges)), key=lambda j: -float(edges[j, i]))[:k]
        kept = [j for j in best if edges[j, i] > 0]
        for j in kept:
            out[j, i] = edges[j, i] / sum(edges[n, i] for n in kept)
    return out


def naive_overall(
    units: Sequence[tuple[Tensor, Tensor]],
    sure: Sequence[tuple[Tensor, Tensor]],
    edges: Sequence[Tensor],
    model: AVSL,
) -> Tensor:
    """Eq. 5, 6, 8 and 9 for one pair."""
    hat = (units[0][0] - units[0][1]) ** 2
    for n in range(1, len(units)):
        delta = (units[n][0] - units[n][1]) ** 2
        new = []
        for i in range(len(delta)):
            eta = sure[n][0][i] * sure[n][1][i]
            p = 1 / (1 + torch.exp(-(model.alphas[n - 1][i] * eta + model.betas[n - 1][i])))
            stand_in = sum(edges[n - 1][j, i] * hat[j] for j in range(len(hat)))
            new.append(p * delta[i] + (1 - p) * stand_in)
        hat = torch.stack(new)
    return hat.sum()


def naive_proxy_anchor(distance: Tensor, labels: Tensor, alpha=16.0, near=1.8, far=2.2) -> Tensor:
    pulls, pushes = [], []
    for c in range(distance.shape[1]):
        own = [torch.exp(alpha * (d - near)) for d in distance[labels == c, c]]
        other = [torch.exp(alpha * (far - d)) for d in distance[labels != c, c]]
        if own:
            pulls.append(torch.log(1 + sum(own)))
        pushes.append(torch.log(1 + sum(other)))
    return sum(pulls) / len(pulls) + sum(pushes) / len(pushes)


def test_values_are_those_of_equations_1_to_10_by_loops() -> None:
    model = training(nodes=5, k=2)
    for edges in model.edges:
        assert (edges > 0).any(dim=0).all()  # no orphan, which the paper does not speak of
    old = [edges.clone() for edges in model.edges]
    objective, term = objective_of(model)
    images = pictures()
    result = objective(model, images, LABELS)
    with torch.no_grad():
        cams = naive_cams(model, images)
        edges = [naive_weights(part, 2) for part in naive_edges(cams, old, 0.5)]
        units = [F.normalize(part.mean(dim=(2, 3)), dim=1) for part in cams]
        flat = [F.normalize(part.flatten(2), dim=2) for part in cams]
        sure = [
            torch.stack([torch.stack([c.std() for c in image]) for image in part]) for part in flat
        ]
        proxies = [F.normalize(level, dim=1) for level in term.proxies.levels]
        overall = torch.zeros(len(images), CLASSES, dtype=torch.float64)
        levels = torch.zeros(3, len(images), CLASSES, dtype=torch.float64)
        for m in range(len(images)):
            for c in range(CLASSES):
                pair = [(u[m], p[c]) for u, p in zip(units, proxies, strict=True)]
                both = [(s[m], s.mean().expand(5)) for s in sure]
                overall[m, c] = naive_overall(pair, both, edges, model)
                for n, (one, other) in enumerate(pair):
                    levels[n, m, c] = sum((one - other) ** 2)
        parts = [naive_proxy_anchor(level, LABELS) for level in levels]
        whole = naive_proxy_anchor(overall, LABELS)
    for n, part in enumerate(parts):
        torch.testing.assert_close(term.latest[f"level_{n}"], part)
    torch.testing.assert_close(term.latest["overall"], whole)
    torch.testing.assert_close(result.total, sum(parts) + whole)


def test_proxy_anchor_is_kim_et_al_on_half_the_squared_distance() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    other = losses.ProxyAnchorLoss(6, 16, margin=0.1, alpha=32).double()
    unit, proxies = F.normalize(rows, dim=1), F.normalize(other.proxies.detach(), dim=1)
    distances = torch.cdist(unit, proxies).square()
    own = ProxyAnchor()(measured(distances, LABELS, torch.arange(6)))
    torch.testing.assert_close(own, other(rows, LABELS).detach())
    for alpha, margin in ((10.0, 0.3), (48.0, 0.05)):
        other.alpha, other.margin = alpha, margin
        mine = ProxyAnchor(alpha=alpha / 2, positive=2 * (1 - margin), negative=2 * (1 + margin))
        value = mine(measured(distances, LABELS, torch.arange(6)))
        torch.testing.assert_close(value, other(rows, LABELS).detach())
    worse = ProxyAnchor(negative=2.4)(measured(distances, LABELS, torch.arange(6)))
    torch.testing.assert_close(worse, naive_proxy_anchor(distances, LABELS, far=2.4))


# --- whom each loss trains ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["proxy_anchor", "margin", "triplet", "multi_similarity"])
def test_levels_train_network_and_heads_and_the_whole_trains_alpha_and_beta(loss: str) -> None:
    if loss != "proxy_anchor":
        pytest.importorskip("pytorch_metric_learning")
    touched = {}
    for name, weights in (("levels", (1.0, 0.0)), ("overall", (0.0, 1.0))):
        model = training()
        settings = {"margin": 0.5} if loss in ("margin", "triplet") else {}
        objective, _ = objective_of(
            model, loss, weights=weights[0], overall_weight=weights[1], level_settings=settings
        )
        objective(model, pictures(), LABELS).total.backward()
        groups = parameter_groups(objective, model, learning_rate=1e-3)
        touched[name] = {
            group["name"]: [
                float(p.grad.abs().sum()) for p in group["params"] if p.grad is not None
            ]
            for group in groups
        }
        assert not any(edges.requires_grad or edges.grad is not None for edges in model.edges)
    assert all(value > 0 for value in touched["levels"]["heads"])
    assert sum(touched["levels"]["network"]) > 0
    assert not any(touched["levels"]["reliability"])
    assert all(value > 0 for value in touched["overall"]["reliability"])
    assert not any(touched["overall"]["network"] + touched["overall"]["heads"])
    if loss == "proxy_anchor":
        assert all(value > 0 for value in touched["levels"]["proxies"])
        assert not any(touched["overall"]["proxies"])


def test_gradient_of_alpha_and_beta_is_that_of_finite_differences() -> None:
    model = small_avsl(replace(PRESETS["official"], eta="raw"))
    objective, _ = objective_of(model, weights=0.0)
    images = pictures()
    objective(model, images, LABELS).total.backward()
    for parameters in (model.alphas, model.betas):
        for parameter in parameters:
            for index in (0, 11, 23):
                values = []
                for step in (1e-5, -1e-5):
                    parameter.data[index] += step
                    values.append(float(objective(model, images, LABELS).total.detach()))
                    parameter.data[index] -= step
                slope = (values[0] - values[1]) / 2e-5
                assert float(parameter.grad[index]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_groups_are_named_complete_and_have_their_own_rates() -> None:
    model = training()
    objective, _ = objective_of(model)
    groups = parameter_groups(
        objective,
        model,
        learning_rate=1e-4,
        rates={"heads": 1e-3, "proxies": 0.1},
        weight_decay=0.5,
    )
    assert {g["name"]: g["lr"] for g in groups} == {
        "network": 1e-4, "heads": 1e-3, "reliability": 1e-4, "proxies": 0.1,
    }  # fmt: skip
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    whole = {id(p) for module in (model, objective) for p in module.parameters()}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == whole
    optimiser = torch.optim.AdamW(groups)
    assert optimiser.param_groups[1]["weight_decay"] == 0.5
    top = training(inferring("top"))
    names = [g["name"] for g in parameter_groups(objective_of(top)[0], top, learning_rate=1.0)]
    assert names == ["network", "heads", "proxies"]
    model.base.requires_grad_(False)
    assert parameter_groups(objective, model, learning_rate=1.0)[0]["name"] == "heads"
    assert "'head'" in refusal(
        lambda: parameter_groups(objective, model, learning_rate=1.0, rates={"head": 1.0})
    )


def test_groups_of_a_plain_network_part_its_embedding_layer() -> None:
    network = nn.Sequential(Pyramid(), nn.Linear(32, 8))
    model = as_similarity_model(network)
    groups = {g["name"]: g["params"] for g in parameter_groups(nn.Module(), model, learning_rate=1)}
    assert [p.shape for p in groups["heads"]] == [(8, 32), (8,)]
    assert len(groups["network"]) == len(list(network[0].parameters()))


# --- proxies --------------------------------------------------------------------------------------


def test_above_a_class_count_only_the_proxies_of_the_batch_are_used() -> None:
    model = training()
    some = torch.tensor([0, 0, 2, 2, 2, 9])
    few = Proxies(10, model.widths, most=10)
    many = Proxies(10, model.widths, most=9)
    assert few.columns(some).tolist() == list(range(10))
    assert many.columns(some).tolist() == [0, 2, 9]
    assert not many.attract_only
    assert Proxies(10, model.widths, most=9, beyond="positive").attract_only
    assert not Proxies(10, model.widths, beyond="positive").attract_only
    objective, term = objective_of(model, classes=10, most_proxies=9)
    objective(model, pictures(count=6), some).total.backward()
    for level in term.proxies.levels:
        assert level.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [0, 2, 9]


def test_positive_proxies_alone_only_attract() -> None:
    model = training()
    objective, term = objective_of(model, most_proxies=1, beyond="positive")
    objective(model, pictures(), LABELS)
    with torch.no_grad():
        rows = model.embed(pictures())
        proxies = term.proxies.rows(torch.arange(CLASSES), model.unpacked(rows))
        levels = model.level_distances(rows, proxies)
    for n in range(3):
        pulls = [torch.log1p(torch.exp(16 * (levels[n][c == LABELS, c] - 1.8)).sum())
                 for c in range(CLASSES)]  # fmt: skip
        torch.testing.assert_close(term.latest[f"level_{n}"], sum(pulls) / CLASSES)


def test_a_proxy_is_as_certain_as_the_batch_is_on_average_and_of_unit_length() -> None:
    model = training()
    rows = model.unpacked(model.embed(pictures()))
    result = model.unpacked(Proxies(7, model.widths).double().rows(torch.tensor([1, 5]), rows))
    for n in range(3):
        expected = rows.certainties[n].mean()
        torch.testing.assert_close(result.certainties[n], expected.expand(2, 24))
        torch.testing.assert_close(result.embeddings[n].norm(dim=1), expected.new_ones(2))


# --- the graph in training ------------------------------------------------------------------------


def test_edges_are_updated_once_a_step_before_distances_and_only_in_training() -> None:
    model = training(learned=False)
    objective, _ = objective_of(model)
    objective(model, pictures(1), LABELS)
    assert int(model.edge_updates) == 1
    twin = small_avsl(learned=False).train()
    with torch.no_grad():
        twin.update_edges(twin.feature_maps(pictures(1)))
    objective(model, pictures(2), LABELS)
    with torch.no_grad():
        twin.update_edges(twin.feature_maps(pictures(2)))
    for own, other in zip(model.edges, twin.edges, strict=True):
        torch.testing.assert_close(own, other)
    state = model.state_dict()
    assert int(state["edge_updates"]) == 2
    assert torch.equal(state["edges_1"], model.edges[1])
    model.eval()
    objective(model, pictures(3), LABELS)
    model.train()
    Objective({"avsl": (1.0, loss_of(model, update_edges=False))})(model, pictures(3), LABELS)
    assert int(model.edge_updates) == 2


def _process(rank: int, folder: str) -> None:
    """One of the processes of a training step; writes what it found."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.save(_step(rank, 2), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _step(rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    model = training(replace(PRESETS["paper"], eta="standardised"))
    model.network.stage3[1].eval()  # batch norm, whose statistics are of a process
    objective, _ = objective_of(model)
    # Classes are spread over the processes, so that a process alone would see another loss.
    order = torch.arange(len(LABELS)).view(-1, 2).T.flatten()
    own = order.view(world, -1)[rank] if world > 1 else order
    losses = objective(model, pictures()[own], LABELS[own])
    losses.total.backward()
    groups = parameter_groups(objective, model, learning_rate=1.0)
    gradients = [p.grad for g in groups for p in g["params"] if p.grad is not None]
    state = {f"grad_{n}": gradient for n, gradient in enumerate(gradients)}
    return {**state, "total": losses.total.detach(), "edges": model.edges[0], "eta": model.eta_0}


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("gloo over a file store is not for Windows")
    in_two_processes(_process, tmp_path)
    one = _step()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in ("total", "edges", "eta"):
        for part in parts:
            torch.testing.assert_close(part[name], one[name])
    for name in one:
        if name.startswith("grad"):  # which DDP averages over processes
            mean = sum(part[name] for part in parts) / 2
            torch.testing.assert_close(mean, one[name], rtol=1e-9, atol=1e-12)


def test_a_standardised_eta_is_what_alpha_and_beta_are_learned_on() -> None:
    model = training(replace(PRESETS["paper"], eta="standardised", orphans="drop"))
    raw = training(replace(PRESETS["paper"], orphans="drop"))
    assert "eta_0" in model.state_dict()
    assert "eta_0" not in raw.state_dict()
    rows = model.embed(pictures())
    model.update_scales(rows)
    known = model.unpacked(rows)
    for level in (1, 2):
        sure = known.certainties[level]
        eta = sure[:, None] * sure[None]
        z = (eta - eta.mean()) / eta.std(correction=0)
        alpha, beta = model.alphas[level - 1], model.betas[level - 1]
        result = model.graph().reliability(level, sure[:, None], sure[None])
        torch.testing.assert_close(result, torch.sigmoid(alpha * z + beta))
        expected = torch.stack((eta.mean(), eta.std(correction=0)))
        torch.testing.assert_close(getattr(model, f"eta_{level - 1}"), expected)
    before = model.eta_1.clone()
    other = model.embed(pictures(9))
    model.update_scales(other)
    sure = model.unpacked(other).certainties[2]
    now = (sure[:, None] * sure[None]).mean()
    torch.testing.assert_close(model.eta_1[0], 0.5 * before[0] + 0.5 * now)
    raw.update_scales(rows)  # has nothing to do


@pytest.mark.parametrize("loss", ["proxy_anchor", "margin"])
def test_training_lowers_every_part(loss: str) -> None:
    if loss == "margin":
        pytest.importorskip("pytorch_metric_learning")
    torch.manual_seed(0)
    model = AVSL(Pyramid(), levels=LEVELS, nodes=16).train()
    term = AVSLLoss(model, loss, classes=CLASSES)
    objective = Objective({"avsl": (1.0, term)})
    groups = parameter_groups(
        objective, model, learning_rate=3e-3, rates={"reliability": 0.05, "proxies": 0.02}
    )
    optimiser = torch.optim.AdamW(groups)
    patterns = torch.rand(CLASSES, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = (patterns[LABELS] + 0.1 * torch.rand(len(LABELS), 3, 32, 32)).clamp(0, 1)
    seen = []
    for step in range(25):
        losses = objective(model, images, LABELS, seed=step)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        seen.append({name: float(value) for name, value in term.latest.items()})
    for name in seen[0]:
        last = sum(part[name] for part in seen[-3:]) / 3
        assert last < 0.8 * seen[0][name], (name, seen[0][name], last)


# --- as distances of pytorch-metric-learning ------------------------------------------------------


def test_avsl_is_a_distance_of_pytorch_metric_learning() -> None:
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.losses import MarginLoss

    from simexplain.losses.avsl_distance import AVSLDistance

    model = training()
    rows = model.embed(pictures())
    levels = model.level_distances(rows, rows)
    for level in range(3):
        torch.testing.assert_close(AVSLDistance(model, level)(rows), levels[level])
        # Far from zero, where a difference of rounding has no root.
        own = AVSLDistance(model, level, root=True)(rows[:3], rows[3:])
        torch.testing.assert_close(own, levels[level][:3, 3:].sqrt())
        similar = AVSLDistance(model, level, similarities=True)(rows)
        unit = model.unpacked(rows).embeddings[level]
        torch.testing.assert_close(similar, unit @ unit.T)
    overall = AVSLDistance(model)
    torch.testing.assert_close(overall(rows), model.distance(rows, rows))
    torch.testing.assert_close(
        overall.pairwise_distance(rows[:5], rows[5:10]), model.pairs(rows[:5], rows[5:10]).distance
    )
    assert not list(overall.parameters())
    a, p, n = (torch.tensor(part) for part in ([0, 1, 4], [2, 2, 5], [7, 3, 0]))
    for level in (None, 1):
        distance = model.distance(rows, rows) if level is None else levels[level]
        near = (distance[a, p] - 1.2 + 0.2).relu()
        far = (1.2 - distance[a, n] + 0.2).relu()
        count = (near > 0).sum() + (far > 0).sum()
        loss = MarginLoss(margin=0.2, beta=1.2, distance=AVSLDistance(model, level))
        value = loss(rows, LABELS, (a, p, n))
        torch.testing.assert_close(value, (near + far).sum() / count)
        model.zero_grad()
        value.backward(retain_graph=True)
        trained = {name.split(".")[0] for name, q in model.named_parameters()
                   if q.grad is not None and q.grad.abs().sum() > 0}  # fmt: skip
        assert trained == ({"alphas", "betas"} if level is None else {"base", "heads"})


@pytest.mark.parametrize("root", [False, True])
def test_margin_loss_is_its_formula_on_the_distances_drawn(root: bool) -> None:
    pytest.importorskip("pytorch_metric_learning")
    from simexplain.losses.distance_losses import margin

    generator = torch.Generator().manual_seed(2)
    unit = F.normalize(torch.randn(12, 16, generator=generator, dtype=torch.float64), dim=1)
    squared = torch.cdist(unit, unit).square()
    loss = margin(CLASSES, root=root, margin=0.3).double()
    loss.loss.beta.data.copy_(torch.tensor([1.0, 1.1, 1.2, 1.3]))
    case = measured(squared, LABELS, LABELS)
    given = squared.sqrt() if root else squared
    drawn = []
    sampler = loss.sampler
    loss.sampler = lambda *args: drawn.append(sampler(*args)) or drawn[-1]
    value = loss(case)
    a, p, n = drawn[0]
    assert (LABELS[a] == LABELS[p]).all()
    assert (LABELS[a] != LABELS[n]).all()
    assert (a != p).all()
    assert (given[a, n] < 1.5).all()
    beta = loss.loss.beta.detach()[LABELS[a]]
    near, far = (given[a, p] - beta + 0.3).relu(), (beta - given[a, n] + 0.3).relu()
    expected = (near + far).sum() / ((near > 0).sum() + (far > 0).sum())
    torch.testing.assert_close(value.detach(), expected)


def test_distance_weighted_sampling_is_that_of_pytorch_metric_learning() -> None:
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    from simexplain.losses.distance_losses import DistanceWeighted

    generator = torch.Generator().manual_seed(3)
    unit = F.normalize(torch.randn(12, 16, generator=generator, dtype=torch.float64), dim=1)
    distances = torch.cdist(unit, unit)
    case = measured(distances.square(), LABELS, LABELS)
    torch.manual_seed(11)
    other = miners.DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4)(unit, LABELS)
    torch.manual_seed(11)
    own = DistanceWeighted()(case, distances)
    for one, two in zip(own, other, strict=True):
        assert torch.equal(one, two)
    weights = DistanceWeighted().weights(case, distances)
    sums = weights.sum(dim=1)
    torch.testing.assert_close(sums, (sums > 0).double())
    before = torch.get_rng_state()
    from simexplain.losses.distance_losses import margin

    first, again = (margin(CLASSES).double()(replace_generator(case)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())


def replace_generator(case: DistanceBatch) -> DistanceBatch:
    return replace(case, generator=torch.Generator().manual_seed(4))


def test_hard_sampling_takes_the_nearest_of_another_class() -> None:
    from simexplain.losses.distance_losses import Hardest

    generator = torch.Generator().manual_seed(2)
    distances = 0.6 + torch.rand(12, 12, generator=generator)
    a, p, n = Hardest()(measured(distances, LABELS, LABELS), distances)
    assert a.tolist() == list(range(12))
    for anchor, positive, negative in zip(a, p, n, strict=True):
        assert LABELS[anchor] == LABELS[positive]
        assert anchor != positive
        others = distances[anchor].masked_fill(LABELS[anchor] == LABELS, torch.inf)
        assert negative == others.argmin()


# --- ablations ------------------------------------------------------------------------------------


def directly(model: AVSL, rows: Tensor, inference: str) -> Tensor:
    """Distances of Table 2's rows without a graph."""
    levels = model.level_distances(rows, rows)
    if inference == "top":
        return levels[-1]
    if inference == "levels":
        known = model.unpacked(rows)
        joined = torch.cat(known.embeddings, dim=1) / math.sqrt(len(levels))
        return torch.cdist(joined, joined).square()
    known = model.unpacked(rows)
    top, sure = known.embeddings[-1], known.certainties[-1]
    p = torch.sigmoid(model.alphas[-1] * sure[:, None] * sure[None] + model.betas[-1])
    return (p * (top[:, None] - top[None]).square()).sum(dim=2)


@pytest.mark.parametrize("inference", ["top", "levels", "reliable"])
@pytest.mark.parametrize("nodes", [24, (10, 24, 7)])
def test_ablations_measure_what_they_say_on_every_way(
    inference: str, nodes: int | tuple[int, ...], tmp_path: Path
) -> None:
    model = small_avsl(inferring(inference), nodes=nodes)
    images = pictures()
    with torch.no_grad():
        rows = model.embed(images)
        expected = directly(model, rows, inference)
        torch.testing.assert_close(model.distance(rows, rows), expected)
        torch.testing.assert_close(model.pairs(rows[:6], rows[6:]).distance,
                                   expected[:6, 6:].diagonal())  # fmt: skip
        actual = model.neighbours(rows, rows, 4, exclude_self=True)
        near = expected.clone().fill_diagonal_(torch.inf).topk(4, largest=False).values
        torch.testing.assert_close(actual.distances, near)
    result = attribute(model, images[:2], images[2:4])
    torch.testing.assert_close(result.distances, expected[:2, 2:4].diagonal())
    assert float(result.residual.abs().max()) < 1e-12
    for level in range(3):
        part = result.decompose(level, 3)
        assert not part.stand_ins
        assert part.flow == pytest.approx(part.own)
    assert any("ablation" in warning for warning in result.warnings)
    if inference == "levels":
        torch.testing.assert_close(result.shares.sum(dim=1), torch.ones(2).double())
        assert (result.shares > 0).all()


def test_full_inference_differs_from_every_ablation() -> None:
    with torch.no_grad():
        result = []
        for inference in INFERENCES:
            model = small_avsl(inferring(inference))
            rows = model.embed(pictures())
            result.append(model.distance(rows, rows))
    for n, one in enumerate(result):
        for other in result[n + 1 :]:
            assert float((one - other).abs().max()) > 1e-3


def test_a_file_remembers_how_its_model_measures(tmp_path: Path) -> None:
    name = "timm:tf_efficientnet_lite0"
    base = as_similarity_model(build_backbone(name, pretrained=False).network)
    base.backbone = name
    options = AVSLOptions(inference="levels", eta="standardised")
    model = AVSL(base, nodes=6, preset=options).eval()
    model.update_scales(torch.rand(5, 36))
    save_model(model, tmp_path / "model.pt")
    again = load_model(tmp_path / "model.pt")
    assert again.options == options
    torch.testing.assert_close(again.eta_1, model.eta_1)
    with torch.no_grad():
        rows = torch.rand(3, 36)
        assert torch.equal(again.distance(rows, rows), model.distance(rows, rows))
    old = {k: v for k, v in options.to_json().items() if k not in ("eta", "inference")}
    assert AVSLOptions.from_json(old) == AVSLOptions()


def test_the_fast_copy_measures_alike() -> None:
    model = small_avsl(inferring("levels")).float()
    fast = accelerated(model)
    assert fast.options == model.options
    images = pictures().float()
    with torch.no_grad():
        one, other = (m.distance(*[m.embed(images)] * 2) for m in (model, fast))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_rows_of_table_2_train_the_network_alike() -> None:
    gradients = {}
    for name, row in ABLATIONS.items():
        model = training(row.options(), levels=row.levels(LEVELS))
        objective, term = objective_of(model)
        objective(model, pictures(), LABELS).total.backward()
        gradients[name] = model.network.stage1[0].weight.grad
        assert (term.overall is not None) == (name in ("+M&R", "full"))
        assert set(term.latest) == {f"level_{n}" for n in range(len(model.widths))} | (
            {"overall"} if term.overall is not None else set()
        )
    for name in ("+M&R", "+M concat", "full"):
        torch.testing.assert_close(gradients[name], gradients["+M"])
    assert not torch.allclose(gradients["baseline"], gradients["+M"])


# --- settings -------------------------------------------------------------------------------------


def test_weights_and_settings_of_each_level_are_used_and_recorded() -> None:
    model = training()
    objective, term = objective_of(
        model,
        weights=(0.5, 1.0, 2.0),
        overall_weight=3.0,
        level_settings={"negative": (2.2, 2.3, 2.4)},
        overall_settings={"alpha": 8.0},
    )
    total = objective(model, pictures(), LABELS).total
    part = term.latest
    expected = 0.5 * part["level_0"] + part["level_1"] + 2 * part["level_2"] + 3 * part["overall"]
    torch.testing.assert_close(total.detach(), expected)
    record = term.to_json()
    assert record["weights"] == [0.5, 1.0, 2.0]
    assert record["overall_weight"] == 3.0
    assert [level["negative"] for level in record["levels"]] == [2.2, 2.3, 2.4]
    assert record["overall"] == {"alpha": 8.0, "positive": 1.8, "negative": 2.2}
    assert record["proxies"] == {"classes": CLASSES, "most": 1000, "beyond": "batch"}


def test_what_does_not_fit_is_said_in_one_sentence() -> None:
    model = training()
    for given, record in (
        ({"loss": "nothing"}, "proxy_anchor"),
        ({"classes": None}, "classes"),
        ({"weights": (1.0, 2.0)}, "3 weights"),
        ({"weights": -1.0}, "at least 0"),
        ({"level_settings": {"negative": (1.0,)}}, "negative"),
        ({"level_settings": {"margin": 1.0}}, "'margin'"),
        ({"beyond": "some"}, "'some'"),
    ):
        assert record in refusal(lambda given=given: loss_of(model, **given))
    objective, _ = objective_of(model)
    assert "from 0 to 3" in refusal(lambda: objective(model, pictures(), LABELS + 1))
    other = training(nodes=7)
    assert "7, 7, 7" in refusal(lambda: objective(other, pictures(), LABELS))
    plain = as_similarity_model(Pyramid())
    assert "AVSLLoss" in refusal(lambda: objective(plain, pictures(), LABELS))
    for options in ({"inference": "some"}, {"eta": "some"}):
        with pytest.raises(ModelError, match="'some'"):
            AVSLOptions(**options)


# --- losses without AVSL --------------------------------------------------------------------------


def test_base_losses_are_those_of_pytorch_metric_learning() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from simexplain.losses.metric_losses import LOSSES, metric_loss

    assert {"margin", "proxy_anchor", "contrastive", "triplet", "multi_similarity"} <= set(LOSSES)
    torch.manual_seed(0)
    model = as_similarity_model(nn.Sequential(Pyramid(), nn.Linear(32, 8)).double())
    images = pictures()
    for name in LOSSES:
        objective = Objective({"base": (1.0, metric_loss(name, CLASSES, 8).double())})
        total = objective(model, images, LABELS).total
        total.backward()
        assert float(total.detach()) > 0
    rows = model.embed(images)
    for name, plain in (
        ("contrastive", losses.ContrastiveLoss(0, 1)),
        ("multi_similarity", losses.MultiSimilarityLoss(2, 50, 0.5)),
    ):
        term = metric_loss(name, CLASSES, 8)
        result = term.miner(rows, LABELS) if term.miner is not None else None
        value = Objective({"base": (1.0, term)})(model, images, LABELS).total
        torch.testing.assert_close(value, plain(rows, LABELS, result))
    assert metric_loss("triplet", 1, 8, margin=0.7).loss.margin == 0.7
    assert "'margins'" in refusal(lambda: metric_loss("triplet", 1, 8, margins=0.7))
    assert "proxy_anchor" in refusal(lambda: metric_loss("nothing", 1, 8))
