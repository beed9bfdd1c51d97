"""The settings of person re-identification: PCB, and similarity mining on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SAM = "similarity attention, section 4.2"
_PCB, _CODE = "PCB (Sun et al. 2018), section 4.2", "PCB's code, train_PCB.sh"
_RATIO = "ours; PCB's new layers learn ten times as fast as its network"

PCB: Mapping[str, tuple[Any, str]] = {
    "backbone": ("pcb:timm:resnet50", f"{_PCB}, which {_SAM} follows"),
    "size": ((384, 128), _PCB),
    "embedding": (1536, "PCB, section 3.1: six stripes of 256"),
    "loss": ("identity", "PCB, section 3.1"),
    "loss_options": ((("parts", 6),), "PCB, section 3.1"),
    "augmentation": ("pcb", _PCB),
    "optimiser": ("adam", _SAM),
    "epochs": (40, _SAM),
    "lr": (1e-4, "ours; neither names a rate for Adam"),
    "head_lr": (1e-3, _RATIO),
    "proxy_lr": (1e-3, _RATIO),
    "weight_decay": (5e-4, "PCB's code, PCB.py"),
    "schedule": ("step", _PCB),
    "step_epochs": (27, f"{_CODE}: after 40 of 60 epochs, two thirds of them"),
    "step_factor": (0.1, _PCB),
    "classes_per_batch": (16, f"ours; {_CODE} has 64 images, shuffled"),
    "images_per_class": (4, f"ours; {_CODE} has 64 images, shuffled"),
    "freeze_bn": (False, "PCB's code"),
    "grouped": (True, "Market-1501: the query's person before its own camera does not count"),
    "ranks": ((1, 5, 10), "Market-1501"),
}
"""The part-based baseline alone."""

SAM: Mapping[str, tuple[Any, str]] = {
    **PCB,
    "mining": ("triplet", "similarity attention, section 4.2: triplets are ours, it does not say"),
    "gamma": (0.2, _SAM),
}
"""With similarity attention and mining."""
