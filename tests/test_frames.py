"""Sets of frames as one item: pooled embeddings, a map for each frame, exact gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import Run
from conftest import TinyNet
from figures import written
from pictures import noise
from torch import Tensor
from torch.nn import functional as F

from simexplain import Comparison, Explanation, as_similarity_model, explain
from simexplain.data.images import read_picture
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import ComparisonError, ModelError
from simexplain.methods.focus import Focus, Shots
from simexplain.metrics.curves import blurred, elsewhere, hidden, hottest
from simexplain.models.frames import POOLINGS, FrameSets, tall

COUNTS = (3, 2, 1)


@pytest.fixture
def clips() -> list[Tensor]:
    """An anchor of three frames, a positive of two and a negative of one."""
    generator = torch.Generator().manual_seed(8)
    return [torch.rand(count, 3, 24, 32, generator=generator) for count in COUNTS]


def triplet(clips: list[Tensor]) -> Comparison:
    anchor, positive, negative = (clip[None] for clip in clips)
    return Comparison(anchor, positive[:, None], negative[:, None])


def by_hand(
    network: TinyNet, clips: list[Tensor], pooling: str, weigh: Callable[..., Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Grad-CAM maps ``(T,h,w)`` of every clip and the rows, from plain autograd."""
    kept: list[Tensor] = []
    hook = network.last.register_forward_hook(lambda *call: kept.append(call[2]))
    pooled = [POOLINGS[pooling](F.normalize(network(clip), dim=1)) for clip in clips]
    hook.remove()
    rows = F.normalize(torch.stack(pooled), dim=1)
    scores = [(row * weight).sum() for row, weight in zip(rows, weigh(rows.detach()), strict=True)]
    gradients = torch.autograd.grad(sum(scores), kept)
    maps = [
        (grid * slope.mean((2, 3), keepdim=True)).sum(1).relu()
        for grid, slope in zip(kept, gradients, strict=True)
    ]
    return [one.detach() for one in maps], rows.detach()


def margins(rows: Tensor) -> Tensor:
    return torch.stack((rows[1] - rows[2], rows[0], -rows[0]))


def weights(rows: Tensor) -> Tensor:
    anchor, near, far = rows
    return ((1 - (anchor - near).abs()) * (anchor - far).abs()).expand(3, -1)


@pytest.mark.parametrize("pooling", list(POOLINGS))
@pytest.mark.parametrize(("method", "weigh"), [("similarity_cam", margins), ("sam", weights)])
def test_maps_of_frames_are_those_of_plain_autograd_through_the_pooling(
    tiny: TinyNet, clips: list[Tensor], method: str, weigh: Callable[..., Tensor], pooling: str
) -> None:
    result = explain(tiny, triplet(clips), method, "last", pooling=pooling)
    wanted, rows = by_hand(tiny, clips, pooling, weigh)
    assert result.frames == COUNTS
    assert result.maps.shape[:2] == (1, sum(COUNTS))
    torch.testing.assert_close(result.maps[0], torch.cat(wanted), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result.embeddings[0], rows)
    torch.testing.assert_close(result.distances[0], (rows[0] - rows[1:]).norm(dim=1))
    assert torch.equal(result.images[0], torch.cat(clips))


def test_saliency_of_frames_is_the_gradient_at_their_pixels(
    tiny: TinyNet, clips: list[Tensor]
) -> None:
    result = explain(tiny, triplet(clips), "saliency")
    leaves = [clip.clone().requires_grad_() for clip in clips]
    rows = F.normalize(
        torch.stack([F.normalize(tiny(clip), dim=1).mean(0) for clip in leaves]), dim=1
    )
    scores = (rows * margins(rows.detach())).sum()
    actual = torch.autograd.grad(scores, leaves)
    wanted = torch.cat([slope.abs().amax(dim=1) for slope in actual])
    torch.testing.assert_close(result.maps[0], wanted, rtol=1e-3, atol=1e-7)


def test_a_set_of_one_frame_is_the_image(tiny: TinyNet, clips: list[Tensor]) -> None:
    images = [clip[:1] for clip in clips]
    for method in ("sam", "similarity_cam"):
        plain = explain(tiny, Comparison.triplet(*images), method)
        sets = explain(tiny, triplet(images), method)
        torch.testing.assert_close(sets.maps, plain.maps)
        torch.testing.assert_close(sets.heatmaps, plain.heatmaps)
        torch.testing.assert_close(sets.scores, plain.scores)


