"""All rows of the matrix."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import compat_designs
import compat_heads
import compat_huggingface
import compat_packages
import compat_timm
import compat_torchvision
import compat_trunks
import compat_wrapped
from compat_net import Net

NETS: list[Net] = [
    *compat_timm.NETS,
    *compat_torchvision.NETS,
    *compat_huggingface.NETS,
    *compat_packages.NETS,
    *compat_heads.NETS,
    *compat_trunks.NETS,
    *compat_designs.NETS,
    *compat_wrapped.NETS,
]


def missing(net: Net) -> str:
    """Why a row cannot be built here, or an empty string."""
    if net.package == "own":
        return ""
    try:
        version(net.package)
    except PackageNotFoundError:
        return f"{net.package} is not installed; pip install 'simexplain[compat]'"
    return ""
