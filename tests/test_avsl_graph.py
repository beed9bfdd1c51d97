"""The AVSL graph against the published implementation's values and against plain definitions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from avsl_cases import Pyramid, random_graph, random_rows
from torch import Tensor
from torch.nn import functional as F

from simexplain.errors import ModelError
from simexplain.graph.inference import (
    CERTAINTIES,
    POOLINGS,
    Rows,
    broadcast,
    infer,
    linearised,
    node_cams,
    normalised_edges,
    overlap,
    pack,
    pooled,
    unpack,
)
from simexplain.models.avsl import AVSL
from simexplain.models.avsl_options import PRESETS

GOLDEN = Path(__file__).parent / "golden" / "avsl_reference.npz"
EXACT = 1e-9


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as stored:
        return {name: torch.from_numpy(np.asarray(stored[name])) for name in stored.files}


@pytest.fixture(scope="module")
def published(golden: dict[str, Tensor]) -> AVSL:
    """The official preset with the reference's heads, after its two training batches."""
    options = replace(
        PRESETS["official"], k=int(golden["topk"]), momentum=float(golden["momentum"])
    )
    assert options.scale == int(golden["reliability_scale"])
    model = AVSL(Pyramid(), levels=("stage1", "stage2", "stage3"), nodes=24, preset=options)
    model = model.double().train()
    with torch.no_grad():
        for level, (weight, bias) in enumerate(model.weights):
            weight.copy_(golden[f"conv_weight_{level}"])
            bias.copy_(golden[f"conv_bias_{level}"])
        for level in (1, 2):
            model.alphas[level - 1].copy_(golden[f"alpha_{level}"])
            model.betas[level - 1].copy_(golden[f"beta_{level}"])
    for step in ("train1", "train2"):
        model.update_edges(features(golden, step))
    return model.eval()


def features(golden: dict[str, Tensor], split: str) -> list[Tensor]:
    return [golden[f"{split}_features_{level}"] for level in range(3)]


def rows(model: AVSL, golden: dict[str, Tensor], split: str) -> Tensor:
    return model.rows(features(golden, split)).detach()


def close(value: Tensor, expected: Tensor) -> None:
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=0, atol=EXACT)


def test_embeddings_and_certainties_are_the_published_ones(
    published: AVSL, golden: dict[str, Tensor]
) -> None:
    for split in ("query", "gallery"):
        result = published.unpacked(rows(published, golden, split))
        for level, cams in enumerate(published.cams(features(golden, split))):
            expected = golden[f"{split}_embedding_{level}"]
            close(cams.mean(dim=(2, 3)), expected)
            close(result.embeddings[level], F.normalize(expected, dim=1))
            close(result.certainties[level], golden[f"{split}_certainty_{level}"])


def test_edges_after_two_updates_are_the_published_ones(
    published: AVSL, golden: dict[str, Tensor]
) -> None:
    for level, edges in enumerate(published.edges):
        close(edges, golden[f"edges_after_step2_{level}"])
    assert int(published.edge_updates) == 2


def test_level_and_overall_distances_are_the_published_ones(
    published: AVSL, golden: dict[str, Tensor]
) -> None:
    trained = rows(published, golden, "train2")
    for level, distance in enumerate(published.level_distances(trained, trained)):
        close(distance, golden[f"train2_level_distance_{level}"])
    query, gallery = (rows(published, golden, split) for split in ("query", "gallery"))
    with torch.no_grad():
        close(published.distance(trained, trained), golden["train2_overall_distance"])
        close(published.distance(query, gallery), golden["overall_distance"])


def test_nodes_and_sensitivities_are_the_published_ones(
    published: AVSL, golden: dict[str, Tensor]
) -> None:
    query, gallery = (rows(published, golden, split) for split in ("query", "gallery"))
    for index in range(len(gallery)):
        result = published.pairs(query, gallery[index].expand_as(query))
        for level in range(3):
            close(result.nodes[level], golden[f"node_{level}"][:, index])
            close(result.sensitivities[level], golden[f"sensitivity_{level}"][:, index])
        total = sum(part.sum(dim=1) for part in result.contributions)
        close(total, golden["overall_distance"][:, index])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_mean_of_a_cam_is_the_embedding(pooling: str) -> None:
    grid = torch.randn(3, 5, 4, 7, dtype=torch.float64)
    weight, bias = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    cams = node_cams(grid, weight, bias, pooling)
    average, top = grid.mean(dim=(2, 3)), grid.amax(dim=(2, 3))
    expected = {"avg": average, "max": top, "avg+max": average + top}[pooling]
    torch.testing.assert_close(pooled(grid, pooling), expected)
    torch.testing.assert_close(linearised(grid, pooling).mean(dim=(2, 3)), expected)
    torch.testing.assert_close(cams.mean(dim=(2, 3)), expected @ weight.T + bias)


def test_certainties_by_hand() -> None:
    cam = torch.tensor([[[[1.0, 3.0], [2.0, 6.0]]]], dtype=torch.float64)
    unit = torch.tensor([1.0, 3, 2, 6], dtype=torch.float64) / 50**0.5
    assert float(CERTAINTIES["l2"](cam)) == pytest.approx(float(unit.std()))
    assert float(CERTAINTIES["map_min_l1"](cam)) == pytest.approx(np.std([0, 2, 1, 5], ddof=1) / 8)
    assert float(CERTAINTIES["row_min_l1"](cam)) == pytest.approx(np.std([0, 2, 0, 4], ddof=1) / 6)


@pytest.mark.parametrize("rule", CERTAINTIES)
def test_certainties_of_flat_empty_and_single_cams_are_zero(rule: str) -> None:
    for cams in (torch.full((1, 2, 3, 3), 0.7), torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 1, 1)):
        assert CERTAINTIES[rule](cams).abs().max() < 1e-7