def test_a_frame_that_is_repeated_changes_nothing_but_shares_its_map(
    tiny: TinyNet, clips: list[Tensor]
) -> None:
    """The mean of equal embeddings is one of them, and each frame has a part of the gradient."""
    once = [clip[:1] for clip in clips]
    twice = [once[0].expand(2, -1, -1, -1), *once[1:]]
    one, two = (explain(tiny, triplet(each), "similarity_cam") for each in (once, twice))
    torch.testing.assert_close(two.distances, one.distances)
    torch.testing.assert_close(two.maps[:, 0] + two.maps[:, 1], one.maps[:, 0])


SIDES = (((1,), (2,)), ((0,), (2,)), ((2,), (0,)))
"""Which sets of a triplet support each, and which oppose it; a negative is its own."""


def focus_by_hand(network: TinyNet, clips: list[Tensor], rows: Tensor) -> list[Tensor]:
    """The maps of ``focus`` without Gaussian and detail, frame by frame; scaled set by set."""
    kept: dict[str, list[Tensor]] = {"act": [], "last": []}
    hooks = [
        getattr(network, name).register_forward_hook(lambda _m, _a, out, own=own: own.append(out))
        for name, own in kept.items()
    ]
    vectors = [[network(frame[None])[0] for frame in clip] for clip in clips]
    for hook in hooks:
        hook.remove()
    fine, coarse = (iter(kept[name]) for name in ("act", "last"))
    fine, coarse = ([[next(own) for _ in clip] for clip in clips] for own in (fine, coarse))
    maps = []
    for item, (near, far) in enumerate(SIDES):
        direction = rows[list(near)].mean(0) - rows[list(far)].mean(0)
        cams, gates, finds = [], [], []
        for vector, act, last in zip(vectors[item], fine[item], coarse[item], strict=True):
            (slope,) = torch.autograd.grad(vector @ direction, last, retain_graph=True)
            alpha = slope.mean((2, 3), keepdim=True)
            cells = direction.norm() * F.cosine_similarity(alpha, last, dim=1)
            evidence = (F.softplus(20 * cells) * last.detach().norm(dim=1)).sum()
            (gradient,) = torch.autograd.grad(evidence, act)
            cams.append((gradient.relu() * act).sum(1)[0].detach())
            grown = F.interpolate(cells[None].detach(), act.shape[2:], mode="bilinear")
            gates.append(torch.sigmoid(20 * grown)[0, 0])
            unit = F.normalize(act, dim=1)[0].flatten(1)
            best = []
            for side in (near, far):
                others = [F.normalize(one, dim=1)[0].flatten(1) for n in side for one in fine[n]]
                best.append((unit.T @ torch.cat(others, dim=1)).amax(1))
            finds.append((best[0] - best[1]).relu().view(act.shape[2:]).detach())
        cam, gate, find = (torch.stack(parts) for parts in (cams, gates, finds))
        own = cam / cam.max() * gate * (1 + 3 * find / find.max())
        maps.append((own / own.max()) ** 3)
    return maps


@pytest.mark.parametrize("pooling", POOLINGS)
def test_focus_looks_at_every_frame_by_itself(
    tiny: TinyNet, clips: list[Tensor], pooling: str
) -> None:
    _, rows = by_hand(tiny, clips, pooling, margins)
    method = Focus(smoothing=0, detail=0, peak=3, positions=1)
    result = explain(tiny, triplet(clips), method, ("act", "last"), pooling=pooling, check=False)
    torch.testing.assert_close(result.embeddings[0], rows, rtol=1e-4, atol=1e-6)
    if pooling == "mean":  # where every frame counts alike
        wanted = torch.cat(focus_by_hand(tiny, clips, rows))
        torch.testing.assert_close(result.maps[0], wanted, rtol=1e-3, atol=1e-6)


def test_frames_that_nothing_is_taken_from_have_no_focus(
    tiny: TinyNet, clips: list[Tensor]
) -> None:
    """Of two equal frames the largest values are both's; of a dominated one nothing is."""
    rows = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.05]])
    sets = FrameSets(as_similarity_model(tiny), 3, "max")
    images = tall(torch.stack([torch.rand(3, 3, 24, 32)] * 2))
    shots = Shots(Comparison.pair(images[:1], images[1:]), sets)
    along, counts = shots.directions(torch.tensor([[[1.0, -2.0], [0.0, 1.0]]]), rows.repeat(2, 1))
    assert torch.equal(along[:3], torch.tensor([[1.0, -2.0], [1.0, -2.0], [0.0, 0.0]]))
    assert counts.flatten().tolist() == [1, 1, 0, 1, 1, 0]


