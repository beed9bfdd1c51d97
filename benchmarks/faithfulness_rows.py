"""The rows of ``faithfulness.py``: every method with sensible options, and the peers' packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from faithfulness_networks import Network
from peers import PEERS, Peer, left_out
from PIL import Image
from scenes import Scene
from torch import Tensor

from simexplain import Comparison, SimilarityModel, explain
from simexplain.fitting.bank import build_bank
from simexplain.methods import METHODS
from simexplain.methods.weight_bank import WeightBank
from simexplain.tracing import trace

LAST, MID, BOTH = "last", "mid", "last x mid"
ALL, SOME, FEW = "all", "some", "few"


@dataclass(frozen=True)
class Row:
    """One way to explain by simexplain.

    Attributes:
        method: A name in ``METHODS``.
        layers: ``last`` (the default), ``mid`` or ``last x mid``.
        options: Of the method.
        magnify: As for ``explain``.
        tier: How many scenes can be afforded: ``all``, ``some`` or ``few``.
        pair: Leave the negative out to save time, as it has no say in this method's map of a
            scene: the scene's direction in the margin is the query.
    """

    method: str
    layers: str = LAST
    options: dict[str, Any] = field(default_factory=dict)
    magnify: int = 1
    tier: str = ALL
    pair: bool = False


def _cams(score: str, layers: str, **options: Any) -> Row:
    return Row("similarity_cam", layers, {"score": score, **options})


ROWS: dict[str, Row] = {
    "sam paper, last": Row("sam", options={"weights": "paper"}),
    "sam relative, last": Row("sam", options={"weights": "relative"}),
    "sam signed, last": Row("sam", options={"weights": "signed"}),
    "sam signed, last x mid": Row("sam", BOTH, {"weights": "signed"}),
    "similarity_cam cosine, last": _cams("cosine", LAST),
    "similarity_cam dot, last": _cams("dot", LAST),
    "similarity_cam held, last": _cams("held", LAST),
    "similarity_cam cosine, last x mid": _cams("cosine", BOTH),
    "similarity_cam grad_cam, mid": _cams("cosine", MID, cam="grad_cam"),
    "similarity_cam hires_cam, mid": _cams("cosine", MID, cam="hires_cam"),
    "similarity_cam layer_cam, mid": _cams("cosine", MID, cam="layer_cam"),
    "decomposition, last": Row("decomposition"),
    "weight_bank, last": Row("weight_bank"),
    "focus": Row("focus"),
    "focus, magnify 2": Row("focus", magnify=2, tier=SOME),
    "saliency": Row("saliency", tier=SOME, pair=True),
    "input_x_gradient": Row("input_x_gradient", tier=SOME, pair=True),
    "smoothgrad": Row("smoothgrad", tier=FEW, pair=True),
    "integrated_gradients": Row("integrated_gradients", tier=FEW, pair=True),
    "occlusion": Row("occlusion", tier=FEW, pair=True),
    "sbsm": Row("sbsm", tier=FEW, pair=True),
    "random_masks": Row("random_masks", tier=FEW, pair=True),
}
"""Rows by name; one whose method is not in ``METHODS`` is left out."""

_ON_ATTENTION = "it reads the attention of transformers, and the networks here are convolutional"
WITHOUT_A_ROW = {
    "avsl": "it explains AVSL models, whose heads have to be fitted first",
    "attention": _ON_ATTENTION,
    "attention_relevance": _ON_ATTENTION,
    "grad_eclip": _ON_ATTENTION,
}
# Any other method as it is, so that a new one has a row.
ROWS |= {
    name: Row(name, tier=FEW)
    for name in METHODS
    if name not in {row.method for row in ROWS.values()} | set(WITHOUT_A_ROW)
}

Explainer = Row | Peer


def contestants(wanted: Sequence[str] | None, bank: bool) -> tuple[dict[str, Explainer], dict]:
    """What is measured, and for all that is not the reason."""
    skipped = {f"`{name}`": reason for name, reason in WITHOUT_A_ROW.items()}
    skipped |= {f"`{name}`": reason for name, reason in left_out(PEERS).items()}
    result: dict[str, Explainer] = {}
    for name, row in ROWS.items():
        if row.method not in METHODS:
            continue
        if row.method == "weight_bank" and not bank:
            skipped[f"`{name}`"] = "its bank is made of emoji, and no folder of them was given"
        else:
            result[name] = row
    result |= {name: peer for name, peer in PEERS.items() if peer.installed}
    if wanted:
        result = {n: row for n, row in result.items() if any(n.startswith(w) for w in wanted)}
    return result, skipped


def needs_bank(rows: Mapping[str, Explainer]) -> bool:
    """Whether one of the rows cannot do without a bank."""
    return any(isinstance(one, Row) and one.method == "weight_bank" for one in rows.values())


@dataclass(frozen=True)
class Batch:
    """Scenes in one setting with what they are compared with, each ``(M,3,H,W)``."""

    scenes: Tensor
    queries: Tensor
    negatives: Tensor

    @classmethod
    def of(cls, network: Network, scenes: Sequence[Scene], setting: str) -> Batch:
        """The pictures as tensors."""
        return cls(
            network.tensors([scene.picture for scene in scenes]),
            network.tensors([scene.queries[setting] for scene in scenes]),
            network.tensors([scene.negative for scene in scenes]),
        )

    def __getitem__(self, places: slice) -> Batch:
        return Batch(self.scenes[places], self.queries[places], self.negatives[places])

    def __len__(self) -> int:
        return len(self.scenes)


def scene_maps(
    one: Explainer,
    model: SimilarityModel,
    layers: tuple[str, str],
    batch: Batch,
    bank: WeightBank | None,
    *,
    whole: bool = False,
) -> Tensor:
    """The scenes' maps ``(M,h,w)`` by one row.

    Args:
        one: The row.
        model: Any form of the network.
        layers: Its last and its finer layer.
        batch: The comparisons.
        bank: Of this network, if there is one.
        whole: Explain the whole triplet even where the scene's map does not need it.
    """
    if isinstance(one, Peer):
        vectors = unit_rows(model, batch.queries)
        if one.target == "margin":
            vectors = vectors - unit_rows(model, batch.negatives)
        return one.explain((model, layers, batch.scenes, vectors))
    comparison = Comparison.triplet(batch.queries, batch.scenes, batch.negatives)
    if one.pair and not whole:
        comparison = Comparison.pair(batch.queries, batch.scenes)
    chosen = {LAST: None, MID: layers[1], BOTH: layers}[one.layers]
    options = dict(one.options)
    if one.method == "weight_bank" and bank is not None:
        options["bank"] = _named(bank, model)
    result = explain(
        model, comparison, one.method, chosen, upscale=one.magnify, **options, check=False
    )
    return result.maps[:, 1]


def _named(bank: WeightBank, model: SimilarityModel) -> WeightBank:
    """The bank for another form of its network, which has the same embeddings."""
    return replace(bank, model=model.name)


def unit_rows(model: SimilarityModel, images: Tensor) -> Tensor:
    """Unit embeddings ``(M,E)``."""
    return trace(model, images, ()).embeddings.detach()


def bank_of(network: Network, pictures: Sequence[Image.Image], labels: Sequence[str]) -> WeightBank:
    """A bank of labelled pictures at the default layer."""
    # A small batch: large ones are slower on a processor.
    images = network.tensors(pictures)
    return build_bank(network.fast, (images, list(labels)), batch_size=16)
