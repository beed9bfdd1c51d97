"""Images against given vectors: texts, centroids, stored rows, directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import Run
from conftest import TinyNet, plain_maps
from figures import written
from pictures import noise
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import Comparison, Explanation, as_similarity_model, explain, explain_against
from simexplain.data.arrays import read_vectors
from simexplain.errors import ComparisonError, ModelError
from simexplain.explaining import centroid
from simexplain.methods import METHODS
from simexplain.models.texts import text_encoder

GRADIENT_FREE = {"random_masks": {"masks": 20}, "smoothgrad": {"samples": 2}}
NEEDING_OTHERS = ("avsl", "weight_bank", "attention", "attention_relevance", "grad_eclip")
WITH_VECTORS = [name for name in METHODS if name not in NEEDING_OTHERS]


@pytest.fixture
def vectors() -> Tensor:
    return torch.randn(2, 10, generator=torch.Generator().manual_seed(4)) * 3


def test_similarity_attention_of_an_image_and_a_vector_equals_plain_autograd(
    tiny: TinyNet, images: Tensor, vectors: Tensor
) -> None:
    text = F.normalize(vectors[0], dim=0)
    result = explain(tiny, Comparison.pair(images[:2], vectors[0]))
    assert result.maps.shape == (2, 1, 6, 8)
    for index, image in enumerate(images[:2]):
        row = F.normalize(tiny(image[None]), dim=1)[0].detach()
        weight = 1 - (row - text).abs()
        wanted, embedding, _ = plain_maps(tiny, tiny.last, image[None], weight)
        torch.testing.assert_close(result.maps[index, 0], wanted, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(result.distances[index, 0], (embedding - text).norm())
        torch.testing.assert_close(result.embeddings[index, 1], text)


def test_texts_for_and_against_equal_plain_autograd(
    tiny: TinyNet, images: Tensor, vectors: Tensor
) -> None:
    near, far = F.normalize(vectors, dim=1)
    pair = Comparison.triplet(images[:1], vectors[:1], vectors[1:])
    result = explain(tiny, pair, "similarity_cam")
    wanted, row, _ = plain_maps(tiny, tiny.last, images[:1], near - far)
    torch.testing.assert_close(result.maps[0, 0], wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result.scores[0, 0], row @ (near - far))
    assert result.members == ("anchor", "positive vector", "negative vector")
    closer = bool((row - near).norm() < (row - far).norm())
    assert result.condition().holds is closer


def test_a_vector_as_the_anchor_explains_several_images(
    tiny: TinyNet, images: Tensor, vectors: Tensor
) -> None:
    """A text query and two pictures: why is the first one nearer?"""
    result = explain(
        tiny, Comparison.triplet(vectors[:1], images[:1], images[1:2]), "similarity_cam"
    )
    query = F.normalize(vectors[0], dim=0)
    for index, sign in ((0, 1), (1, -1)):
        wanted, _, _ = plain_maps(tiny, tiny.last, images[index, None], sign * query)
        torch.testing.assert_close(result.maps[0, index], wanted, rtol=1e-4, atol=1e-7)
    assert result.roles == ("positive", "negative")


def test_a_direction_is_scored_with_its_sign_and_length(
    tiny: TinyNet, images: Tensor, vectors: Tensor
) -> None:
    direction = vectors[0] - vectors[1]
    here = explain(tiny, Comparison.along(images[:1], direction), "decomposition")
    there = explain(tiny, Comparison.along(images[:1], -2 * direction), "decomposition")
    row = F.normalize(tiny(images[:1]), dim=1)[0].detach()
    torch.testing.assert_close(here.scores[0, 0], row @ direction)
    torch.testing.assert_close(here.maps.sum(), row @ direction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(there.maps, -2 * here.maps, rtol=1e-4, atol=1e-6)
    with pytest.raises(ComparisonError, match="which a direction does not have"):
        explain(tiny, Comparison.along(images[:1], direction), "sam")
    assert explain(tiny, Comparison.along(images[:1], direction)).method == "focus"


@pytest.mark.parametrize("method", WITH_VECTORS)
def test_a_vector_counts_as_the_image_that_it_is_the_embedding_of(
    tiny: TinyNet, images: Tensor, method: str
) -> None:
    """The map of an image is the same whether the others are images or their embeddings."""
    options = GRADIENT_FREE.get(method, {})
    if method == "focus":  # which also looks for positions in the other images
        options = {"matching": 0.0}
    rows = F.normalize(tiny(images), dim=1).detach()
    whole = explain(tiny, Comparison.triplet(*images[:3, None]), method, **options)
    near = explain(tiny, Comparison.triplet(images[:1], *rows[1:3, None]), method, **options)
    torch.testing.assert_close(near.maps[:, 0], whole.maps[:, 0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(near.distances, whole.distances)
    mixed = explain(tiny, Comparison.triplet(images[:1], images[1:2], rows[2:3]), method, **options)
    torch.testing.assert_close(mixed.maps, whole.maps[:, :2], rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_is_one_sentence(tiny: TinyNet, images: Tensor, vectors: Tensor) -> None:
    for bad, record in (
        (torch.zeros(10), "is zero"),
        (torch.full((10,), torch.nan), "not finite"),
        (torch.ones(7), "10 numbers like the model's embeddings, got 7"),
    ):
        with pytest.raises(ComparisonError, match=record):
            explain(tiny, Comparison.pair(images[:1], bad))
    with pytest.raises(ComparisonError, match="a label for each of 1 given vectors, got 2"):
        explain(tiny, Comparison.pair(images[:1], vectors[0]), labels=["a", "b"])
    with pytest.raises(ComparisonError, match="Labels name given vectors"):
        explain(tiny, list(images[:2]), labels=["a"])
    with pytest.raises(ComparisonError, match="images of one size"):
        explain(tiny, Comparison.pair(images[:1], images[1:2, :, :12]))


def test_results_with_vectors_save_load_and_draw(
    tiny: TinyNet, images: Tensor, vectors: Tensor, tmp_path: Path
) -> None:
    labels = ["a red bag for $5", "a blue bag"]
    result = explain(tiny, Comparison.triplet(images[:2], *vectors), labels=labels)
    result.save(tmp_path / "out")
    again = Explanation.load(tmp_path / "out")
    assert again.members == result.members
    assert [vector.label for vector in again.vectors] == labels
    assert torch.equal(again.maps, result.maps)
    record = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert record["members"] == ["anchor", "positive vector", "negative vector"]
    assert len(record["images"]) == 1
    texts = written(again.figure(), "inside")
    assert "a red bag for $5" in [text.replace("\n", " ") for text in texts]


@pytest.mark.parametrize("ending", [".npy", ".npz", ".safetensors", ".json"])
def test_vectors_are_read_from_files(ending: str, tmp_path: Path) -> None:
    values = np.arange(1, 13, dtype=np.float64).reshape(2, 6)
    path = tmp_path / f"row{ending}"
    if ending == ".npy":
        np.save(path, values)
    elif ending == ".npz":
        np.savez(path, row=values)
    elif ending == ".safetensors":
        from safetensors.numpy import save_file

        save_file({"row": values}, path)
    else:
        path.write_text(json.dumps(values.tolist()))
    result = read_vectors(path)
    assert list(result) == ["row[0]", "row[1]"]
    assert result["row[1]"].tolist() == values[1].tolist()


@pytest.mark.parametrize(
    "content",
    ["[1, NaN]", "[0, 0]", "[]", '{"a": "b"}', "[[1], [2, 3]]", "no", '[["a"]]', "[true]"],
)
def test_files_without_vectors_are_one_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    path.write_text(content)
    with pytest.raises(ComparisonError) as caught:
        read_vectors(path)
    assert str(caught.value).endswith(".")
    with pytest.raises(ComparisonError, match="no file"):
        read_vectors(tmp_path / "none.npy")


def test_the_centroid_of_a_folder(tiny: TinyNet, tmp_path: Path) -> None:
    for seed in range(3):
        noise(40, 50, seed=seed).save(tmp_path / f"{seed}.png")
    model = as_similarity_model(tiny)
    from simexplain.data.images import read_picture
    from simexplain.data.preprocessing import prepared

    pictures = [read_picture(tmp_path / f"{seed}.png") for seed in range(3)]
    with torch.no_grad():
        rows = model(prepared(model.preprocess, pictures)[0])
    mean = centroid(model, tmp_path, max_batch=2)
    torch.testing.assert_close(mean, F.normalize(rows.mean(0), dim=0))
    result = explain_against(model, tmp_path / "0.png", {"bags": mean})
    assert result.vectors[0].label == "bags"
    assert result.peaks()[0] is not None


class Words(nn.Module):
    """A network with a text tower in the manner of open_clip."""

    def __init__(self) -> None:
        super().__init__()
        self.images = TinyNet()
        self.words = nn.Embedding(49408, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.images(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.words(tokens).sum(dim=1)


def test_texts_go_through_the_text_tower_of_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    network = Words().train()
    rows = as_similarity_model(network).embed_text(["a red bag", "a cat"])
    tokens = open_clip.SimpleTokenizer()(["a red bag", "a cat"])
    wanted = F.normalize(network.encode_text(tokens), dim=1)
    torch.testing.assert_close(rows, wanted.detach())
    assert network.training
    with pytest.raises(ModelError, match="at most 77 tokens"):
        text_encoder_of_short(network)


def text_encoder_of_short(network: Words) -> None:
    network.context_length = 77
    text_encoder(network)(["bag " * 100])


def test_texts_go_through_the_text_tower_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = {"<pad>": 0, "<unk>": 1, "red": 2, "bag": 3, "<eos>": 4}
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 4)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 5, "max_position_embeddings": 8, "eos_token_id": 4},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=10,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    clip = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    rows = as_similarity_model(clip).embed_text(["red bag", "bag"])
    tokens = torch.tensor([[2, 3, 4], [3, 4, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.no_grad():
        result = clip.get_text_features(input_ids=tokens, attention_mask=mask)
    result = result if isinstance(result, Tensor) else result.pooler_output
    torch.testing.assert_close(rows, F.normalize(result, dim=1))
    with pytest.raises(ModelError, match="at most 8 tokens, got 21"):
        as_similarity_model(clip).embed_text(["red " * 20])


def test_without_a_text_tower_there_is_one_sentence(tiny: TinyNet) -> None:
    with pytest.raises(ModelError, match="has no text tower"):
        as_similarity_model(tiny).embed_text(["a bag"])
    own = as_similarity_model(tiny, text=lambda texts: torch.ones(len(texts), 10))
    assert own.embed_text(["a bag"]).norm() == pytest.approx(1)
    with pytest.raises(ModelError, match="not blank"):
        own.embed_text([" "])


NETWORK = ("timm:test_resnet.r160_in1k", "--untrained", "--size", "64")


def test_the_command_line(run: Callable[..., Run], here: Path) -> None:
    generator = np.random.default_rng(0)
    np.save(here / "v.npy", generator.normal(size=96))
    (here / "class").mkdir()
    noise(40, 60, seed=3).save(here / "class" / "x.png")
    done = run("explain", *NETWORK, "a.png", "--vector", "v.npy", "--not-class-folder", "class",
               "--out", "o", "--json")  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["members"] == ["anchor", "positive vector", "negative vector"]
    assert [vector["label"] for vector in record["vectors"]] == ["v", "class (mean)"]
    plain = run("explain", *NETWORK, "a.png", "--direction", "v.npy", "--method",
                "similarity_cam", "--out", "p")  # fmt: skip
    assert plain.code == 0, plain.err
    assert "score f . d along the direction" in plain.out


def test_the_command_line_refuses(fails: Callable[..., str], here: Path) -> None:
    np.save(here / "v.npy", np.ones(5))
    np.save(here / "nan.npy", np.full(96, np.nan))
    assert "96 numbers" in fails("explain", *NETWORK, "a.png", "--vector", "v.npy")
    assert "not finite" in fails("explain", *NETWORK, "a.png", "--vector", "nan.npy")
    assert "no text tower" in fails("explain", *NETWORK, "a.png", "--text", "a bag")
    assert "folder" in fails("explain", *NETWORK, "a.png", "--class-folder", "nowhere")
    usage = fails("explain", *NETWORK, "a.png", "b.jpg", "--vector", "v.npy", code=2)
    assert "one image" in usage
    assert "another image" in fails("explain", *NETWORK, "a.png", code=2)
    four = fails("explain", *NETWORK, "a.png", "b.jpg", "a.png", "b.jpg")
    assert "4 need an arch (--arch): quadruplet (" in four
    assert " or set (" in four
