"""Texts as vectors beside a model's images, through the text tower of CLIP-like networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError, first_line
from simexplain.networks import preserve_state

TextEncoder = Callable[[Sequence[str]], Tensor]
"""From texts to vectors ``(T,E)``, of any length, in the space of the image embeddings."""

_CLIP_WORDS = 49408
_HOW = "give one with as_similarity_model(model, text=FUNCTION)"


def text_vectors(network: nn.Module, encode: TextEncoder | None, texts: Sequence[str]) -> Tensor:
    """Vectors ``(T,E)`` of texts, without a graph; the network is left as it was.

    Args:
        network: The whole model; only its modes and its text tower matter.
        encode: What makes vectors of texts; None for the network's own text tower.
        texts: One or more, none of them blank.

    Raises:
        ModelError: If the model has no text tower, or a text is blank or too long for it.
    """
    if isinstance(texts, str):
        texts = [texts]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ModelError(f"Expected one or more texts that are not blank, got {list(texts)!r}.")
    encode = encode or text_encoder(network)
    with torch.no_grad(), preserve_state(network):
        vectors = encode(list(texts))
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or len(vectors) != len(texts):
        shape = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise ModelError(f"Expected text vectors of shape ({len(texts)}, E), got {shape}.")
    return vectors.detach()


def text_encoder(network: nn.Module, tokenizer: Any = None) -> TextEncoder:
    """The text tower of a network, with the tokenizer that belongs to it.

    Knows networks with ``get_text_features`` (transformers: CLIP, SigLIP, SigLIP 2 and their kind)
    and with ``encode_text`` (open_clip and the original CLIP).

    Args:
        network: The network, or a module around it.
        tokenizer: A tokenizer of transformers or open_clip; None finds it where the network was
            loaded from, without the internet, or takes CLIP's own word list.

    Raises:
        ModelError: If the model has no text tower, or no tokenizer is found for it.
    """
    for module in network.modules():
        if callable(getattr(module, "get_text_features", None)):
            return partial(_by_transformers, module, tokenizer or _local_tokenizer(module))
        if callable(getattr(module, "encode_text", None)):
            return partial(_by_open_clip, module, tokenizer or _clip_tokenizer(module))
    raise ModelError(
        f"{type(network).__name__} has no text tower, so a text cannot be compared with an image; "
        f"take a CLIP-like model, or {_HOW}."
    )


def _by_transformers(module: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    config = getattr(module.config, "text_config", module.config)
    most = int(getattr(config, "max_position_embeddings", 0) or 0)
    whole = "siglip" in str(getattr(module.config, "model_type", ""))  # trained with full length
    plain = tokenizer(texts)["input_ids"]
    _check_lengths(texts, [len(ids) for ids in plain], most)
    # transformers makes an empty tokenizer for a folder of CLIP that has none.
    nothing = set(tokenizer.all_special_ids)
    for text, ids in zip(texts, plain, strict=True):
        if nothing.issuperset(ids):
            raise ModelError(
                f"The tokenizer has no tokens for the text '{text[:40]}'; save the one that belongs"
                f" to {type(module).__name__} in the model's folder, or {_HOW}."
            )
    tokens = tokenizer(
        texts,
        padding="max_length" if whole else True,
        max_length=most if whole else None,
        return_tensors="pt",
    )
    device = next(module.parameters()).device
    output = module.get_text_features(**{name: value.to(device) for name, value in tokens.items()})
    vectors: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return vectors


def _by_open_clip(module: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    if callable(encode := getattr(tokenizer, "encode", None)):
        # Beside the words there are a token of the start and one of the end.
        lengths = [len(encode(text)) + 2 for text in texts]
        _check_lengths(texts, lengths, _of_text_tower(module, "context_length", 0))
    device = next(module.parameters()).device
    vectors: Tensor = module.encode_text(tokenizer(texts).to(device))
    return vectors


def _check_lengths(texts: Sequence[str], lengths: Sequence[int], most: int) -> None:
    for text, length in zip(texts, lengths, strict=True):
        if most and length > most:
            raise ModelError(
                f"Expected a text of at most {most} tokens, got {length} in "
                f"'{text[:40]}...'; shorten it."
            )


def _local_tokenizer(module: Any) -> Any:
    """The tokenizer beside the weights that a model of transformers was loaded from."""
    source = str(getattr(module.config, "_name_or_path", "") or "")
    if not source:
        raise ModelError(
            f"{type(module).__name__} was not loaded from a folder with a tokenizer, which texts "
            f"need; load it with from_pretrained(FOLDER), or {_HOW}."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)  # type: ignore[no-untyped-call,unused-ignore]
    except Exception as error:  # a dozen classes, by the kind of tokenizer
        raise ModelError(
            f"No tokenizer was found in '{source}' ({first_line(error)}); save the one that "
            f"belongs to the model there, or {_HOW}."
        ) from error


def _clip_tokenizer(module: Any) -> Any:
    """CLIP's own word list, which open_clip brings along."""
    words = _of_text_tower(module, "vocab_size", _CLIP_WORDS)
    try:
        import open_clip
    except ImportError as error:
        raise ModelError(
            f"Texts need CLIP's word list: pip install open_clip_torch, or {_HOW}."
        ) from error
    if words != _CLIP_WORDS:
        raise ModelError(
            f"{type(module).__name__} has {words} tokens, where CLIP's word list has "
            f"{_CLIP_WORDS}, so its tokenizer has to be named: text=text_encoder(model, TOKENIZER)."
        )
    length = _of_text_tower(module, "context_length", 77)
    return open_clip.SimpleTokenizer(context_length=length)


def _of_text_tower(module: Any, name: str, usual: int) -> int:
    """A number of a text tower; CoCa has it in its tower alone."""
    for part in (module, getattr(module, "text", None)):
        if isinstance(width := getattr(part, name, None), int):
            return width
    return usual
