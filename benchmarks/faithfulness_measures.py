"""What ``faithfulness.py`` measures of a row: where it points, its curves, and what it costs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from faithfulness_data import Data, masks_of
from faithfulness_networks import Network, fingerprint, passing
from faithfulness_rows import FEW, SOME, Batch, Explainer, scene_maps, unit_rows
from scenes import Scene
from torch import Tensor
from torch.nn import functional as F

from simexplain.errors import SimexplainError
from simexplain.methods.weight_bank import WeightBank
from simexplain.metrics.curves import deletion, insertion
from simexplain.metrics.maps import energy, grown, pointing

CHUNK = 10
BASELINES = ("blur", "mean")
_ALIKE = 0.99


@dataclass(frozen=True)
class Counts:
    """How many scenes of each seed are used.

    Attributes:
        scenes: For rows that cost a few passes.
        some: For those that cost more.
        few: For those that cost hundreds of passes; one setting only.
        curves: For deletion and insertion.
        steps: Of the curves.
    """

    scenes: int
    some: int
    few: int
    curves: int
    steps: int

    def of(self, one: Explainer, data: Data) -> int:
        """Scenes for a row: none where the data are not for it."""
        if not data.points:
            return 0 if one.tier == FEW else self.curves
        if one.tier == FEW:
            return self.few if data.dear else 0
        share = max(1, round(data.share * self.scenes))
        return min(share, self.some) if one.tier == SOME else share

    def most(self, data: Data) -> int:
        """Scenes of the rows that have the most."""
        return max(1, round(data.share * self.scenes), self.curves, self.few)

    def told(self, one: Explainer, data: Data) -> str:
        """All of it that has a say in the record of a row."""
        count = self.of(one, data)
        return f"scenes={count} curves={min(count, self.drawn(data))} steps={self.steps}"

    def drawn(self, data: Data) -> int:
        """Scenes for deletion and insertion."""
        return self.curves if data.curves else 0


Record = dict[str, np.ndarray]
"""``points_SETTING`` ``(n,3)``: hit, distractor hit, energy; ``curves`` ``(n,8)``: areas under
deletion and insertion and the similarities of the whole and of the replaced scene, under blur and
then under the mean colour."""


def measured(
    network: Network,
    data: Data,
    seed: int,
    rows: Mapping[str, Explainer],
    counts: Counts,
    bank: WeightBank | None,
    plainly: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Record]:
    """Every row on the scenes of one seed; pictures pass the lower part of the network once.

    Args:
        network: The network.
        data: The data.
        seed: Of the scenes.
        rows: What is measured.
        counts: On how many scenes.
        bank: Of this network, if there is one.
        plainly: Rows whose maps the fast forms do not give.
        progress: Called with the number of scenes done and of all.
    """
    result: dict[str, dict[str, list[np.ndarray]]] = {name: defaultdict(list) for name in rows}
    most = max(counts.of(one, data) for one in rows.values())
    scenes = data.make(most, seed)
    for start in range(0, most, CHUNK):
        chunk = scenes[start : start + CHUNK]
        network.forget()
        scores = Scores()
        for setting in data.settings:
            batch = Batch.of(network, chunk, setting)
            directions = unit_rows(network.shared, batch.queries)
            for name, one in rows.items():
                count = min(len(chunk), counts.of(one, data) - start)
                if count <= 0 or (one.tier == FEW and setting != data.settings[-1]):
                    continue
                form = network.fast if one.tier == FEW else network.shared
                form = network.plain if name in plainly else form
                maps = scene_maps(one, form, network.layers, batch[:count], bank)
                result[name][f"points_{setting}"].append(pointed(maps, chunk[:count]))
                drawn = min(count, counts.drawn(data) - start)
                if setting == data.settings[-1] and drawn > 0:
                    requested = (batch.scenes[:drawn], directions[:drawn], maps[:drawn])
                    result[name]["curves"].append(areas(network, *requested, counts.steps, scores))
        if progress is not None:
            progress(min(start + CHUNK, most), most)
    return {
        name: {kind: np.concatenate(parts) for kind, parts in kinds.items()}
        for name, kinds in result.items()
    }


def joined(parts: Sequence[Record], most: int) -> Record:
    """The records of several seeds, each filled up with NaN, so that scenes of rows agree."""

    def filled(values: np.ndarray) -> np.ndarray:
        rest = np.full((most - len(values), values.shape[1]), np.nan)
        return np.concatenate([values, rest])

    return {kind: np.concatenate([filled(part[kind]) for part in parts]) for kind in parts[0]}


def pointed(maps: Tensor, scenes: Sequence[Scene]) -> np.ndarray:
    """Hit, distractor hit and energy inside ``(M,3)``; zeros for an empty map."""
    positive, distractor = masks_of(scenes)
    heat = maps.detach().float()
    result = (pointing(heat, positive), pointing(heat, distractor), energy(heat, positive))
    return torch.stack(result, dim=1).numpy()


class Scores:
    """Similarities by direction and picture: methods share the ends of curves, some all of them."""

    def __init__(self) -> None:
        self._known: dict[bytes, Tensor] = {}

    def along(self, network: Network, direction: Tensor) -> Callable[[Tensor], Tensor]:
        """The similarity of pictures ``(M,3,H,W)`` to a unit row ``(E,)``."""
        start = fingerprint(direction)

        def score(variants: Tensor) -> Tensor:
            keys = [start + fingerprint(variant) for variant in variants]
            places = {key: n for n, key in enumerate(keys) if key not in self._known}
            if places:
                rows = network.fast.embed(variants[list(places.values())])
                self._known.update(zip(places, rows @ direction, strict=True))
            return torch.stack([self._known[key] for key in keys])

        return score


def areas(
    network: Network, images: Tensor, directions: Tensor, maps: Tensor, steps: int, scores: Scores
) -> np.ndarray:
    """What :data:`Record` says of curves ``(M,8)``; the score is the similarity to the query."""
    result = []
    for image, direction, heat in zip(images, directions, maps.detach().float(), strict=True):
        score = scores.along(network, direction)
        row: list[float] = []
        for baseline in BASELINES:
            down, up = (
                curve(score, image, heat, steps=steps, baseline=baseline, max_batch=16)
                for curve in (deletion, insertion)
            )
            row += [down.raw_area, up.raw_area, down.whole, down.empty]
        result.append(row)
    return np.array(result)


def cost(
    network: Network, one: Explainer, batch: Batch, bank: WeightBank | None
) -> tuple[float, float, Tensor]:
    """Passes through the plain network and seconds for one comparison, and the scene's map.

    The median time over the comparisons; one alone of rows that are expensive.
    """
    passes, seconds, maps = [], [], []
    for index in range(1 if one.tier == FEW else len(batch)):
        single = batch[index : index + 1]
        start = time.perf_counter()
        with passing(network.plain) as passed:
            maps.append(scene_maps(one, network.plain, network.layers, single, bank, whole=True))
        seconds.append(time.perf_counter() - start)
        passes.append(sum(passed))
    # The first one may have a dry run in it, which a model makes once.
    return min(passes), float(np.median(seconds)), maps[0]


def same_map(
    network: Network, one: Explainer, batch: Batch, bank: WeightBank | None, plain: Tensor
) -> bool:
    """Whether the form of the network that is used for a row gives the plain network's map."""
    network.forget()
    form = network.fast if one.tier == FEW else network.shared
    try:
        other = scene_maps(one, form, network.layers, batch[:1], bank)
    except SimexplainError:
        return False
    size = (int(plain.shape[-2]), int(plain.shape[-1]))
    pair = (plain.float().flatten(), grown(other.float(), size).flatten())
    alike = F.cosine_similarity(*pair, dim=0) if bool(pair[0].any()) else pair[1].any() * 0 + 1
    return float(alike) > _ALIKE
