"""R3GAN (Huang et al. 2024, arXiv:2501.05441): a relativistic pairing loss with R1 and R2, without further tricks.

Generator and discriminator mirror each other: residual blocks at each resolution, bilinear resampling in between, and
no normalization. A block is a 1×1 convolution, a wider grouped 3×3 one, and a 1×1 one initialized to zero (Fixup, Zhang
et al. 2019, arXiv:1901.09321). Written from the paper.
"""

from __future__ import annotations

from typing import TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.config.nets.gan import Adversarial as Section
from finetune.config.nets.r3gan import Net
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
SLOPE = 0.2  # of the leaky ReLU
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def level(layer: Layer) -> Layer:
    """Initialize a layer so that it preserves the variance, since no normalization follows."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    return layer


@final
class Block(nn.Module):
    """A residual block, [B, C, H, W] → the same shape; `blocks` is the number of blocks in the network."""

    def __init__(self, channels: int, section: Net, blocks: int) -> None:
        super().__init__()
        inside = section.expansion * channels
        groups = next(
            count for count in range(max(1, inside // section.group_width), inside + 1) if inside % count == 0
        )
        self.first = nn.Conv2d(channels, inside, 1)
        self.middle = nn.Conv2d(inside, inside, 3, padding=1, groups=groups)
        self.last = nn.Conv2d(inside, channels, 1, bias=False)
        for layer in (self.first, self.middle):
            nn.init.kaiming_normal_(layer.weight, SLOPE)
            # Fixup's L^(−1/(2m − 2)) for m = 3 layers: the blocks together change x as much as a single one would.
            layer.weight.data.mul_(blocks**-0.25)
        nn.init.zeros_(self.last.weight)

    def forward(self, maps: Tensor) -> Tensor:
        inside = functional.leaky_relu(self.middle(functional.leaky_relu(self.first(maps), SLOPE)), SLOPE)
        result: Tensor = maps + self.last(inside)
        return result


@final
class Resampled(nn.Module):
    """Bilinear resampling to twice or half the size, with a 1×1 convolution if the number of channels differs."""

    def __init__(self, before: int, after: int, larger: bool) -> None:
        super().__init__()
        self._larger = larger
        self.channels = level(nn.Conv2d(before, after, 1, bias=False)) if before != after else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        if not self._larger:
            maps = functional.avg_pool2d(maps, 2)  # bilinear, at half the size
        result: Tensor = self.channels(maps)
        return (
            functional.interpolate(result, scale_factor=2, mode="bilinear", align_corners=False)
            if self._larger
            else result
        )


@final
class R3Generator(Generator):
    def __init__(self, space: Space, section: Net) -> None:
        super().__init__()
        widths, blocks = widths_by_size(section), section.blocks * (section.halvings + 1)
        self.classes = class_embedding(space, section.latent)
        self.ground = nn.Parameter(
            torch.randn(widths[0], *halved(space.height, space.width, section.halvings))
        )  # a learned map; the latents scale its channels
        self.weigh = level(nn.Linear(section.latent * (2 if self.classes is not None else 1), widths[0], bias=False))
        layers: list[nn.Module] = []
        for size, width in enumerate(widths):
            layers += [Resampled(widths[size - 1], width, larger=True)] if size else []
            layers += [Block(width, section, blocks) for _ in range(section.blocks)]
        self.layers = nn.Sequential(*layers)
        self.paint = level(nn.Conv2d(widths[-1], space.channels, 1, bias=False))

    def forward(self, latent: Tensor, classes: Tensor | None, draw: Draw, truncation: float = 1.0) -> Tensor:
        """Generate images; `truncation` scales the latents."""
        latent = latent * truncation
        if self.classes is not None:
            latent = torch.cat([latent, self.classes(classes)], 1)
        result: Tensor = self.paint(self.layers(self.ground * self.weigh(latent)[..., None, None]))
        return result


@final
class R3Body(DiscriminatorBody):
    def __init__(self, space: Space, section: Net) -> None:
        super().__init__()
        widths, blocks = widths_by_size(section)[::-1], section.blocks * (section.halvings + 1)
        layers: list[nn.Module] = [level(nn.Conv2d(space.channels, widths[0], 1, bias=False))]
        for size, width in enumerate(widths):
            layers += [Resampled(widths[size - 1], width, larger=False)] if size else []
            layers += [Block(width, section, blocks) for _ in range(section.blocks)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, draw: Draw) -> Tensor:
        result: Tensor = self.layers(images)
        return result


@final
class R3gan(Adversarial):
    def pair(self, section: Section) -> tuple[Generator, Discriminator, GeneratorPenalty | None]:
        """Build both networks (arXiv:2501.05441, §4); the discriminator ends in a global depthwise convolution."""
        assert isinstance(section, Net)
        grid = halved(self.space.height, self.space.width, section.halvings)

        def ending(channels: int) -> tuple[nn.Module, int]:
            return nn.Sequential(
                level(nn.Conv2d(channels, channels, grid, groups=channels, bias=False)), nn.Flatten()
            ), channels

        discriminator = Discriminator(
            self.space,
            section,
            R3Body(self.space, section),
            widths_by_size(section)[0],
            ending,
            lambda before, after: level(nn.Linear(before, after)),
        )
        return R3Generator(self.space, section), discriminator, None


def create(space: Space, section: Net) -> R3gan:
    return R3gan(space, section)