def test_edges_are_mean_inner_products_on_the_smaller_grid() -> None:
    low = torch.randn(3, 4, 8, 6, dtype=torch.float64)
    high = torch.randn(3, 5, 4, 3, dtype=torch.float64)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for image in range(3):
        for i in range(4):
            small = F.avg_pool2d(low[image, i][None, None], 2).flatten()
            for j in range(5):
                unit = high[image, j].flatten()
                expected[i, j] += F.cosine_similarity(small, unit, dim=0) / 3
    torch.testing.assert_close(overlap(low, high), expected)
    torch.testing.assert_close(overlap(high, low), expected.T)


def test_normalised_edges_keep_the_strongest_and_sum_to_one() -> None:
    edges = torch.tensor([[3.0, -1, 0], [1, -2, 0], [2, 4, 0], [1, 0, 0]])
    first = normalised_edges(edges, 3, ties="first", epsilon=0.0)
    assert first[:, 0].tolist() == pytest.approx([3 / 6, 1 / 6, 2 / 6, 0])
    tied = normalised_edges(edges, 3, ties="all", epsilon=0.0)
    assert tied[:, 0].tolist() == pytest.approx([3 / 7, 1 / 7, 2 / 7, 1 / 7])
    for result in (first, tied):
        assert result[:, 1].tolist() == [0, 0, 1, 0]
        assert result[:, 2].tolist() == [0, 0, 0, 0]
    assert float(normalised_edges(edges, 9, ties="first", epsilon=1e-2)[:, 1].sum()) < 1


WIDTHS = ((7,), (7, 5), (6, 9, 4), (5, 6, 7, 8))


@pytest.mark.parametrize("widths", WIDTHS, ids=len)
def test_properties_of_section_3(widths: tuple[int, ...]) -> None:
    graph = random_graph(widths, 1)
    result = infer(graph, random_rows(9, widths, 2), random_rows(9, widths, 3))
    assert graph.widths == widths
    for part in (*result.nodes, *result.rectified, *result.sensitivities):
        assert (part >= 0).all()
    for level, sure in enumerate(result.reliabilities):
        assert ((sure > 0) & (sure <= 1)).all()
        assert (sure < 1).any() == (level > 0)
    for edges in graph.edges:
        sums = edges.sum(dim=0)
        assert (((sums - 1).abs() < 1e-12) | (sums == 0)).all()
    total = sum(part.sum(dim=1) for part in result.contributions)
    torch.testing.assert_close(total, result.distance, rtol=1e-12, atol=0)


def test_the_recursion_is_the_matrix_product_of_equation_11() -> None:
    widths = (6, 9, 4)
    graph, q, g = random_graph(widths, 1), random_rows(1, widths, 2), random_rows(1, widths, 3)
    result = infer(graph, q, g)
    low, middle, high = (torch.diag(sure[0]) for sure in result.reliabilities)
    doubts = [torch.eye(len(part), dtype=torch.float64) - part for part in (middle, high)]
    below = doubts[1] @ graph.edges[1].T
    lambdas = (
        (below @ doubts[0] @ graph.edges[0].T @ low).sum(dim=0),
        (below @ middle).sum(dim=0),
        high.sum(dim=0),
    )
    for expected, sensitivity in zip(lambdas, result.sensitivities, strict=True):
        torch.testing.assert_close(sensitivity[0], expected)


@pytest.mark.parametrize("widths", WIDTHS, ids=len)
def test_sensitivities_are_the_derivative_of_the_distance(widths: tuple[int, ...]) -> None:
    """By autograd on Eq. 8 written with the nodes as free variables."""
    graph, q, g = random_graph(widths, 4), random_rows(5, widths, 5), random_rows(5, widths, 6)
    result = infer(graph, q, g)
    nodes = [part.clone().requires_grad_() for part in result.nodes]
    hat = nodes[0]
    for level in range(1, len(widths)):
        sure = result.reliabilities[level]
        hat = sure * nodes[level] + (1 - sure) * (hat @ graph.edges[level - 1])
    gradients = torch.autograd.grad(hat.sum(), nodes)
    torch.testing.assert_close(hat.sum(dim=1), result.distance)
    for expected, sensitivity in zip(gradients, result.sensitivities, strict=True):
        torch.testing.assert_close(sensitivity, expected, rtol=1e-12, atol=1e-15)


def test_one_level_is_the_squared_euclidean_distance() -> None:
    q, g = random_rows(4, (7,), 1), random_rows(5, (7,), 2)
    expected = torch.cdist(q.embeddings[0], g.embeddings[0]).square()
    torch.testing.assert_close(broadcast(random_graph((7,), 1), q, g), expected)


def test_broadcast_equals_pair_by_pair() -> None:
    widths = (6, 9, 4)
    graph, q, g = random_graph(widths, 1), random_rows(3, widths, 2), random_rows(4, widths, 3)
    matrix = broadcast(graph, q, g)
    for i in range(3):
        for j in range(4):
            pair = infer(graph, q[slice(i, i + 1)], g[slice(j, j + 1)])
            torch.testing.assert_close(matrix[i, j], pair.distance[0])


def test_rows_survive_packing_and_other_rows_are_refused() -> None:
    known = random_rows(4, (3, 5), 1)
    packed = pack([3 * level for level in known.embeddings], known.certainties)
    again = unpack(packed, (3, 5))
    for one, other in zip((*known.embeddings, *known.certainties),
                          (*again.embeddings, *again.certainties), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)
    assert isinstance(again, Rows)
    assert len(again) == 4
    with pytest.raises(ModelError, match=r"Expected embeddings of shape \(M, 16\)"):
        unpack(packed[:, 1:], (3, 5))
