"""Arguments of the wrong kind: one sentence, whatever the verb, the method or the option."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import TinyNet
from PIL import Image
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_triplets
from simexplain_cli.main import cli
from torch import Tensor, nn

import simexplain
from simexplain import Comparison, Preprocess, SimilarityModel, as_similarity_model, explain, match
from simexplain.arguments import fits, typed
from simexplain.batching.planning import BatchOptions, read_rows
from simexplain.data.arrays import read_vectors
from simexplain.data.datasets import read_dataset
from simexplain.data.images import read_picture
from simexplain.errors import NetworkError, SimexplainError
from simexplain.evaluation.items import read_comparisons, sample_comparisons
from simexplain.fitting.bank import BankOptions
from simexplain.losses import metric_loss
from simexplain.methods import METHODS, options_of
from simexplain.metrics.curves import deletion
from simexplain.metrics.intervals import bootstrap_mean
from simexplain.metrics.stability import infidelity
from simexplain.models.avsl_options import AVSLOptions
from simexplain.renaming import MOVED
from simexplain.segmentation.cue import Cue, GrabCut
from simexplain.tracing import trace
from simexplain.training.options import TrainOptions

WRONG: dict[str, Any] = {
    "string": "x", "tuple": (0.2, 0.4), "None": None, "NaN": math.nan, "negative": -1,
    "huge": 10**12, "infinite": math.inf, "list": [1], "dictionary": {}, "module": nn.Flatten(),
    "tensor": torch.zeros(1, 3, 32, 32), "array": np.zeros((3, 4)),
    "picture": Image.new("RGB", (4, 4)),
    "path": Path("nowhere/a.png"), "address": "https://example.com/a.png",
}  # fmt: skip

OPTIONS = (TrainOptions, BatchOptions, BankOptions, AVSLOptions, Cue, GrabCut, Preprocess)
VERBS = (
    "explain", "explain_against", "match", "attribute", "segment", "compare",
    "faithfulness", "sanity_check", "evaluate_faithfulness", "evaluate_retrieval", "evaluate_reid",
    "evaluate_segmentation", "build_index", "update_index", "remove_from_index", "open_index",
    "search", "fit", "train", "build_bank", "explain_batch", "open_batch", "read_dataset",
    "read_comparisons", "sample_comparisons", "centroid", "load_model",
    "save_model", "as_similarity_model", "as_pair_model", "similarity_weights", "soft_mask",
    "metric_loss", "trace", "accelerated", "check_training", "SimilarityMiningLoss",
    "QuadrupletLoss", "AttentionMaskLoss", "ClassHead", "ClassBalanced", "AVSLLoss", "AVSL",
)  # fmt: skip


def images(count: int = 1, channels: int = 3, side: int = 32) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(3))


def tiny_model() -> SimilarityModel:
    torch.manual_seed(0)
    return as_similarity_model(TinyNet())


def pair(**shape: int) -> Comparison:
    both = images(2, **shape)
    return Comparison.pair(both[:1], both[1:])


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def a_sentence(made: Callable[[], Any]) -> str:
    """The sentence that a call ends in."""
    with pytest.raises(SimexplainError) as caught:
        made()
    text = str(caught.value)
    assert text.endswith((".", "?"))
    assert "\n" not in text
    assert len(text) < 700
    return text


def sentence_or_result(made: Callable[[], Any]) -> None:
    """Either it works, or it says why not; nothing of another package comes out."""
    record = ""
    try:
        made()
    except SimexplainError as error:
        record = str(error)
    assert not record or record.endswith((".", "?"))
    assert "\n" not in record


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("method", METHODS)
def test_options_of_methods(method: str, kind: str) -> None:
    made = METHODS[method]
    for field in options_of(made):
        wrong = WRONG[kind]
        called = lambda name=field.name, wrong=wrong: made(**{name: wrong})  # noqa: E731
        sentence_or_result(called)
        if isinstance(wrong, (dict, nn.Module, Tensor, np.ndarray, Image.Image)):
            assert field.name in a_sentence(called) or method == "weight_bank"


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("made", OPTIONS)
def test_options_of_verbs(made: type, kind: str) -> None:
    rest = {"sure": 0.8, "probable": 0.5, "background": 0.1} if made is Cue else {}
    for field in fields(made):
        given = rest | {field.name: WRONG[kind]}
        sentence_or_result(lambda given=given: made(**given))


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_of_a_verb_is_compared_with_its_hint(verb: str) -> None:
    home = f"simexplain.{MOVED[verb]}" if verb in MOVED else "simexplain"
    made = getattr(import_module(home), verb)
    signature = inspect.signature(made)
    wanted = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]

    class Odd:
        """What no argument is."""

    for name in signature.parameters:
        hint = str(signature.parameters[name].annotation)
        gathered = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        if gathered or "Listeners" in hint:
            continue
        if hint in ("Any", "Output", "TextEncoder | None") or "Module" in hint:
            continue
        given = {other: torch.zeros(1) for other in wanted} | {name: Odd()}
        with pytest.raises(SimexplainError, match=r" as \w+, got "):
            made(**given)


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind not in ("module", "tensor")])
def test_what_is_no_image_or_model(kind: str) -> None:
    wrong, image = WRONG[kind], images()
    for made in (
        lambda: Comparison.pair(wrong, image), lambda: Comparison.pair(image, wrong),
        lambda: Comparison.triplet(image, wrong, image), lambda: Comparison(wrong, wrong, wrong),
        lambda: Comparison.quadruplet(image, image, wrong, image),
        lambda: Comparison.along(image, wrong), lambda: match(tiny_model(), wrong, image),
        lambda: explain(tiny_model(), wrong), lambda: explain(tiny_model(), [wrong, image[0]]),
        lambda: explain(wrong, pair()), lambda: as_similarity_model(wrong),
        lambda: tiny_model().embed(wrong), lambda: trace(tiny_model(), wrong, ()),
        lambda: trace(TinyNet(), image, ()), lambda: explain(TinyNet, pair()),
    ):  # fmt: skip
        record = a_sentence(made)
        assert "xpected" in record or (kind in ("string", "path", "address") and "file" in record)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda image: image[0], "(3, 32, 32)"),
        (lambda image: image.permute(0, 2, 3, 1), "3 channels"),
        (lambda image: image[:, :1], "3 channels"),
        (lambda image: image[:, :, :0], "nothing in it"),
        (lambda image: image[None, None], "(1, 1, 1, 3, 32, 32)"),
        (lambda image: image.to(torch.uint8), "uint8"),
        (lambda image: image.to(torch.complex64), "complex64"),
        (lambda image: image.to_sparse(), "to_dense"),
        (lambda image: image.to("meta"), "meta"),
        (lambda image: image * math.nan, "not finite"),
        (lambda image: torch.quantize_per_tensor(image, 0.1, 0, torch.qint8), "dequantize"),
    ],
)
def test_tensors_that_are_no_images(change: Callable[[Tensor], Tensor], said: str) -> None:
    changed = change(images())
    assert said in a_sentence(lambda: explain(tiny_model(), Comparison.pair(changed, changed)))


class _Failing(TinyNet):
    """Raises in its forward pass what it is made with."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("method", ["sam", "decomposition", "occlusion", "saliency"])
