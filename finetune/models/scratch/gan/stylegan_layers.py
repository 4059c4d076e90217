"""Layers of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958), written from the paper.

Weights are standard normal and scaled at run time (equalized learning rate, Karras et al. 2018, arXiv:1710.10196,
§4.1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.models.base import gathered
from finetune.models.scratch.base import Space, class_embedding

SLOPE = 0.2
GAIN = math.sqrt(2)  # makes the leaky ReLU preserve the variance
BINOMIAL = (1.0, 3.0, 3.0, 1.0)  # the filter of resampling


def activated(features: Tensor) -> Tensor:
    """Leaky ReLU, scaled so that it keeps the variance; any shape."""
    return functional.leaky_relu(features, SLOPE) * GAIN


@final
class EqualLinear(nn.Module):
    """A linear layer with equalized learning rate; `rate` multiplies its effective learning rate."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self._scale, self._rate = rate / math.sqrt(inputs), rate

    def forward(self, features: Tensor) -> Tensor:
        return functional.linear(features, self.weight * self._scale, self.bias * self._rate)


@final
class EqualConv(nn.Module):
    """A convolution with equalized learning rate, optionally filtered and strided to half the size."""

    def __init__(self, inputs: int, outputs: int, side: int, bias: bool = True, halving: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, side, side))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self._scale, self._side, self._halving = 1 / math.sqrt(inputs * side**2), side, halving

    def forward(self, maps: Tensor) -> Tensor:
        if not self._halving:
            return functional.conv2d(maps, self.weight * self._scale, self.bias, padding=self._side // 2)
        # Padded so that the stride leaves exactly half the size.
        if self._side == 1:  # filter only the pixels that the stride keeps
            return functional.conv2d(
                resampled(maps, binomial(maps), (1, 1), down=2), self.weight * self._scale, self.bias
            )
        return functional.conv2d(
            resampled(maps, binomial(maps), (2, 2)), self.weight * self._scale, self.bias, stride=2
        )


def resampled(maps: Tensor, kernel: Tensor, padding: tuple[int, int], up: int = 1, down: int = 1) -> Tensor:
    """Resample each channel [B, C, H, W] with a separable filter `kernel` [taps] along both axes.

    Inserts up − 1 zeros after each pixel, pads, filters and keeps every `down`-th result. Along each axis that is a
    matrix, and two matrix products are many times faster than a depthwise convolution, even more so in the backward
    pass.
    """
    lengthwise, across = (_filtering(kernel, side, padding, up, down) for side in maps.shape[2:])
    result: Tensor = lengthwise @ (maps @ across.T)
    return result


def _filtering(kernel: Tensor, side: int, padding: tuple[int, int], up: int, down: int) -> Tensor:
    """The matrix [size after, side] of `resampled` along one axis."""
    impulses = functional.pad(
        torch.eye(side, device=kernel.device, dtype=kernel.dtype)[..., None], (0, up - 1)
    ).flatten(1)
    return functional.conv1d(functional.pad(impulses, padding)[:, None], kernel.view(1, 1, -1), stride=down)[:, 0].T


def binomial(maps: Tensor) -> Tensor:
    """The binomial filter [4], with sum 1."""
    row = torch.tensor(BINOMIAL, device=maps.device, dtype=maps.dtype)
    return row / sum(BINOMIAL)


def doubled(maps: Tensor) -> Tensor:
    """Upsample [B, C, H, W] to twice the size with the binomial filter."""
    return resampled(maps, 2 * binomial(maps), (2, 1), up=2)


@final
class Modulated(nn.Module):
    """A modulated convolution: each image's style scales the weights, which are then normalized (equations 1 and 3).

    Scaling the weights per input channel is equivalent to scaling the maps, and normalizing them to dividing the
    output, so one convolution with shared weights suffices. (A grouped convolution as in appendix B has a slow double
    backward.)

    [B, inputs, H, W] and [B, style] → [B, outputs, H, W], of the same size if `padded`, else smaller by the kernel's
    side − 1.
    """

    def __init__(
        self, inputs: int, outputs: int, side: int, style: int, demodulate: bool = True, padded: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, side, side))
        self.style = EqualLinear(style, inputs, bias=1.0)
        self._scale, self._demodulate, self._padding = (
            1 / math.sqrt(inputs * side**2),
            demodulate,
            side // 2 if padded else 0,
        )

    def forward(self, maps: Tensor, styles: Tensor) -> Tensor:
        scales, weight = self.style(styles), self.weight * self._scale
        result: Tensor = functional.conv2d(maps * scales[..., None, None], weight, padding=self._padding)
        if not self._demodulate:
            return result
        # Elementwise products and a sum stay in float32, where autocast would use a bfloat16 matrix product.
        squares: Tensor = (scales[:, None].square() * weight.square().sum((2, 3))).sum(2)
        return result * (squares + 1e-8).rsqrt()[..., None, None]


@final
class Mapping(nn.Module):
    """Latents [B, L] and classes [B] → styles [B, S]: layers with 0.01 × the learning rate."""

    mean: Tensor

    def __init__(self, space: Space, latent: int, style: int, layers: int) -> None:
        super().__init__()
        self.classes = class_embedding(space, latent)
        sizes = [latent * (2 if self.classes is not None else 1), *[style] * layers]
        self.layers = nn.ModuleList(
            EqualLinear(before, after, rate=0.01) for before, after in itertools.pairwise(sizes)
        )
        self.register_buffer("mean", torch.zeros(style))  # running mean of the styles

    def forward(self, latent: Tensor, classes: Tensor | None) -> Tensor:
        """[B, L] → [B, S]; updates the running mean in training."""
        features = _normalized(latent)
        if self.classes is not None:
            features = torch.cat([features, _normalized(self.classes(classes))], 1)
        for layer in self.layers:
            features = activated(layer(features))
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(gathered(features.detach().float()).mean(0), 0.005)
        return features

    def truncated(self, styles: Tensor, share: float) -> Tensor:
        """Move styles towards their mean (truncation, Karras et al. 2019, arXiv:1812.04948, appendix B)."""
        return styles if share == 1 else self.mean + share * (styles - self.mean)


def _normalized(features: Tensor) -> Tensor:
    return features * (features.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def mixed(styles: Sequence[Tensor], layers: int, crossing: Tensor) -> Tensor:
    """Style mixing: two styles [B, S] → [B, layers, S], the first up to layer `crossing` [B], then the second."""
    number = torch.arange(layers, device=crossing.device)
    first, second = (style[:, None].expand(-1, layers, -1) for style in styles)
    return torch.where((number < crossing[:, None])[..., None], first, second)
