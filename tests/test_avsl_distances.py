"""Distances of all pairs by the AVSL graph: every fast way against the plain one."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cli_runs import benchmark
from test_benchmarks import table_rows
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from simexplain.errors import ModelError
from simexplain.graph import distances as choice
from simexplain.graph.distances import Expansion, distances, planned
from simexplain.graph.inference import Graph, Rows, broadcast, infer, normalised_edges
from simexplain.graph.neighbours import Surrogate, neighbours
from simexplain.graph.tiled import ExactPairs, exact, gathered

SHAPES = [(24,), (24, 24), (20, 28, 24), (10, 30, 16, 24)]
REGIMES = ["initial", "hard"]


def made(
    widths: tuple[int, ...] = (24, 24, 24),
    images: int = 80,
    *,
    regime: str = "initial",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    odd: bool = False,
) -> tuple[Graph, Rows]:
    """A graph and clustered rows; ``odd`` adds nodes without edges and infinite offsets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    edges, slopes, offsets = [], [], []
    for low, high in pairwise(widths):
        raw = normal(low, high).abs()
        if odd:
            raw[:, 1] = 0
            raw[2] = 0
        edges.append(normalised_edges(raw, max(2, low // 4), ties="first", epsilon=0.0))
        slopes.append(10 * (1 + 0.1 * normal(high) if regime == "initial" else 20 * normal(high)))
        offsets.append((0.1 if regime == "initial" else 1.0) * normal(high))
        if odd:
            offsets[-1][1] = torch.inf
            slopes[-1][3] = 0
    graph = Graph(tuple(edges), tuple(slopes), tuple(offsets), widths[0])
    labels = torch.arange(images) // 4
    embeddings = [
        F.normalize(normal(1, r) + normal(images, r)[labels] + normal(images, r)) for r in widths
    ]
    certainties = [
        (0.017 * torch.exp(0.25 * normal(images, 1) + 0.25 * normal(images, r))).clamp(0.005, 0.05)
        for r in widths
    ]
    like = torch.zeros(0, dtype=dtype)
    return graph.to(like), Rows(tuple(embeddings), tuple(certainties)).to(like)


def doubled(graph: Graph, *rows: Rows) -> Tensor:
    """Reference distances in float64."""
    like = torch.zeros(0, dtype=torch.float64)
    return broadcast(graph.to(like), *(part.to(like) for part in rows))


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("widths", SHAPES)
def test_exact_is_inference(widths, regime, odd) -> None:
    graph, rows = made(widths, regime=regime, odd=odd)
    for tile in (None, 1, 7, 100):
        result = exact(graph, rows[:30], rows[20:], tile=tile)
        torch.testing.assert_close(
            result, broadcast(graph, rows[:30], rows[20:]), rtol=1e-12, atol=1e-14
        )
    paired = infer(graph, rows[:30], rows[30:60]).distance
    torch.testing.assert_close(exact(graph, rows[:30], rows[30:60]).diagonal(), paired)
    single = exact(graph.to(torch.zeros(0)), rows[:30].to(torch.zeros(0)), rows[20:])
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single,
        doubled(graph, rows[:30].to(torch.zeros(0)), rows[20:]).float(),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("tile", [None, 5, 64])
def test_a_set_with_itself_is_mirrored(tile) -> None:
    graph, rows = made(dtype=torch.float32)
    mirrored = exact(graph, rows, tile=tile)
    assert torch.equal(mirrored, exact(graph, rows, rows, tile=tile))
    assert torch.equal(mirrored, mirrored.T)
    copy = rows[torch.arange(len(rows))]
    torch.testing.assert_close(mirrored, exact(graph, rows, copy, tile=tile), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("regime", REGIMES)
def test_identical_images_have_distance_zero(regime) -> None:
    graph, rows = made(regime=regime, dtype=torch.float32)
    twice = rows[torch.arange(len(rows)).repeat(2)]
    result = exact(graph, twice)
    assert (result.diagonal() == 0).all()
    assert (result.diagonal(len(rows)) == 0).all()
    assert (result + torch.eye(len(result)) + torch.eye(len(result)).roll(len(rows), 1) > 0).all()


def test_one_level_is_the_euclidean_distance() -> None:
    graph, rows = made((24,))
    expected = torch.cdist(rows.embeddings[0], rows.embeddings[0]).square()
    torch.testing.assert_close(exact(graph, rows), expected, rtol=1e-9, atol=1e-12)
    surrogate = Surrogate.build(graph, rows)
    vectors = surrogate.vectors(rows)
    torch.testing.assert_close(torch.cdist(vectors, vectors).square(), expected)


@pytest.mark.parametrize("tile", [None, 1, 6, 50])
def test_listed_distances_are_those_of_the_matrix(tile) -> None:
    graph, rows = made((20, 28, 24))
    chosen = torch.randint(80, (33, 11))
    result = gathered(graph, rows[:33], rows, chosen, tile=tile)
    torch.testing.assert_close(result, exact(graph, rows[:33], rows).gather(1, chosen))
    assert gathered(graph, rows[:3], rows, chosen[:3, :0]).shape == (3, 0)
    with pytest.raises(ModelError, match="list"):
        gathered(graph, rows, rows, chosen)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("widths", SHAPES)
def test_bounds_are_bounds(widths, regime, dtype, odd) -> None:
    for seed in range(5):
        graph, rows = made(widths, regime=regime, dtype=dtype, seed=seed, odd=odd)
        q, g = rows[:40], rows[30:]
        surrogate = Surrogate.build(graph, g, pairs=300)
        true = doubled(graph, q, g)
        apart = surrogate.vectors(q).double().unsqueeze(1) - surrogate.vectors(g).double()
        near = apart.square().sum(dim=2) * surrogate.ratios(q).double().unsqueeze(1)
        assert (near <= true * (1 + 100 * surrogate.unit)).all()
        bounds = surrogate.lower_bounds(q, g, tile=7).double()
        assert (bounds <= true).all()
        assert (bounds <= exact(graph, q, g).double()).all()
        # Bounds that say nothing would pass; these are near.
        tightness = (bounds / true.clamp_min(1e-9))[true > true.mean() / 2].mean()
        assert tightness > (0.97 if regime == "initial" else 0.4)
        assert (surrogate.ratios(q) >= 0).all()
        assert (surrogate.ratios(q) <= 1).all()


@pytest.mark.parametrize("offset", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("slope", [-4e4, -2e3, 0.0, 2e3, 4e4])
def test_the_line_lies_below_the_reliability(slope, offset) -> None:
    graph, rows = made((24, 24))
    graph = Graph(
        graph.edges, (torch.full((24,), slope).double(),), (torch.full((24,), offset),), 24
    )
    surrogate = Surrogate.build(graph.to(rows.embeddings[0]), rows)
    height, rate, middle = surrogate._line(1, rows)
    share = torch.linspace(0, 1, 51, dtype=torch.float64)[:, None, None]
    other = surrogate.least[1] + share * (surrogate.most[1] - surrogate.least[1])
    line = height + rate * (other - middle)
    p = surrogate.graph.reliability(1, rows.certainties[1], other)
    assert (line <= p + 1e-12).all()
    # It touches: a constant far below would be a bound too.
    assert ((p - line).amin(dim=0) < 1e-9).all()


def brute(
    graph: Graph, q: Rows, g: Rows, k: int, *, exclude: bool = False
) -> tuple[Tensor, Tensor]:
    all_ = exact(graph, q, g[torch.arange(len(g))])
    if exclude:
        all_.fill_diagonal_(torch.inf)
    values, indices = all_.sort(dim=1, stable=True)
    return values[:, :k], indices[:, :k]


class Garbage:
    """An index that finds something, useful or not."""

    def search(self, vectors, n):
        generator = torch.Generator().manual_seed(len(vectors))
        result = torch.randint(-1, 90, (len(vectors), n), generator=generator)
        result[:, 0] = -1
        return torch.zeros(len(vectors), n).numpy(), result.numpy()


class Nothing:
    """An index that finds nothing, and too little of it."""

    def search(self, vectors, n):
        return torch.zeros(len(vectors), 1).numpy(), torch.full((len(vectors), 1), -1).numpy()


@pytest.mark.parametrize("index", [None, Garbage(), Nothing()])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
def test_neighbours_are_those_of_all_distances(regime, exclude, index) -> None:
    for seed, widths in enumerate(SHAPES):
        graph, rows = made(widths, regime=regime, seed=seed, odd=seed > 1)
        for k, shortlist, block in ((1, 1, 7), (5, None, 512), (8, 8, 33), (79, None, 80)):
            result = neighbours(
                graph, rows, rows, k,
                shortlist=shortlist, block=block, exclude_self=exclude, index=index,
            )  # fmt: skip
            values, indices = brute(graph, rows, rows, k, exclude=exclude)
            assert torch.equal(result.indices, indices)
            torch.testing.assert_close(result.distances, values)
            assert (result.margins >= 0).all()
            assert (result.reranked >= k).all()
            assert (result.reranked <= 80 - exclude).all()


def test_neighbours_skip_most_of_the_gallery() -> None:
    graph, rows = made(images=300, dtype=torch.float32)
    result = neighbours(graph, rows, None, 3, shortlist=10)
    assert torch.equal(result.indices, brute(graph, rows, rows, 3)[1])
    assert result.reranked.float().mean() < 30
    assert result.distances.dtype == torch.float32
    double = rows.to(torch.zeros(0, dtype=torch.float64))
    assert torch.equal(neighbours(graph, rows, double, 3).indices, result.indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("regime", REGIMES)
def test_of_equal_neighbours_the_first_row_comes_first(regime, dtype) -> None:
    graph, rows = made(images=40, regime=regime, dtype=dtype)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    gallery = rows[torch.arange(40).repeat(3)[order]]
    # Each pair once: a product of identical rows may round differently in different places.
    true = exact(graph, rows, rows[torch.arange(40)])[:, torch.arange(40).repeat(3)[order]]
    values, indices = true.sort(dim=1, stable=True)
    for k in (1, 2, 4, 7):
        result = neighbours(graph, rows, gallery, k, shortlist=k)
        assert torch.equal(result.indices, indices[:, :k])
        torch.testing.assert_close(result.distances, values[:, :k])
        assert (result.distances[:, 0] == 0).all()


def test_neighbours_with_faiss() -> None:
    faiss = pytest.importorskip("faiss", reason="an index is searched: pip install faiss-cpu")
    for regime in REGIMES:
        graph, rows = made(images=200, regime=regime, dtype=torch.float32)
        vectors = Surrogate.build(graph, rows).vectors(rows).numpy()
        index = faiss.IndexFlatL2(vectors.shape[1])
        index.add(vectors)
        approximate = faiss.IndexHNSWFlat(vectors.shape[1], 4)
        approximate.add(vectors)
        for searched in (index, approximate):
            result = neighbours(graph, rows, rows, 6, index=searched, exclude_self=True)
            assert torch.equal(result.indices, brute(graph, rows, rows, 6, exclude=True)[1])
            assert (result.margins >= 0).all()


def test_neighbours_of_nothing_and_of_too_few() -> None:
    graph, rows = made(images=12)
    assert neighbours(graph, rows, rows, 0).distances.shape == (12, 0)
    assert neighbours(graph, rows[:0], rows, 3).indices.shape == (0, 3)
    assert neighbours(graph, rows, rows[:0], 0).indices.shape == (12, 0)
    assert neighbours(graph, rows, rows, 12).margins.isinf().all()
    for k, exclude in ((13, False), (12, True), (-1, False)):
        with pytest.raises(ModelError, match=f"got {k}; ask for fewer"):
            neighbours(graph, rows, rows, k, exclude_self=exclude)
    with pytest.raises(ModelError, match="exclude"):
        neighbours(graph, rows[:5], rows, 1, exclude_self=True)
    with pytest.raises(ModelError, match="block"):
        neighbours(graph, rows, rows, 1, block=0)
    assert exact(graph, rows[:0], rows).shape == (0, 12)
    assert exact(graph, rows, rows[:0]).shape == (12, 0)


def test_rows_of_another_model_are_refused() -> None:
    graph, _ = made((24, 24, 24))
    _, rows = made((24, 24))
    for call in (exact, distances, lambda g, r: neighbours(g, r, r, 1), Surrogate.build):
        with pytest.raises(ModelError, match=r"model that the graph is from"):
            call(graph, rows)
    with pytest.raises(ModelError, match="tile"):
        exact(graph, made()[1], tile=0)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("widths", SHAPES)
def test_the_expansion_errs_no_more_than_it_says(widths, regime, odd) -> None:
    graph, rows = made(widths, 300, regime=regime, odd=odd)
    true = exact(graph, rows)
    errors = []
    for degree, rank in ((1, 1), (2, 2), (3, 4)):
        result = Expansion.build(graph, rows, None, degree, rank)
        matrix = result.matrix(block=70)
        assert matrix.isfinite().all()
        assert (matrix >= 0).all()
        assert torch.equal(matrix, matrix.T)
        errors.append(float((matrix - true).abs().amax() / true.mean()))
        # 64 x 64 images of 300 x 300 pairs are measured. The largest of twenty times as many
        # values with exponential tails is some (ln 9e4 / ln 4e3) = 1.4 times larger; 3 is safe.
        assert errors[-1] <= 3 * result.error + 1e-12
        assert result.error <= 1.5 * errors[-1] + 1e-12
    if len(widths) == 1:
        assert errors[0] < 1e-12
    else:
        assert errors[0] < (2e-3 if regime == "initial" else 0.3)


def test_the_expansion_of_two_sets() -> None:
    graph, rows = made((20, 28, 24), 120, dtype=torch.float32)
    result = Expansion.build(graph, rows[:50], rows[40:], 2, 24)
    true = exact(graph, rows[:50], rows[40:])
    matrix = result.matrix(block=32)
    assert (matrix - true).abs().amax() / true.mean() < 2e-4
    torch.testing.assert_close(result.rows(slice(3, 9)), matrix[3:9], rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="rank 1"):
        Expansion.build(graph, rows, rows, 1, 0)
    with pytest.raises(ModelError, match="at least 1 query"):
        Expansion.build(graph, rows[:0], rows)


def test_reliabilities_that_never_change_leave_nothing_to_couple() -> None:
    graph, rows = made()
    graph = Graph(graph.edges, tuple(torch.zeros_like(s) for s in graph.slopes), graph.offsets, 24)
    matrix = Expansion.build(graph, rows, None, 2, 2).matrix()
    torch.testing.assert_close(matrix, exact(graph, rows), rtol=1e-9, atol=1e-10)
    fixed = Rows(rows.embeddings, tuple(level[:1].expand(80, -1) for level in rows.certainties))
    graph, _ = made(regime="hard")
    matrix = Expansion.build(graph, fixed, None, 3, 2).matrix()
    torch.testing.assert_close(matrix, exact(graph, fixed), rtol=1e-6, atol=1e-7)


def test_distances_choose_by_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "WORTH_EXPANDING", 1)
    graph, rows = made(images=100, regime="hard")
    true = exact(graph, rows)
    plan = planned(graph, rows, None, 1.0)
    assert (plan.method, plan.degree, plan.rank, plan.tried) == ("expansion", 1, 1, ())
    assert plan.expansion is not None
    assert plan.error == plan.expansion.error > 0
    torch.testing.assert_close(distances(graph, rows, accuracy=1.0), plan.expansion.matrix())
    middle = planned(graph, rows, None, plan.error * 0.7)
    assert middle.tried[0] == plan.error
    none = planned(graph, rows, None, 1e-9)
    assert (none.method, none.error, none.expansion, len(none.tried)) == ("exact", 0, None, 3)
    assert torch.equal(distances(graph, rows, accuracy=1e-9), true)
    assert torch.equal(distances(graph, rows), true)
    with pytest.raises(ModelError, match="above 0"):
        distances(graph, rows, accuracy=0.0)
    monkeypatch.undo()
    assert planned(graph, rows, None, 1.0) == choice.DistancePlan(
        "exact"
    )  # 10,000 pairs are soon done


@pytest.mark.parametrize("most", [2**25, 5000])
def test_distances_have_gradients_where_they_are_wanted(monkeypatch, most) -> None:
    monkeypatch.setattr(choice, "BROADCAST_NUMBERS", most)
    graph, rows = made(images=20)
    slopes = tuple(slope.clone().requires_grad_() for slope in graph.slopes)
    learned = Graph(graph.edges, slopes, graph.offsets, graph.bottom)
    assert planned(learned, rows).method == "broadcast"
    weights = torch.randn(12, 20, dtype=torch.float64)
    result = distances(learned, rows[:12], rows)
    grads = torch.autograd.grad((result * weights).sum(), slopes)
    expected = torch.autograd.grad((broadcast(learned, rows[:12], rows) * weights).sum(), slopes)
    torch.testing.assert_close(grads, expected)
    with torch.no_grad():
        assert planned(learned, rows).method == "exact"
        torch.testing.assert_close(distances(learned, rows[:12], rows), result)
    assert not exact(learned, rows).requires_grad


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor made has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.untyped_storage().nbytes() // 8)
        return result


def test_no_tensor_is_large() -> None:
    graph, rows = made(images=400)
    q, r = rows[:200], 24
    with Largest() as tiled:
        exact(graph, q, rows, tile=64)
    assert tiled.most <= max(200 * 400, 4 * 64 * r)
    with Largest() as searched:
        neighbours(graph, q, rows, 4, block=16, tile=64)
    # The pairs that the means are taken of are as many for any gallery.
    assert searched.most <= max(2048 * r, 400 * 3 * r)
    with Largest() as listed:
        ExactPairs(graph, q, rows, 64).listed(slice(0, 200), torch.zeros(200, 50, dtype=torch.long))
    assert listed.most <= 200 * 50
    expansion = Expansion.build(graph, q, rows)
    with Largest() as expanded:
        expansion.matrix(block=50)
    assert expanded.most <= 200 * 400
    with Largest() as plain:
        broadcast(graph, q, rows)
    assert plain.most == 200 * 400 * r  # the measure measures


def test_the_random_state_is_left_alone_and_results_repeat() -> None:
    graph, rows = made(images=60, regime="hard")
    state = torch.random.get_rng_state()
    first = Expansion.build(graph, rows, None, 2, 2)
    result = neighbours(graph, rows, None, 3)
    torch.manual_seed(5)
    again = Expansion.build(graph, rows, None, 2, 2)
    torch.random.set_rng_state(state)
    Surrogate.build(graph, rows)
    distances(graph, rows, accuracy=1e-2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.matrix(), again.matrix())
    assert torch.equal(result.margins, neighbours(graph, rows, None, 3).margins)


@pytest.mark.gpu
@pytest.mark.parametrize("regime", REGIMES)
def test_on_a_gpu(regime) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    like = torch.zeros(0, device="cuda")
    graph, rows = made(images=300, regime=regime, dtype=torch.float32)
    true = exact(graph, rows)
    graph, rows = graph.to(like), rows.to(like)
    result = exact(graph, rows)
    assert result.device.type == "cuda"
    torch.testing.assert_close(result.cpu(), true, rtol=1e-5, atol=1e-6)
    nearest = neighbours(graph, rows, None, 5)
    values = true.sort(dim=1).values[:, :5]
    torch.testing.assert_close(nearest.distances.cpu(), values, rtol=1e-5, atol=1e-6)
    expansion = Expansion.build(graph, rows)
    apart = (expansion.matrix().cpu() - true).abs().amax() / true.mean()
    assert apart <= 3 * expansion.error


def test_the_benchmark_writes_its_page(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    tiny = ("--sizes", 120, "--nodes", 16, "--edges", 4, "--rounds", 2, "--no-memory")
    benchmark("avsl_distance.py", *tiny, "--out", out)
    page = out.read_text(encoding="utf-8")
    rows = table_rows(page, "images | coefficients | method")
    names = {cells[2] for cells in rows}
    assert {"published", "exact, tiled", "nearest neighbours"} <= names
    for _, _, name, seconds, ratio, *_ in rows:
        assert float(seconds) > 0
        assert float(re.findall(r"\d+\.?\d*", ratio)[0]) > 0
        assert name != "published" or ratio.startswith("1.0")
    assert len(table_rows(page, "target")) >= 4
    same = table_rows(page, "images | coefficients | K")
    assert len(same) == 2 * 3
    assert {tuple(cells[3:5]) for cells in same} == {("100 %", "equal")}
    assert str(tmp_path) not in page
    assert "--sizes 120 --nodes 16 --edges 4 --rounds 2" in page
