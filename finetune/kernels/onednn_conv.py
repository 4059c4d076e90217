"""Convolutions with frozen weights on a CPU: the weights are reordered for oneDNN once instead of at every call.

PyTorch reorders them in each forward and backward pass, which takes up to a quarter of the convolution's time where
there are few pixels. Two reordered copies stay in memory. The sums are the same, in the same order.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from finetune.kernels import backend

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # stride, padding and dilation of a convolution
ONE = (1, 1)
_packed = WeakIdKeyDictionary()  # weight → its `PackedConv`, for as long as the weight lives


def packed(weight: Tensor, geometry: Geometry, inputs: Tensor) -> Any:
    """The `PackedConv` of `weight` [out, in, h, w] for inputs shaped like `inputs`; None where it does not apply.

    It applies on a CPU in float32, with stride and dilation 1 and a padding smaller than the kernel.
    """
    stride, padding, dilation = geometry
    padded = all(pad < side for pad, side in zip(padding, weight.shape[2:], strict=True))
    if not (stride == dilation == ONE and padded and backend.current().uses_onednn(weight)):
        return None
    conv = _packed.get(weight)
    if conv is None or not conv.matches(weight):
        conv = _packed[weight] = backend.current().pack(weight, padding, inputs)
    return conv


@final
class PackedConv:
    """y = W * x + b for [B, in, H, W] in channels-last format, and the gradient of x.

    That gradient is a convolution too: by the flipped kernel with `in` and `out` exchanged.
    """

    def __init__(self, weight: Tensor, padding: tuple[int, ...], inputs: Tensor) -> None:
        self._weight, self._version, self._padding = weight.detach(), weight._version, padding
        self._padding_back = tuple(side - 1 - pad for pad, side in zip(padding, weight.shape[2:], strict=True))
        size = list(inputs.shape)
        height, width = (
            side + 2 * pad - kernel + 1 for side, pad, kernel in zip(size[2:], padding, weight.shape[2:], strict=True)
        )
        flipped = self._weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        self._forward = _reordered(self._weight, padding, size)
        self._backward = _reordered(flipped, self._padding_back, [size[0], weight.shape[0], height, width])

    def matches(self, weight: Tensor) -> bool:
        """Whether `weight` still has the storage and the values that were packed."""
        same: bool = weight.untyped_storage()._cdata == self._weight.untyped_storage()._cdata
        return same and weight._version == self._version

    def __call__(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """[B, in, H, W] → [B, out, H', W']."""
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(
            inputs, self._forward, bias, self._padding, ONE, ONE, 1, "none", [], ""
        )
        return output

    def add_input_gradient(self, total: Tensor, gradient: Tensor) -> None:
        """Add the gradient of x to `total` [B, in, H, W] in place, given `gradient`, that of y."""
        arguments: Any = (None, self._padding_back, ONE, ONE, 1, "add", 1.0, None, [], None)
        torch.ops.mkldnn._convolution_pointwise_(total, gradient, self._backward, *arguments)


def _reordered(weight: Tensor, padding: tuple[int, ...], size: list[int]) -> Tensor:
    reordered: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, ONE, ONE, 1, size)
    return reordered
