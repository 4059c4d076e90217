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

from finetune.models.base import gathered
from finetune.models.scratch.base import Space, class_embedding

SLOPE = 0.2
GAIN = math.sqrt(2)  # keeps the variance of what a leaky ReLU lets through
BINOMIAL = (1.0, 3.0, 3.0, 1.0)  # the filter of resampling


def activated(features: Tensor) -> Tensor:
    """Leaky ReLU, scaled so that it keeps the variance; any shape."""
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
        if self._side == 1:  # what it leaves out need not be filtered
            return functional.conv2d(
                resampled(maps, binomial(maps), (1, 1), down=2), self.weight * self._scale, self.bias
            )
        return functional.conv2d(
            resampled(maps, binomial(maps), (2, 2)), self.weight * self._scale, self.bias, stride=2
        )


def resampled(maps: Tensor, kernel: Tensor, padding: tuple[int, int], up: int = 1, down: int = 1) -> Tensor:
    """Every channel [B, C, H, W] by the kernel [taps] along both sides, as in a convolution.

    Each place is followed by up − 1 zeros, all have so many zeros before and behind, and of what comes out each `down`-th is kept. That is a
    matrix for each side, and two products are many times as fast as a convolution of single channels, all the more so backward.
    """
    lengthwise, across = (_filtering(kernel, side, padding, up, down) for side in maps.shape[2:])
    result: Tensor = lengthwise @ (maps @ across.T)
    return result


def _filtering(kernel: Tensor, side: int, padding: tuple[int, int], up: int, down: int) -> Tensor:
    """[places after, side]: what `resampled` makes of a side on which one place is 1."""
    spread = functional.pad(torch.eye(side, device=kernel.device, dtype=kernel.dtype)[..., None], (0, up - 1)).flatten(
        1
    )
    return functional.conv1d(functional.pad(spread, padding)[:, None], kernel.view(1, 1, -1), stride=down)[:, 0].T


def binomial(maps: Tensor) -> Tensor:
    """The filter [4] of sum 1."""
    row = torch.tensor(BINOMIAL, device=maps.device, dtype=maps.dtype)
    return row / sum(BINOMIAL)


def doubled(maps: Tensor) -> Tensor:
    """[B, C, H, W] → twice the size: zeros between, and the filter, whose sum along a side is 2 for them."""
    return resampled(maps, 2 * binomial(maps), (2, 1), up=2)


@final
class Modulated(nn.Module):
    """A convolution whose weights are scaled by each image's style, and (demodulated) made of norm 1 again (equations 1 and 3).

    Weights scaled by input channel are maps scaled by channel, and their norms divide what comes out: one convolution, by weights that
    all images share, does the same. (One with a group an image, as in the paper's appendix B, is differentiated twice group by group.)

    [B, inputs, H, W] and [B, style] → [B, outputs, H, W]; `padded`: of the same size, else smaller by the kernel's side less 1.
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
        # Products and a sum in float32, where autocast would multiply matrices in bfloat16.
        squares: Tensor = (scales[:, None].square() * weight.square().sum((2, 3))).sum(2)
        return result * (squares + 1e-8).rsqrt()[..., None, None]


@final
class Mapping(nn.Module):
    """Latents [B, L] and classes [B] → styles [B, S]: layers that learn a hundredth as fast as others."""

    mean: Tensor

    def __init__(self, space: Space, latent: int, style: int, layers: int) -> None:
        super().__init__()
        self.classes = class_embedding(space, latent)
        sizes = [latent * (2 if self.classes is not None else 1), *[style] * layers]
        self.layers = nn.ModuleList(
            EqualLinear(before, after, rate=0.01) for before, after in itertools.pairwise(sizes)
        )
        self.register_buffer("mean", torch.zeros(style))  # of the styles of late

    def forward(self, latent: Tensor, classes: Tensor | None) -> Tensor:
        """[B, L] → [B, S]; while it trains, the mean style follows."""
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
        """Styles nearer to their mean (Karras et al. 2019, arXiv:1812.04948, appendix B)."""
        return styles if share == 1 else self.mean + share * (styles - self.mean)


def _normalized(features: Tensor) -> Tensor:
    return features * (features.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def mixed(styles: Sequence[Tensor], layers: int, crossing: Tensor) -> Tensor:
    """Two styles [B, S] → a style for each layer, [B, layers, S]: the first before the layer `crossing` [B], the second from it on."""
    number = torch.arange(layers, device=crossing.device)
    first, second = (style[:, None].expand(-1, layers, -1) for style in styles)
    return torch.where((number < crossing[:, None])[..., None], first, second)
