"""Alias-free layers of StyleGAN3 (Karras et al. 2021, arXiv:2106.12423), written from the paper.

Details move with the objects instead of sticking to pixel coordinates. Nonlinearities create frequencies above what the
pixel grid can represent, which alias. They are therefore applied at twice the sampling rate between two low-pass
filters (§3.2, Kaiser filters of appendix C). The input is a set of Fourier features instead of a learned map, every map
has a margin that hides the borders, and there is no per-pixel noise. Not implemented: the learned transform of the
input, cutoffs that rise layer by layer (here only at full size), and gains from running magnitudes.
"""

from __future__ import annotations

import itertools
import math
from typing import final

import torch
from torch import Tensor, nn

from finetune.config.nets.stylegan2 import Net
from finetune.models.scratch.base import Space
from finetune.models.scratch.blocks import halved
from finetune.models.scratch.gan.base import widths_by_size
from finetune.models.scratch.gan.stylegan2 import Styled
from finetune.models.scratch.gan.stylegan_layers import Modulated, activated, resampled
from finetune.rng import Draw

TAPS = 6  # filter taps per sample at the lower rate
HALF_WIDTH = (math.sqrt(2) - 1) / 2  # half-width of the transition band, in samples⁻¹ (§3.2)
# Cutoffs in samples⁻¹: the Nyquist frequency, and one whose transition band stays below it.
CRITICAL, SAFE = 0.5, 0.5 - HALF_WIDTH


def low_pass(cutoff: float, factor: int) -> Tensor:
    """A windowed sinc filter at `factor` times the rate of the cutoff, with sum 1.

    The window's β follows Oppenheim & Schafer, §7.5.
    """
    taps = TAPS * factor
    attenuation = 2.285 * (taps - 1) * math.pi * (4 * HALF_WIDTH / factor) + 7.95
    over = max(attenuation - 21, 0.0)
    beta = 0.1102 * (attenuation - 8.7) if attenuation > 50 else 0.5842 * over**0.4 + 0.07886 * over
    time = (torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2) / factor
    kernel = torch.sinc(2 * cutoff * time) * torch.kaiser_window(taps, periodic=False, beta=beta, dtype=torch.float64)
    return (kernel / kernel.sum()).float()


def upsampled(maps: Tensor, kernel: Tensor, factor: int) -> Tensor:
    """Upsample by `factor`: insert zeros and filter; pixel centers are preserved."""
    before = len(kernel) - 1 - (len(kernel) - factor) // 2
    return resampled(maps, kernel * factor, (before, len(kernel) - 1 - before), up=factor)


def downsampled(maps: Tensor, kernel: Tensor) -> Tensor:
    """Filter and downsample by 2; pixel centers are preserved."""
    side = len(kernel) // 2 - 1
    return resampled(maps, kernel, (side, side), down=2)


@final
class Waves(nn.Module):
    """The input: Fourier features [1, channels, h, w] within the map's bandwidth, mixed by a learned matrix."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int, grid: tuple[int, int], margin: int) -> None:
        super().__init__()
        self._grid, self._margin = grid, margin
        angles, radii = torch.rand(channels) * 2 * math.pi, SAFE * torch.rand(channels).sqrt()
        self.register_buffer("frequencies", torch.stack([angles.sin(), angles.cos()], 1) * radii[:, None])
        self.register_buffer("phases", torch.rand(channels))
        self.mix = nn.Parameter(torch.randn(channels, channels))

    def forward(self, shift: tuple[float, float]) -> Tensor:
        """Evaluate the features shifted by `shift` = (down, right), in pixels of this map."""
        down, across = (
            torch.arange(side + 2 * self._margin, device=self.phases.device) - self._margin - by
            for side, by in zip(self._grid, shift, strict=True)
        )
        cycles = (
            self.frequencies[:, 0, None, None] * down[:, None]
            + self.frequencies[:, 1, None, None] * across
            + self.phases[:, None, None]
        )  # [channels, h, w]
        return torch.einsum(
            "oc,chw->ohw", self.mix / math.sqrt(len(self.mix)), math.sqrt(2) * torch.sin(2 * math.pi * cycles)
        )[None]


@final
class AliasFreeLayer(nn.Module):
    """A modulated convolution and a filtered nonlinearity.

    `doubling`: the output has twice the size, and its margin is cropped to the original one.
    """

    up: Tensor
    down: Tensor

    def __init__(self, before: int, after: int, section: Net, doubling: bool, last_size: bool) -> None:
        super().__init__()
        self._doubling, self._margin = doubling, section.margin
        self.convolution = Modulated(before, after, 3, section.style_dim)
        self.bias = nn.Parameter(torch.zeros(after, 1, 1))
        self._factor = 4 if doubling else 2
        self.register_buffer(
            "up", low_pass(CRITICAL if last_size and not doubling else SAFE, self._factor), persistent=False
        )
        self.register_buffer("down", low_pass(CRITICAL if last_size else SAFE, 2), persistent=False)

    def forward(self, maps: Tensor, styles: Tensor) -> Tensor:
        maps = self.convolution(maps, styles) + self.bias
        maps = downsampled(activated(upsampled(maps, self.up, self._factor)), self.down)
        cut = self._margin
        return maps[..., cut:-cut, cut:-cut] if self._doubling else maps


@final
class AliasFreeGenerator(Styled):
    def __init__(self, space: Space, section: Net) -> None:
        super().__init__(space, section)
        widths = widths_by_size(section)
        self._margin, self._sizes = section.margin, section.halvings
        self.ground = Waves(widths[0], halved(space.height, space.width, section.halvings), section.margin)
        chain = [AliasFreeLayer(widths[0], widths[0], section, False, False)]
        for number, (before, after) in enumerate(itertools.pairwise(widths), 1):
            last = number == section.halvings
            chain += [
                AliasFreeLayer(before, after, section, True, last),
                AliasFreeLayer(after, after, section, False, last),
            ]
        self.chain = nn.ModuleList(chain)
        self.paint = Modulated(widths[-1], space.channels, 1, section.style_dim, demodulate=False)
        self.color = nn.Parameter(torch.zeros(space.channels, 1, 1))
        self.layers = len(chain) + 1

    def synthesis(self, styles: Tensor, draw: Draw, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        """Generate images; `shift` = (down, right) translates the input, in image pixels."""
        maps = self.ground((shift[0] / 2**self._sizes, shift[1] / 2**self._sizes)).expand(len(styles), -1, -1, -1)
        for number, layer in enumerate(self.chain):
            maps = layer(maps, styles[:, number])
        cut = self._margin
        result: Tensor = self.paint(maps[..., cut:-cut, cut:-cut], styles[:, -1]) + self.color
        return result


@torch.no_grad()
def equivariance(generator: AliasFreeGenerator, styles: Tensor, draw: Draw, pixels: int) -> float:
    """Translation equivariance in dB: EQ-T for whole pixels (§2.2), relative to the images' own range.

    10 log₁₀ of the squared range over the mean squared difference between the image of the shifted input and the
    shifted image, where both are visible.
    """
    still = generator.synthesis(styles, draw)
    moved = generator.synthesis(styles, draw, (0.0, float(pixels)))
    error = (moved[..., pixels:] - still[..., :-pixels]).square().mean()
    return float(10 * torch.log10((still.amax() - still.amin()).square() / error))