def test_sets_of_one_frame_are_explained_as_images(tiny: TinyNet, clips: list[Tensor]) -> None:
    single = [clip[:1] for clip in clips]
    framed = explain(tiny, triplet(single))
    plain = explain(tiny, Comparison.triplet(*(clip for clip in single)))
    assert [row.method for row in framed.rows] == ["sam", "focus"]
    for one, two in zip(framed.rows, plain.rows, strict=True):
        torch.testing.assert_close(one.maps, two.maps, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(one.check.moved, two.check.moved, rtol=1e-4, atol=1e-6)
        assert one.check.images == two.check.images


def test_the_check_hides_the_hottest_tenth_of_a_whole_set(
    tiny: TinyNet, clips: list[Tensor]
) -> None:
    result = explain(tiny, triplet(clips), "similarity_cam")
    first = [True, False, False, True, False, True]
    assert result.check.falls[0].isfinite().tolist() == first
    assert [bool(result.check.says(0, place)) for place in range(6)] == first
    assert result.check.images == 3 * sum(COUNTS)

    def row(frames: Tensor) -> Tensor:
        return F.normalize(F.normalize(tiny(frames), dim=1).mean(0), dim=0)

    rows = [row(clip) for clip in clips]
    whole = (rows[0] - rows[2]).norm() - (rows[0] - rows[1]).norm()
    with torch.no_grad():
        for place, item, count in ((0, 0, 3), (3, 1, 2), (5, 2, 1)):
            heat = result.heatmaps[0, place : place + count]
            mask = hottest(heat.flatten(0, 1))
            assert int(mask.sum()) <= count * 24 * 32 // 10
            veil = blurred(clips[item]).movedim(1, 0).flatten(1, 2)
            image = clips[item].movedim(1, 0).flatten(1, 2)
            for where, falls in ((mask, "falls"), (elsewhere(mask), "controls")):
                changed = hidden(image, where, veil).unflatten(1, (count, 24)).movedim(0, 1)
                after = [row(changed) if n == item else one for n, one in enumerate(rows)]
                margin = (after[0] - after[2]).norm() - (after[0] - after[1]).norm()
                found = float(getattr(result.check, falls)[0, place])
                assert found == pytest.approx(float(whole - margin), abs=1e-6)
    assert "sam" not in {row.method for row in result.rows}


def test_frames_of_one_item_are_drawn_on_one_scale(tiny: TinyNet, clips: list[Tensor]) -> None:
    dim = [clip.clone() for clip in clips]
    dim[0][0] *= 0.05
    result = explain(tiny, triplet(dim), "similarity_cam")
    tops = result.heatmaps[0].amax(dim=(1, 2))
    shown = result.maps[0].amax(dim=(1, 2))
    for frames in ((0, 1, 2), (3, 4), (5,)):
        own = list(frames)
        assert tops[own].max() == pytest.approx(1)
        assert tops[own].argmax() == shown[own].argmax()
    assert tops[:3].min() < 0.99


def test_the_model_and_the_images_are_left_as_they_were(tiny: TinyNet, clips: list[Tensor]) -> None:
    tiny.train()
    before = [clip.clone() for clip in clips]
    state = {name: value.clone() for name, value in tiny.state_dict().items()}
    explain(tiny, triplet(clips))
    assert tiny.training
    assert all(torch.equal(a, b) for a, b in zip(before, clips, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in tiny.state_dict().items())


def test_sets_against_a_given_vector_and_upscaled(tiny: TinyNet, clips: list[Tensor]) -> None:
    vector = F.normalize(torch.randn(10, generator=torch.Generator().manual_seed(2)), dim=0)
    comparison = Comparison(clips[0][None], vector[None, None], vector[None, None][:, :0])
    result = explain(tiny, comparison, "similarity_cam", upscale=2)
    row = F.normalize(F.normalize(tiny(clips[0]), dim=1).mean(0), dim=0)
    assert result.frames == (3,)
    assert result.members == ("anchor", "positive vector")
    assert result.images.shape == (1, 3, 3, 48, 64)
    torch.testing.assert_close(result.embeddings[0, 0], row.detach())
    assert result.moved is not None
    assert result.moved.shape == (1, 3)


def test_what_does_not_fit_is_one_sentence(tiny: TinyNet, clips: list[Tensor]) -> None:
    sets = triplet(clips)
    hole = [clip.clone() for clip in clips]
    hole[0][1] = torch.nan
    for comparison, options, kind, record in (
        (sets, {"method": "occlusion"}, ModelError, "explained by the methods sam"),
        (sets, {"layer": ["stem", "last"]}, ModelError, "at one layer"),
        (sets, {"pooling": "median"}, ModelError, "pooling of mean, max"),
        (triplet(hole), {}, ComparisonError, "at their end"),
    ):
        with pytest.raises(kind, match=record) as caught:
            explain(tiny, comparison, **options)
        assert str(caught.value).endswith(".")
    fixed = as_similarity_model(tiny)
    fixed.batch_size = 1
    with pytest.raises(ModelError, match="takes 3 frames in one pass, but TinyNet takes 1"):
        explain(fixed, sets)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A folder of three frames, an animation of two, and a picture."""
    (tmp_path / "clip").mkdir()
    for number in range(3):
        noise(40, 60, seed=number).save(tmp_path / "clip" / f"{number}.png")
    first, second = noise(40, 60, seed=3), noise(40, 60, seed=4)
    first.save(tmp_path / "pages.tiff", save_all=True, append_images=[second])
    noise(40, 60, seed=5).save(tmp_path / "one.png")
    return [tmp_path / "clip", tmp_path / "pages.tiff", tmp_path / "one.png"]


def test_folders_and_pages_are_items(tiny: TinyNet, folders: list[Path], tmp_path: Path) -> None:
    prepare = Preprocess(size=(24, 32), fit="squash")
    model = as_similarity_model(tiny, preprocess=prepare)
    result = explain(model, folders, arch="triplet", pooling="max")
    assert result.frames == (3, 2, 1)
    assert not any("The images reach" in line for line in result.warnings)
    names = [Path(picture.path).name for picture in result.pictures]
    assert names == ["0.png", "1.png", "2.png", "pages.tiff#1", "pages.tiff#2", "one.png"]
    stack = [prepare(noise(40, 60, seed=seed))[0] for seed in range(6)]
    wanted = explain(
        model, triplet([torch.stack(stack[:3]), torch.stack(stack[3:5]), stack[5][None]]),
        pooling="max",
    )  # fmt: skip
    torch.testing.assert_close(result.maps, wanted.maps)
    assert len(result.peaks()) == 6
    result.save(tmp_path / "out")
    again = Explanation.load(tmp_path / "out")
    assert again.frames == result.frames
    assert again.roles == ("anchor",) * 3 + ("positive",) * 2 + ("negative",)
    assert torch.equal(again.heatmaps, result.heatmaps)
    titles = written(again.figure(), "above")
    assert any(title.startswith("positive, frame 2") for title in titles)
    first = explain(model, folders[1:], arch="siamese")
    assert first.frames == ()
    assert any("2 frames; the first one is used" in line for line in first.warnings)
    assert first.pictures[0].image.tobytes() == read_picture(folders[1]).image.tobytes()


def test_the_command_line(
    run: Callable[..., Run], fails: Callable[..., str], here: Path, folders: list[Path]
) -> None:
    network = ("timm:test_resnet.r160_in1k", "--untrained", "--size", "64")
    done = run("explain", *network, *folders[:2], "--arch", "siamese", "--frames", "mean",
               "--out", "o", "--json")  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["frames"] == [3, 2]
    assert [image["role"] for image in record["images"]] == ["anchor"] * 3 + ["positive"] * 2
    plain = run("explain", *network, folders[0], folders[2], "--arch", "siamese", "--out", "p")
    assert plain.code == 0, plain.err
    assert sum(" anchor " in line for line in plain.out.splitlines()) == 3
    (here / "empty").mkdir()
    assert "found none" in fails("explain", *network, "empty", "a.png", "--arch", "siamese")
    assert "methods sam" in fails(
        "explain", *network, folders[0], "a.png", "--arch", "siamese", "--method", "occlusion"
    )
