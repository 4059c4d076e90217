"""Frozen convolutions on a CPU, whose weights are laid out once as oneDNN's kernels read them.

Otherwise they are laid out anew at each call, forward and backward: where pixels are few, that takes as long as a quarter of the
convolution. They are held twice more for it. The sums are the same, in the same order.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # a convolution's stride, padding and dilation
ONE = (1, 1)
_packed = WeakIdKeyDictionary()  # weights → them laid out; it lasts as long as they do


def packed(weight: Tensor, geometry: Geometry, inputs: Tensor) -> Packed | None:
    """The convolution by `weight`, [out, in, h, w], for inputs such as these; None where oneDNN does not compute it, or a stride skips pixels."""
    stride, padding, dilation = geometry
    within = all(one < side for one, side in zip(padding, weight.shape[2:], strict=True))
    if not (stride == dilation == ONE and within and read_by_onednn(weight)):
        return None
    found: Packed | None = _packed.get(weight)
    if found is None or not found.is_of(weight):
        found = _packed[weight] = Packed(weight, padding, inputs)
    return found


def read_by_onednn(weight: Tensor) -> bool:
    """Whether it is real, frozen or not, on a CPU and float32."""
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and torch.backends.mkldnn.is_available()


@final
class Packed:
    """y = W * x + b of [B, in, H, W] whose channels lie last, and back.

    The way back is a convolution too: by the kernel turned about its middle, with in and out exchanged.
    """

    def __init__(self, weight: Tensor, padding: tuple[int, ...], inputs: Tensor) -> None:
        self._weight, self._version, self._padding = weight.detach(), weight._version, padding
        self._padding_back = tuple(side - 1 - one for one, side in zip(padding, weight.shape[2:], strict=True))
        size = list(inputs.shape)
        height, width = (
            side + 2 * one - kernel + 1 for side, one, kernel in zip(size[2:], padding, weight.shape[2:], strict=True)
        )
        turned = self._weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        self._there = laid_out(self._weight, padding, size)
        self._back = laid_out(turned, self._padding_back, [size[0], weight.shape[0], height, width])

    def is_of(self, weight: Tensor) -> bool:
        """Whether `weight` still lies where it lay, and as it was."""
        same: bool = weight.untyped_storage()._cdata == self._weight.untyped_storage()._cdata
        return same and weight._version == self._version

    def __call__(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """→ [B, out, H', W']."""
        found: Tensor = torch.ops.mkldnn._convolution_pointwise(
            inputs, self._there, bias, self._padding, ONE, ONE, 1, "none", [], ""
        )
        return found

    def add_back(self, found: Tensor, gradient: Tensor) -> None:
        """Add to `found`, [B, in, H, W], in place: the gradient of x, of that of y."""
        arguments: Any = (None, self._padding_back, ONE, ONE, 1, "add", 1.0, None, [], None)
        torch.ops.mkldnn._convolution_pointwise_(found, gradient, self._back, *arguments)


def laid_out(weight: Tensor, padding: tuple[int, ...], size: list[int]) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, ONE, ONE, 1, size)
    return found
