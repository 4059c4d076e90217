"""Convolutions that see only what was drawn before, and caches that make drawing cheap.

An image is drawn row by row. The vertical stream of a PixelCNN reads whole rows above, the horizontal one reads to the
left as well (van den Oord et al. 2016, arXiv:1606.05328, §2.3: no blind spot). So when an image is drawn, the vertical
stream is computed a row at a time and the horizontal a pixel at a time, each convolution keeping what it has read so far:
Ramachandran et al. 2017 (arXiv:1704.06001). The same forward pass serves all three: `Place` says what is computed.
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
    """Where in the image of `height` × `width` a pass computes: row y, and in it pixel x or, if x is None, all of them.

    `read` holds, for each convolution, what it was given so far, with its padding: [B, C, padded height, padded width].
    """

    height: int
    width: int
    y: int = 0
    x: int | None = None
    read: dict[nn.Module, Tensor] = field(default_factory=dict)


@final
class CausalConv(nn.Module):
    """A convolution over a window that lies above, or above and to the left.

    Output (y, x) is Σ W[i, j] · input(y − up + i · dilation, x − left + j · dilation).

    Args:
        kernel: height and width of the window.
        up, left: how far the window's first row and column lie above and left of the pixel.
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
        self._padding = (
            left,
            columns - left,
            up,
            rows - up,
        )  # negative: cropped, the window ends before the image does

    def forward(self, features: Tensor, place: Place | None = None) -> Tensor:
        """[B, C, H, W] → [B, outputs, H, W]; at a place, [B, C, 1, W] or [B, C, 1, 1] → the same of the outputs."""
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
        """Keep what is there at the place; returns all that is kept. A first convolution, which reads what is drawn, is told it so."""
        left, right, up, down = self._padding
        read = place.read.get(self)
        if read is None:
            size = (place.height + up + max(down, 0), place.width + left + max(right, 0))
            read = place.read[self] = features.new_zeros(*features.shape[:2], *size)
        first, end = (0, place.width) if place.x is None else (place.x, place.x + 1)
        read[:, :, up + place.y, left + first : left + end] = features[:, :, 0]
        return read
