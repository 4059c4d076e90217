"""Layers of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958), written from the paper.

Weights are standard normal and scaled as they are used, so that all learn alike (equalised rate, Karras et al. 2018, §4.1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.models.pixels import Space, class_embedding
from finetune.models.turn import gathered

SLOPE = 0.2
GAIN = math.sqrt(2)  # keeps the variance of what a leaky ReLU lets through
BINOMIAL = (1.0, 3.0, 3.0, 1.0)  # the filter of resampling


def activated(features: Tensor) -> Tensor:
    return functional.leaky_relu(features, SLOPE) * GAIN


@final
class EqualLinear(nn.Module):
    """[…, inputs] → […, outputs]. `rate`: how much more slowly than others it learns."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self._scale, self._rate = rate / math.sqrt(inputs), rate

    def forward(self, features: Tensor) -> Tensor:
        return functional.linear(features, self.weight * self._scale, self.bias * self._rate)


@final
class EqualConv(nn.Module):
    """[B, inputs, H, W] → [B, outputs, H, W], or half the size by a filter and a stride."""

    def __init__(self, inputs: int, outputs: int, side: int, bias: bool = True, halving: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, side, side))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self._scale, self._side, self._halving = 1 / math.sqrt(inputs * side**2), side, halving

    def forward(self, maps: Tensor) -> Tensor:
        if not self._halving:
            return functional.conv2d(maps, self.weight * self._scale, self.bias, padding=self._side // 2)
        # Filtered so far beyond the edges that the stride leaves exactly half.
        filtered = blurred(maps, (2, 2) if self._side == 3 else (1, 1))
        return functional.conv2d(filtered, self.weight * self._scale, self.bias, stride=2)


def blurred(maps: Tensor, padding: tuple[int, int], gain: float = 1.0) -> Tensor:
    """Every channel by the binomial filter, after so many zeros before and behind; the filter's sum is `gain`."""
    row = torch.tensor(BINOMIAL, device=maps.device, dtype=maps.dtype)
    kernel = torch.outer(row, row) * (gain / row.sum() ** 2)
    count, channels = maps.shape[:2]
    padded = functional.pad(maps, (*padding, *padding))
    found = functional.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None])
    return found.view(count, channels, *found.shape[2:])


def doubled(maps: Tensor) -> Tensor:
    """[B, C, H, W] → twice the size: zeros between, and the filter, whose sum is 4 for them."""
    count, channels, height, width = maps.shape
    spread = functional.pad(maps[..., None, :, None], (0, 1, 0, 0, 0, 1)).reshape(count, channels, 2 * height, 2 * width)
    return blurred(spread, (2, 1), gain=4.0)


@final
class Modulated(nn.Module):
    """A convolution whose weights are scaled by each picture's style, and (demodulated) made of norm 1 again (equations 1 and 3).

    [B, inputs, H, W] and [B, style] → [B, outputs, H, W]; `padded`: of the same size, else smaller by the kernel's side less 1.
    """

    def __init__(self, inputs: int, outputs: int, side: int, style: int, demodulate: bool = True, padded: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, side, side))
        self.style = EqualLinear(style, inputs, bias=1.0)
        self._scale, self._demodulate, self._padding = 1 / math.sqrt(inputs * side**2), demodulate, side // 2 if padded else 0

    def weights(self, styles: Tensor) -> Tensor:
        """[B, outputs, inputs, side, side]."""
        found = self.weight * self._scale * self.style(styles)[:, None, :, None, None]
        if self._demodulate:
            found = found * (found.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        weights: Tensor = found
        return weights

    def forward(self, maps: Tensor, styles: Tensor) -> Tensor:
        """All pictures at once, each by weights of its own: one convolution with a group a picture (the paper's appendix B)."""
        count, weights = len(maps), self.weights(styles)
        found = functional.conv2d(maps.reshape(1, -1, *maps.shape[2:]), weights.flatten(0, 1), padding=self._padding, groups=count)
        return found.view(count, -1, *found.shape[2:])


@final
class Mapping(nn.Module):
    """Latents [B, L] and classes [B] → styles [B, S]: layers that learn a hundredth as fast as others."""

    mean: Tensor

    def __init__(self, space: Space, latent: int, style: int, layers: int) -> None:
        super().__init__()
        self.classes = class_embedding(space, latent)
        sizes = [latent * (2 if self.classes is not None else 1), *[style] * layers]
        self.layers = nn.ModuleList(EqualLinear(before, after, rate=0.01) for before, after in itertools.pairwise(sizes))
        self.register_buffer("mean", torch.zeros(style))  # of the styles of late

    def forward(self, latent: Tensor, classes: Tensor | None) -> Tensor:
        features = _normalised(latent)
        if self.classes is not None:
            features = torch.cat([features, _normalised(self.classes(classes))], 1)
        for layer in self.layers:
            features = activated(layer(features))
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(gathered(features.detach().float()).mean(0), 0.005)
        return features

    def truncated(self, styles: Tensor, share: float) -> Tensor:
        """Styles nearer to their mean (Karras et al. 2019, arXiv:1812.04948, appendix B)."""
        return styles if share == 1 else self.mean + share * (styles - self.mean)


def _normalised(features: Tensor) -> Tensor:
    return features * (features.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def mixed(styles: Sequence[Tensor], layers: int, crossing: Tensor) -> Tensor:
    """Two styles [B, S] → a style for each layer, [B, layers, S]: the first before the layer `crossing` [B], the second from it on."""
    number = torch.arange(layers, device=crossing.device)
    first, second = (style[:, None].expand(-1, layers, -1) for style in styles)
    return torch.where((number < crossing[:, None])[..., None], first, second)
