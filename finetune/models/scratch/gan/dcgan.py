"""DCGAN (Radford et al. 2016, arXiv:1511.06434), with options for WGAN-GP and progressive growing.

The generator upsamples a small map with strided transposed convolutions, the discriminator downsamples with strided
convolutions. As in the paper, the generator's output and the discriminator's input are not normalized. With progressive
growing (Karras et al. 2018, arXiv:1710.10196) both start at the smallest resolution, and each further resolution is
blended in. Images
always have the full size: at a lower resolution each pixel is repeated, and the discriminator averages the repeats.
"""

from __future__ import annotations

import itertools
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from finetune.config.nets.dcgan import Net
from finetune.config.nets.gan import Adversarial as Section
from finetune.models.scratch.base import Space, build_from_scratch, class_embedding
from finetune.models.scratch.blocks import halved
from finetune.models.scratch.gan.base import (
    Adversarial,
    Discriminator,
    DiscriminatorBody,
    Generator,
    GeneratorPenalty,
    widths_by_size,
)
from finetune.rng import Draw

build = build_from_scratch


@final
class PixelNorm(nn.Module):
    """Divides the features [B, C, …] of each pixel by their root mean square."""

    def forward(self, features: Tensor) -> Tensor:
        return features * (features.square().mean(1, keepdim=True) + 1e-8).rsqrt()


@final
class Growth(nn.Module):
    """The current resolution of progressive growing: 0 is the smallest; the fraction is the share of the next one."""

    reached: Tensor

    def __init__(self, steps: int, most: int) -> None:
        super().__init__()
        self._steps, self._most = steps, most
        self.register_buffer("reached", torch.full((), 0.0 if steps else float(most)))

    def forward(self, draw: Draw) -> float:
        """The resolution at the current training step, or at the last one."""
        if not self._steps:
            return float(self._most)
        if self.training:
            self.reached.fill_(self.at(int(draw.step)))
            return self.at(int(draw.step))
        return float(self.reached)

    def at(self, step: int) -> float:
        """The resolution at a step: `steps` steps at each size, then as many to blend in the next."""
        phase, within = divmod(step / self._steps, 1)
        return min(float(self._most), phase // 2 + (within if phase % 2 else 0.0))


def _norm(name: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if name == "batch" else PixelNorm() if name == "pixel" else nn.Identity()


def _reached_all(result: Tensor, net: nn.Module) -> Tensor:
    """Add all weights times 0 to a growing network's output: distributed training waits for a gradient of each."""
    nothing = torch.stack([parameter.flatten()[0] * 0 for parameter in net.parameters()]).sum()
    return result + nothing


@final
class DcganGenerator(Generator):
    def __init__(self, space: Space, section: Net) -> None:
        super().__init__()
        self._grid, widths, norm = (
            halved(space.height, space.width, section.halvings),
            widths_by_size(section),
            section.generator_norm,
        )
        self._sizes, self._growing = section.halvings, section.grow_steps > 0
        self.classes = class_embedding(space, section.latent)
        inputs = section.latent * (2 if self.classes is not None else 1)
        self.begin = nn.Linear(inputs, widths[0] * self._grid[0] * self._grid[1])
        self.first = nn.Sequential(_norm(norm, widths[0]), nn.ReLU())
        self.larger = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(before, after, 4, 2, 1, bias=norm != "batch"), _norm(norm, after), nn.ReLU()
            )
            for before, after in itertools.pairwise(widths)
        )
        sizes = range(section.halvings + 1) if self._growing else (section.halvings,)
        self.paint = nn.ModuleDict({str(size): nn.Conv2d(widths[size], space.channels, 3, padding=1) for size in sizes})
        self.growth = Growth(section.grow_steps, section.halvings)

    def forward(self, latent: Tensor, classes: Tensor | None, draw: Draw, truncation: float = 1.0) -> Tensor:
        """Generate images; `truncation` scales the latents."""
        latent = latent * truncation
        if self.classes is not None:
            latent = torch.cat([latent, self.classes(classes)], 1)
        growth = self.growth(draw)
        size, share = int(growth), growth % 1
        maps = self.first(self.begin(latent).view(len(latent), -1, *self._grid))
        for larger in self.larger[:size]:
            maps = larger(maps)
        result = self._full(self.paint[str(size)](maps), size)
        if share:
            next_ = self._full(self.paint[str(size + 1)](self.larger[size](maps)), size + 1)
            result = torch.lerp(result, next_, share)
        return torch.tanh(_reached_all(result, self) if self._growing else result)

    def _full(self, image: Tensor, size: int) -> Tensor:
        return functional.interpolate(image, scale_factor=2 ** (self._sizes - size)) if size < self._sizes else image


@final
class DcganBody(DiscriminatorBody):
    def __init__(self, space: Space, section: Net) -> None:
        super().__init__()
        widths, norm = widths_by_size(section), section.discriminator_norm
        self._sizes, self._growing = section.halvings, section.grow_steps > 0
        sizes = range(section.halvings + 1) if self._growing else (section.halvings,)
        self.read = nn.ModuleDict(
            {
                str(size): nn.Sequential(nn.Conv2d(space.channels, widths[size], 3, padding=1), nn.LeakyReLU(0.2))
                for size in sizes
            }
        )
        # By resolution: `smaller[0]` starts from the second smallest.
        self.smaller = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(after, before, 4, 2, 1, bias=norm != "batch"), _norm(norm, before), nn.LeakyReLU(0.2)
            )
            for before, after in itertools.pairwise(widths)
        )
        self.growth = Growth(section.grow_steps, section.halvings)

    def forward(self, images: Tensor, draw: Draw) -> Tensor:
        """Images [B, C, H, W] → feature maps [B, F, h, w]; while growing, blended from two resolutions."""
        growth = self.growth(draw)
        size, share = int(growth), growth % 1
        maps = self._at(images, size)
        if share:
            maps = torch.lerp(maps, self.smaller[size](self._at(images, size + 1)), share)
        for number in range(size - 1, -1, -1):
            maps = self.smaller[number](maps)
        return _reached_all(maps, self) if self._growing else maps

    def _at(self, images: Tensor, size: int) -> Tensor:
        """Feature maps of the images at a resolution."""
        result: Tensor = self.read[str(size)](
            functional.avg_pool2d(images, 2 ** (self._sizes - size)) if size < self._sizes else images
        )
        return result


@final
class Dcgan(Adversarial):
    def pair(self, section: Section) -> tuple[Generator, Discriminator, GeneratorPenalty | None]:
        """Build both networks."""
        assert isinstance(section, Net)
        grid, channels = halved(self.space.height, self.space.width, section.halvings), widths_by_size(section)[0]
        discriminator = Discriminator(
            self.space,
            section,
            DcganBody(self.space, section),
            channels,
            lambda channels: (nn.Flatten(), channels * grid[0] * grid[1]),
        )
        if section.discriminator_norm == "spectral":
            for module in discriminator.modules():
                if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
                    spectral_norm(module)
        return DcganGenerator(self.space, section), discriminator, None


def create(space: Space, section: Net) -> Dcgan:
    return Dcgan(space, section)
