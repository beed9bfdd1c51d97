"""Maps by other packages, written as their own documentation would have a user write them.

None of them knows comparisons: each explains the scene alone, with the cosine to a vector that the
user has computed before (the query's unit embedding, or query minus negative) as its target. A
package that is not installed is left out. Those that do not install beside ours go to a folder:

    pip install --no-deps --target PEERS xaitk-saliency smqtk-core smqtk-classifier \
        smqtk-descriptors smqtk-detection smqtk-dataprovider smqtk-image-io \
        distance-explainer dianna xarray pandas
    PYTHONPATH=PEERS python benchmarks/faithfulness.py ...
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from simexplain import SimilarityModel

LoadedItem = tuple[SimilarityModel, tuple[str, str], Tensor, Tensor]
"""A model, its last and its finer layer, scenes ``(M,3,H,W)``, and a vector for each ``(M,E)``."""

SEED = 0


@dataclass(frozen=True)
class Peer:
    """One way to use a package.

    Attributes:
        package: Its name in the package index.
        module: What it is imported as.
        explain: Maps ``(M,h,w)`` for what is asked.
        target: ``query``, or ``margin`` for query minus negative.
        tier: How many scenes can be afforded, as for the rows of ``faithfulness_rows.py``.
    """

    package: str
    module: str
    explain: Callable[[LoadedItem], Tensor]
    target: str = "query"
    tier: str = "all"

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str:
        """Its version; empty where that is not told."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return ""


def _targets(vectors: Tensor) -> list[Callable[[Tensor], Tensor]]:
    return [lambda out, v=vector: F.normalize(out, dim=0) @ v for vector in vectors]


def _grad_cam(name: str, *places: int) -> Callable[[LoadedItem], Tensor]:
    """The grad-cam package, which averages the maps of several layers."""

    def explain(requested: LoadedItem) -> Tensor:
        import pytorch_grad_cam

        model, layers, scenes, vectors = requested
        chosen = [model.network.get_submodule(layers[index]) for index in places]
        made = getattr(pytorch_grad_cam, name)
        with made(model=model.network, target_layers=chosen) as cam:
            result = cam(input_tensor=scenes, targets=_targets(vectors))
        model.network.zero_grad(set_to_none=True)  # which it leaves behind
        return torch.from_numpy(result)

    return explain


def _torchcam(name: str, *places: int) -> Callable[[LoadedItem], Tensor]:
    """Torchcam, whose maps of several layers are fused by its own function."""

    def explain(requested: LoadedItem) -> Tensor:
        from torchcam import methods

        model, layers, scenes, vectors = requested
        chosen = [layers[index] for index in places]
        with getattr(methods, name)(model.network, chosen) as cam:
            rows = model.network(scenes)
            maps = cam(scores=rows, targets=_targets(vectors))
            fused = maps[0] if len(maps) == 1 else cam.fuse_cams(maps)
        model.network.zero_grad(set_to_none=True)
        return fused.detach()

    return explain


def _captum(requested: LoadedItem) -> Tensor:
    from captum.attr import LayerGradCam

    model, layers, scenes, vectors = requested

    def similarity(images: Tensor) -> Tensor:
        return (F.normalize(model.network(images), dim=1) * vectors).sum(dim=1)

    tool = LayerGradCam(similarity, model.network.get_submodule(layers[0]))
    return tool.attribute(scenes, relu_attributions=True)[:, 0].detach()


def _xaitk(requested: LoadedItem) -> Tensor:
    """Xaitk-saliency's SBSM with its default window, stride and distance; hidden parts are black.

    It compares two pictures; the query's descriptor is handed to it in the place of a picture.
    """
    from smqtk_descriptors.interfaces.image_descriptor_generator import ImageDescriptorGenerator
    from xaitk_saliency.impls.gen_image_similarity_blackbox_sal.sbsm import SBSMStack

    model, _, scenes, vectors = requested
    mark = np.zeros((1, 1, 3), np.uint8)

    class Descriptors(ImageDescriptorGenerator):
        def __init__(self, vector: Tensor) -> None:
            self.vector = vector

        def generate_arrays_from_images(self, images):
            for image in images:
                row = self.vector if image.shape == mark.shape else _embedded(model, image)
                yield row.numpy()

        def get_config(self) -> dict:
            return {}

    result = []
    for scene, vector in zip(scenes, vectors, strict=True):
        picture = model.preprocess.undo(scene)
        result.append(SBSMStack().generate(picture, [mark], Descriptors(vector))[0])
    return torch.from_numpy(np.stack(result))


def _embedded(model: SimilarityModel, picture: np.ndarray) -> Tensor:
    prepare = model.preprocess
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (prepare.mean, prepare.std))
    image = (torch.from_numpy(picture.copy()).permute(2, 0, 1) / 255 - mean) / std
    with torch.inference_mode():
        return F.normalize(model.network(image[None].float()), dim=1)[0]


def _distance_explainer(requested: LoadedItem) -> Tensor:
    """Distance Explainer with its default of 1000 masks; hidden parts are zero to the network."""
    from distance_explainer import DistanceExplainer

    model, _, scenes, vectors = requested

    def embed(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model.network(torch.from_numpy(batch).float()).numpy()

    state, drawn = np.random.get_state(), random.getstate()  # noqa: NPY002  it takes no seed
    result = []
    try:
        np.random.seed(SEED)  # noqa: NPY002
        random.seed(SEED)
        for scene, vector in zip(scenes, vectors, strict=True):
            tool = DistanceExplainer(axis_labels={0: "channels"})
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                made = tool.explain_image_distance(embed, scene.numpy(), vector.numpy())
            heat = np.asarray(made, dtype=np.float32).squeeze()
            result.append(torch.from_numpy(heat if heat.ndim == 2 else heat.mean(axis=-1)))
    finally:
        np.random.set_state(state)  # noqa: NPY002
        random.setstate(drawn)
    return torch.stack(result)


PEERS: dict[str, Peer] = {
    "grad-cam: GradCAM, last": Peer("grad-cam", "pytorch_grad_cam", _grad_cam("GradCAM", 0)),
    "grad-cam: GradCAM, last, margin": Peer(
        "grad-cam", "pytorch_grad_cam", _grad_cam("GradCAM", 0), "margin"
    ),
    "grad-cam: LayerCAM, last + mid": Peer(
        "grad-cam", "pytorch_grad_cam", _grad_cam("LayerCAM", 0, 1)
    ),
    "torchcam: GradCAM, last": Peer("torchcam", "torchcam", _torchcam("GradCAM", 0)),
    "torchcam: LayerCAM, last + mid": Peer("torchcam", "torchcam", _torchcam("LayerCAM", 0, 1)),
    "captum: LayerGradCam, last": Peer("captum", "captum", _captum),
    "xaitk-saliency: SBSM": Peer("xaitk-saliency", "xaitk_saliency", _xaitk, tier="few"),
    "distance-explainer": Peer(
        "distance-explainer", "distance_explainer", _distance_explainer, tier="few"
    ),
}
"""Every peer by the name of its row; all defaults are the package's own."""


def left_out(peers: dict[str, Peer]) -> dict[str, str]:
    """For each peer that cannot run the reason, as the page gives it."""
    return {
        name: f"package `{peer.package}` is not installed"
        for name, peer in peers.items()
        if not peer.installed
    }
