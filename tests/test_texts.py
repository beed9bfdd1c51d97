"""Texts end to end and without a network: the cosine is the package's own, from files to JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import Run
from hub_cases import no_network as no_network
from hub_cases import photographs, written
from safetensors.torch import save_file
from test_hub_packages import size_of_config
from torch import Tensor, nn
from torch.nn import functional as F

from simexplain import explain_against, load_model
from simexplain.errors import ModelError

TEXTS = ["a bad bag", "cab"]
LETTERS = [chr(97 + number) for number in range(20)]

pytestmark = pytest.mark.usefixtures("no_network")


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer from files of a tiny word list, saved beside the network."""
    transformers = pytest.importorskip("transformers")
    words = ["<pad>", "<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    (folder / "own").mkdir()
    files = folder / "own" / "vocab.json", folder / "own" / "merges.txt"
    files[0].write_text(json.dumps({word: number for number, word in enumerate(words)}))
    files[1].write_text("#version: 0.2\n")
    made = transformers.CLIPTokenizer(*map(str, files), pad_token="<pad>")
    made.save_pretrained(folder)
    return made


def siglip_tokenizer(folder: Path) -> Any:
    """A word list that gives no mask, as that of SigLIP, whose texts are all of full length."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<unk>": 1, "</s>": 2, "a": 3, "bad": 4, "bag": 5, "cab": 6}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        model_input_names=["input_ids"],
    )  # fmt: skip
    made.save_pretrained(folder)
    return made


def tensor_of(result: Any) -> Tensor:
    """Newer versions of transformers wrap features."""
    return result if isinstance(result, Tensor) else result.pooler_output


@pytest.fixture
def quietly(capfd: pytest.CaptureFixture[str]) -> Callable[[str, Path], Any]:
    """Writes a network without the progress bar of transformers in what a command prints."""

    def write(family: str, folder: Path) -> Any:
        network = written(family, folder)
        capfd.readouterr()
        return network

    return write


def their_cosines(network: Any, folder: Path, tokens: Any, picture: Any) -> Tensor:
    """The cosines of a picture with texts, by the processor and the network of transformers."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    with torch.no_grad():
        image = network.get_image_features(**processor(images=[picture], return_tensors="pt"))
        text = network.get_text_features(**tokens)
    return F.normalize(tensor_of(image), dim=1)[0] @ F.normalize(tensor_of(text), dim=1).T


FAMILIES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "CLIP": (clip_tokenizer, {"padding": True}),
    "SigLIP": (siglip_tokenizer, {"padding": "max_length", "max_length": 64}),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_folders_of_transformers(
    family: str, run: Callable[..., Run], here: Path, quietly: Callable[[str, Path], Any]
) -> None:
    network = quietly(family, here / "net")
    make, how = FAMILIES[family]
    tokens = make(here / "net")(TEXTS, return_tensors="pt", **how)
    picture = photographs()[0]
    picture.save(here / "cat.png")
    wanted = their_cosines(network, here / "net", tokens, picture)
    done = run("explain", "net", "cat.png", "--text", TEXTS[0], "--not-text", TEXTS[1],
               "--out", "o", "--json")  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert [vector["label"] for vector in record["vectors"]] == TEXTS
    actual = 1 - torch.tensor(record["distances"]).square() / 2
    torch.testing.assert_close(actual, wanted, atol=2e-3, rtol=0)
    model = load_model(here / "net")
    rows = model.embed_text(TEXTS)
    with torch.no_grad():
        theirs = F.normalize(tensor_of(network.get_text_features(**tokens)), dim=1)
    torch.testing.assert_close(rows, theirs)
    assert float((rows[0] - rows[1]).norm()) > 1e-3  # or the texts could be mixed up
    vectors = dict(zip(TEXTS, rows, strict=True))
    result = explain_against(model, here / "cat.png", vectors, method="saliency")
    assert result.peaks()[0] is not None
    missing = run("explain", "net", "cat.png", "--text", "bag " * 80, "--out", "p")
    assert missing.code == 1
    assert "at most 64 tokens" in missing.err if family == "SigLIP" else "tokens" in missing.err


@pytest.mark.parametrize(
    ("family", "said"),
    [("CLIP", "has no tokens for the text"), ("SigLIP", "No tokenizer was found")],
)
def test_a_folder_without_a_tokenizer_is_one_sentence(
    family: str,
    said: str,
    fails: Callable[..., str],
    here: Path,
    quietly: Callable[[str, Path], Any],
) -> None:
    quietly(family, here / "net")
    photographs()[0].save(here / "cat.png")
    assert said in fails("explain", "net", "cat.png", "--text", "a bag")


@pytest.mark.parametrize("family", ["CLIP vision", "DINOv2"])
def test_networks_without_a_text_tower_are_one_sentence(
    family: str, fails: Callable[..., str], here: Path, quietly: Callable[[str, Path], Any]
) -> None:
    quietly(family, here / "net")
    photographs()[0].save(here / "cat.png")
    record = fails("explain", "net", "cat.png", "--text", "a bag")
    assert "has no text tower, so a text cannot be compared with an image" in record


def open_clip_cosines(model: Any, tokenizer: Any, path: Path) -> Tensor:
    from simexplain.data.images import read_picture

    view = model.preprocess(read_picture(path).image)[0][None]
    network = model.network
    with torch.no_grad():
        image = F.normalize(network.encode_image(view), dim=1)[0]
        return image @ F.normalize(network.encode_text(tokenizer(TEXTS)), dim=1).T


def test_open_clip_by_name(here: Path) -> None:
    """With the tokenizer that the package itself gives for the name."""
    open_clip = pytest.importorskip("open_clip")
    name = min(open_clip.list_models(), key=size_of_config)
    model = load_model(f"open_clip:{name}", weights="random")
    photographs()[0].save(here / "cat.png")
    wanted = open_clip_cosines(model, open_clip.get_tokenizer(name), here / "cat.png")
    vectors = dict(zip(TEXTS, model.embed_text(TEXTS), strict=True))
    result = explain_against(model, here / "cat.png", vectors)
    torch.testing.assert_close(1 - result.distances[0].square() / 2, wanted, atol=1e-5, rtol=0)


CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def test_a_folder_of_open_clip_on_the_command_line(run: Callable[..., Run], here: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(4)
    network = open_clip.CLIP(**CONFIG).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    (here / "net").mkdir()
    config = {"model_cfg": CONFIG, "preprocess_cfg": {}}
    (here / "net" / "open_clip_config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), here / "net" / "open_clip_model.safetensors")
    photographs()[0].save(here / "cat.png")
    done = run("explain", "net", "cat.png", "--text", TEXTS[0], "--not-text", TEXTS[1],
               "--out", "o", "--json")  # fmt: skip
    assert done.code == 0, done.err
    tokenizer = open_clip.SimpleTokenizer(context_length=20)
    wanted = open_clip_cosines(load_model(here / "net"), tokenizer, here / "cat.png")
    result = 1 - torch.tensor(json.loads(done.out)["distances"]).square() / 2
    torch.testing.assert_close(result, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("words", [49408, 50265])
def test_coca_says_its_words_in_its_text_tower(words: int) -> None:
    """Its tokens are one fewer than CLIP's; those of another word list are refused."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip.coca_model import CoCa, MultimodalCfg

    from simexplain import as_similarity_model

    torch.manual_seed(0)
    text = {**CONFIG["text_cfg"], "context_length": 19, "vocab_size": words, "embed_cls": True,
            "output_tokens": True}  # fmt: skip
    multimodal = MultimodalCfg(context_length=19, vocab_size=words, width=16, heads=2, layers=1)
    vision = {**CONFIG["vision_cfg"], "output_tokens": True, "attentional_pool": True}
    network = CoCa(16, multimodal, text, vision).eval()
    model = as_similarity_model(network)
    if words != 49408:
        with pytest.raises(ModelError, match="has 50265 tokens"):
            model.embed_text(TEXTS)
        return
    tokens = open_clip.SimpleTokenizer(context_length=19)(TEXTS)
    with torch.no_grad():
        wanted = F.normalize(network.encode_text(tokens), dim=1)
    torch.testing.assert_close(model.embed_text(TEXTS), wanted)
