"""Whether a network makes numbers of Python's from what is in an image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

_VALUES = {
    "item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__array__", "__bool__",
    "__complex__", "__contains__", "__float__", "__index__", "__int__",
}  # fmt: skip
"""Functions that make something of Python's from the contents of a tensor."""
_CUTTING = {"__getitem__", "narrow", "select", "roll", "repeat_interleave"}
"""Functions that read a place from the contents of another tensor."""


class ImageChoices(TorchFunctionMode):
    """Detects, inside the block, numbers that Python, or a cut, takes from an image.

    No graph of autograd shows these: a network that cuts out what is around its image's brightest
    pixel has a graph like one that always cuts there.

    Attributes:
        made: Whether there was one.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.made = False
        self._contents = WeakTensorKeyDictionary({image: True})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls a function and notes what depends on the image."""
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", "")).partition(".")[0]
        given = [value for value in _tensors((args, kwargs)) if value in self._contents]
        result = func(*args, **kwargs)
        if given:
            cuts = name in _CUTTING and any(value is not args[0] for value in given)
            self.made = self.made or cuts or name in _VALUES
            changed = args[:1] if name == "__setitem__" or name.endswith("_") else ()
            for tensor in _tensors((result, changed)):
                self._contents[tensor] = True
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in pytree.tree_leaves(values):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, slice):
            yield from _tensors((value.start, value.stop, value.step))