@pytest.mark.parametrize(
    "error",
    [
        AttributeError("absent"), KeyError("pixel_values"), TypeError("one more"), IndexError("0"),
        AssertionError(), StopIteration(), NotImplementedError("forward"), RuntimeError("mat1"),
        ValueError("too many values"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_a_forward_pass_raises(error: Exception, method: str) -> None:
    model = as_similarity_model(_Failing(error))
    record = a_sentence(lambda: explain(model, pair(), method))
    assert type(error).__name__ in record
    assert "3x32x32" in record
    with pytest.raises(NetworkError):
        model.default_layer  # noqa: B018 - a property must not swallow an AttributeError
    with pytest.raises(NetworkError):
        model.embed(images())


def test_lack_of_memory_stays_what_it_is() -> None:
    with pytest.raises(MemoryError):
        explain(_Failing(MemoryError()), pair(), "occlusion")


def test_layers_by_module() -> None:
    model = tiny_model()
    name = model.layers[-1].name
    module = dict(model.network.named_modules())[name]
    plain = explain(model, pair(), layer=name)
    for layer in (module, [module]):
        result = explain(model, pair(), layer=layer)
        assert result.layers == (name,)
        assert torch.equal(result.maps, plain.maps)
    both = images(2)
    assert match(model, both[:1], both[1:], module).layer == name
    assert "not part of it" in a_sentence(lambda: explain(model, pair(), layer=nn.Flatten()))
    assert "layer" in a_sentence(lambda: explain(model, pair(), layer=3))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["sam", "focus", "decomposition", "saliency", "occlusion"])
def test_called_without_gradients(method: str, mode: Any) -> None:
    plain = explain(tiny_model(), pair(), method)
    with mode():
        inside = explain(tiny_model_like(), pair(), method)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert torch.equal(plain.maps, inside.maps)


def tiny_model_like() -> Any:
    """The tiny model, made outside of inference mode wherever the caller is."""
    with torch.inference_mode(mode=False):
        return tiny_model()


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = TinyNet()
    assert "inference_mode" in a_sentence(lambda: explain(model, pair()))
    assert explain(model, pair(), "occlusion").maps.isfinite().all()


def test_weights_without_values() -> None:
    assert "meta" in a_sentence(lambda: explain(TinyNet().to("meta"), pair()))


def test_pictures_in_memory(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (2, 40, 48, 3), dtype=np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for file, one in zip(files, values, strict=True):
        Image.fromarray(one).save(file)
    model = tiny_model()
    plain = explain(model, files, arch="siamese")
    for given in ([Image.fromarray(one) for one in values], list(values)):
        result = explain(model, given, arch="siamese")
        assert torch.equal(result.maps, plain.maps)
        assert (result.save(tmp_path / str(len(list(tmp_path.iterdir()))))) is not None
    assert torch.equal(match(model, *values).matrix, match(model, *files).matrix)


@pytest.mark.parametrize("name", ["https://example.com/a.png", "s3://bucket/a.png"])
def test_an_address_is_no_file(name: str, tmp_path: Path) -> None:
    for made in (
        lambda: read_picture(name), lambda: explain(tiny_model(), [name, name], arch="siamese"),
        lambda: simexplain.load_model(name), lambda: read_dataset("folder", name),
        lambda: simexplain.build_index(tiny_model(), name, tmp_path / "i"),
        lambda: read_vectors(name), lambda: read_dataset("folder", Path(name)),
    ):  # fmt: skip
        assert "address on the web" in a_sentence(made)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("gradcam", "similarity_cam"), ("Grad-CAM", "similarity_cam"),
        ("ig", "integrated_gradients"),
        ("focuss", "focus"), ("RISE", "random_masks"), ("occlusions", "occlusion"),
    ],
)  # fmt: skip
def test_what_may_have_been_meant_by_a_method(written: str, meant: str) -> None:
    assert f"did you mean {meant}" in a_sentence(lambda: explain(tiny_model(), pair(), written))
    refused = run("explain", "m", "a", "b", "--arch", "siamese", "--method", written)
    assert refused.exit_code == 2
    assert f"did you mean {meant}" in refused.output


def test_what_may_have_been_meant_by_other_words() -> None:
    record = a_sentence(lambda: explain(tiny_model(), pair(), "occlusion", windw=0.3))
    assert "did you mean window?" in record
    assert "did you mean explain?" in run("explian", "m", "a", "b").output
    assert "did you mean siamese?" in run("explain", "m", "a", "b", "--arch", "siames").output
    wrong = a_sentence(lambda: simexplain.load_model("timm:resnet50x", weights="random"))
    assert "resnet50" in wrong


def test_hints() -> None:
    assert fits(2, float)
    assert fits(np.float32(2), float)
    assert not fits(math.nan, float)
    assert not fits(True, int)
    assert not fits(2.0, int)
    assert not fits("ab", list[str])
    assert fits([0.1, 2], tuple[float, ...])
    assert not fits([0.1], tuple[float, float])
    assert not fits(0.5, bool)

    @typed
    def verb(sizes: tuple[int, int], name: str | None = None, *rest: int, **more: str) -> int:
        return len(rest) + len(more)

    assert verb((1, 2), "a", 1, "b", c=3) == 3  # type: ignore[arg-type]
    record = a_sentence(lambda: verb((1, 2.5)))  # type: ignore[arg-type]
    assert record.startswith("Expected (a whole number, a whole number) as sizes, got (1, 2.5);")
    with pytest.raises(TypeError, match="missing"):
        verb()  # type: ignore[call-arg]


def test_images_that_were_not_preprocessed() -> None:
    plain, both = explain(tiny_model(), pair()), images(2)
    whole = explain(tiny_model(), Comparison.pair(both[:1] * 255, both[1:] * 255))
    assert not any("255" in line for line in plain.warnings)
    assert any("divide pixels by 255" in line for line in whole.warnings)


def test_a_zero_embedding_is_said() -> None:
    class Zero(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0

    assert "zero vector" in a_sentence(lambda: explain(Zero(), pair()))
    assert "zero vector" in a_sentence(lambda: explain(Zero(), pair(), "occlusion"))


@pytest.mark.parametrize("negatives", ["hard", "semihard", "easy", "all"])
def test_negatives_of_triplets(negatives: str) -> None:
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.89, 0.11], [0.2, 0.98], [0.1, 1.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    loss = metric_loss("triplet", 3, 2, margin=0.2, negatives=negatives)
    unit = torch.nn.functional.normalize(rows)
    apart = torch.cdist(unit, unit)
    wanted = set()
    for a in range(5):
        for p in range(5):
            if a == p or labels[a] != labels[p]:
                continue
            others = [n for n in range(5) if labels[n] != labels[a]]
            near = min(others, key=lambda n: float(apart[a, n]))
            far = max(others, key=lambda n: float(apart[a, n]))
            chosen = {
                "hard": [near], "easy": [far], "all": others,
                "semihard": [n for n in others if 0 < apart[a, n] - apart[a, p] <= 0.2],
            }[negatives]  # fmt: skip
            wanted |= {(a, p, n) for n in chosen}
    assert loss.miner is not None
    mined = convert_to_triplets(loss.miner(rows, labels), labels)
    result = {tuple(map(int, one)) for one in zip(*mined, strict=True)}
    assert result == wanted
    assert "did you mean semihard" in a_sentence(
        lambda: metric_loss("triplet", 3, 2, negatives="semi-hard")
    )


@pytest.mark.parametrize("index", ["", "Unnamed: 0"])
def test_tables_with_the_index_of_pandas(index: str, tmp_path: Path) -> None:
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    table = tmp_path / "t.csv"
    table.write_text(f"{index},path,label\n0,a.png,x\n1,b.png,x\n2,c.png,y\n3,d.png,y\n")
    split = read_dataset("csv", table)
    assert [record.label for record in (*split.train, *split.queries)] == ["x", "x", "y", "y"]
    table.write_text(f"{index},anchor,positives,negatives\n0,a.png,b.png,c.png\n")
    (item,) = read_comparisons(table)
    assert [path.name for path in item.paths] == ["a.png", "b.png", "c.png"]
    (row,) = read_rows(table)[0]
    assert (row.anchor, row.positives, row.negatives) == ("a.png", ("b.png",), ("c.png",))


def test_what_would_never_end_is_refused(tmp_path: Path) -> None:
    model, both, many = tiny_model(), pair(), 10**12
    for name in "ab":
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (4, 4)).save(tmp_path / "own" / name / f"{number}.png")
    one, two = images(2)[:1], images(2)[1:]
    for made in (
        lambda: match(model, one, two, jacobians=many),
        lambda: explain(model, both, "decomposition", steps=many),
        lambda: sample_comparisons(tmp_path / "own", many),
        lambda: simexplain.build_index(model, tmp_path / "own", tmp_path / "index", jacobians=many),
        lambda: deletion(lambda x: x.sum((1, 2, 3)), one[0], one[0, 0], steps=many),
        lambda: bootstrap_mean([1.0, 2.0], samples=many),
        lambda: infidelity(lambda x: x.sum((1, 2, 3)), one, one[:, 0], samples=many),
    ):
        record = a_sentence(made)
        assert "at most" in record
        assert str(many) in record
    drawn = sample_comparisons(tmp_path / "own", 10**6, arch="siamese")
    assert len(drawn) == 4  # the two ordered pairs of each class
