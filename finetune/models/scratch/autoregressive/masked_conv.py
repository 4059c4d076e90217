"""Causal convolutions, with caches for fast sampling.

Images are generated in raster order. The vertical stream of a PixelCNN sees the rows above, the horizontal stream also
pixels to the left (van den Oord et al. 2016, arXiv:1606.05328, §2.3: no blind spot). During sampling, the vertical
stream is computed once per row and the horizontal one per pixel, and each convolution caches its inputs (Ramachandran
et al. 2017, arXiv:1704.06001). The
same forward pass serves training and sampling: `Place` says what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional


@final
@dataclass
class Place:
    """The part of an image that a pass computes: row y, and in it pixel x, or the whole row if x is None.

    Attributes:
        height, width: of the image.
        y, x: the position.
        read: the inputs of each convolution so far, with padding, [B, C, padded height, padded width].
    """

    height: int
    width: int
    y: int = 0
    x: int | None = None
    read: dict[nn.Module, Tensor] = field(default_factory=dict)


@final
class CausalConv(nn.Module):
    """A convolution over a window above, or above and to the left of a pixel.

    Output (y, x) is Σ W[i, j] · input(y − up + i · dilation, x − left + j · dilation).

    Args:
        kernel: height and width of the window.
        up, left: distance of the window's first row and column from the pixel.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], up: int, left: int, dilation: int = 1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="linear")
        rows, columns = ((size - 1) * dilation for size in kernel)
        self._dilation, self._rows, self._columns = dilation, rows, columns
        # Negative padding crops: the window ends before the image does.
        self._padding = (left, columns - left, up, rows - up)

    def forward(self, features: Tensor, place: Place | None = None) -> Tensor:
        """[B, C, H, W] → [B, outputs, H, W]; for a place, [B, C, 1, W] or [B, C, 1, 1] → outputs of that shape."""
        if place is None:
            return functional.conv2d(
                functional.pad(features, self._padding), self.weight, self.bias, dilation=self._dilation
            )
        read = self.write(features, place)
        x, y, d = place.x, place.y, self._dilation
        rows = slice(y, y + self._rows + 1, d)
        if x is None:
            return functional.conv2d(
                read[:, :, rows, : place.width + self._columns], self.weight, self.bias, dilation=(1, d)
            )
        window = read[:, :, rows, x : x + self._columns + 1 : d]
        return functional.linear(window.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]

    def write(self, features: Tensor, place: Place) -> Tensor:
        """Store the inputs at a place in the cache and return the cache.

        Sampling calls this for the first convolutions, whose input is the pixel just generated.
        """
        left, right, up, down = self._padding
        read = place.read.get(self)
        if read is None:
            size = (place.height + up + max(down, 0), place.width + left + max(right, 0))
            read = place.read[self] = features.new_zeros(*features.shape[:2], *size)
        first, end = (0, place.width) if place.x is None else (place.x, place.x + 1)
        read[:, :, up + place.y, left + first : left + end] = features[:, :, 0]
        return read
