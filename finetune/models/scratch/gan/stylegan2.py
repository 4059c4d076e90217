"""StyleGAN2 (Karras et al. 2020, arXiv:1912.04958), written from the paper.

The official code was not used: its license forbids it.

A latent is mapped to a style that modulates every layer's weights. The generator adds up RGB outputs of all resolutions
(skip connections), the discriminator is residual (figure 7). Training mixes two styles in most images, noise adds
details that no style controls, and the path length penalty keeps image changes proportional to style changes (equation
4). `alias_free` uses StyleGAN3's layers instead.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from finetune.config.nets.gan import Adversarial as Section
from finetune.config.nets.stylegan2 import Net
from finetune.models.base import gathered
from finetune.models.scratch.base import Space, build_from_scratch
from finetune.models.scratch.blocks import halved
from finetune.models.scratch.gan.base import (
    Adversarial,
    Discriminator,
    DiscriminatorBody,
    Generator,
    GeneratorPenalty,
    widths_by_size,
)
from finetune.models.scratch.gan.stylegan_layers import (
    EqualConv,
    EqualLinear,
    Mapping,
    Modulated,
    activated,
    doubled,
    mixed,
)
from finetune.rng import Draw

build = build_from_scratch


class Styled(Generator):
    """A generator in two parts: mapping (latents → a style per layer) and synthesis (styles → images)."""

    layers: int  # number of layers with a style
    path_mean: Tensor

    def __init__(self, space: Space, section: Net) -> None:
        super().__init__()
        self._mixing = section.style_mixing
        self.mapping = Mapping(space, section.latent, section.style_dim, section.mapping_layers)
        self.register_buffer("path_mean", torch.zeros(()))  # running mean of the path lengths

    def styles(self, latent: Tensor, classes: Tensor | None, draw: Draw, truncation: float = 1.0) -> Tensor:
        """Styles [B, layers, S]; in training, a share of the images mixes two latents."""
        style = self.mapping.truncated(self.mapping(latent, classes), truncation)
        if not (self.training and self._mixing):
            return style[:, None].expand(-1, self.layers, -1)
        other = self.mapping(draw.normal("mixed latent", (latent.shape[1],)), classes)
        crossing = 1 + draw.integers("crossing", max(1, self.layers - 1))
        one = draw.uniform("whether mixed") >= self._mixing
        return mixed((style, other), self.layers, torch.where(one, torch.full_like(crossing, self.layers), crossing))

    @abstractmethod
    def synthesis(self, styles: Tensor, draw: Draw) -> Tensor:
        """Styles [B, layers, S] → scaled images [B, C, H, W]."""

    def forward(self, latent: Tensor, classes: Tensor | None, draw: Draw, truncation: float = 1.0) -> Tensor:
        return self.synthesis(self.styles(latent, classes, draw, truncation), draw)


@final
class Layer(nn.Module):
    """Optional upsampling, a modulated convolution, noise, bias and nonlinearity."""

    def __init__(self, before: int, after: int, style: int, doubling: bool) -> None:
        super().__init__()
        self._doubling = doubling
        self.convolution = Modulated(before, after, 3, style)
        self.strength, self.bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(after, 1, 1))

    def forward(self, maps: Tensor, styles: Tensor, draw: Draw, name: str) -> Tensor:
        maps = self.convolution(doubled(maps) if self._doubling else maps, styles)
        return activated(maps + self.strength * draw.normal(name, (1, *maps.shape[2:])) + self.bias)


@final
class SkipGenerator(Styled):
    def __init__(self, space: Space, section: Net) -> None:
        super().__init__(space, section)
        widths, style = widths_by_size(section), section.style_dim
        self.ground = nn.Parameter(torch.randn(widths[0], *halved(space.height, space.width, section.halvings)))
        self.first = Layer(widths[0], widths[0], style, doubling=False)
        self.larger = nn.ModuleList()
        for before, after in itertools.pairwise(widths):
            self.larger.append(
                nn.ModuleList([Layer(before, after, style, doubling=True), Layer(after, after, style, doubling=False)])
            )
        self.paint = nn.ModuleList(Modulated(width, space.channels, 1, style, demodulate=False) for width in widths)
        self.color = nn.ParameterList(nn.Parameter(torch.zeros(space.channels, 1, 1)) for _ in widths)
        self.layers = 2 * len(widths)

    def synthesis(self, styles: Tensor, draw: Draw) -> Tensor:
        """Generate images; each RGB output uses the style of the following layer, as in the paper."""
        maps = self.first(self.ground.expand(len(styles), -1, -1, -1), styles[:, 0], draw, "noise 0")
        image: Tensor = self.paint[0](maps, styles[:, 1]) + self.color[0]
        for number, pair in enumerate(self.larger):
            assert isinstance(pair, nn.ModuleList)
            for place, layer in enumerate(pair, 2 * number + 1):
                maps = layer(maps, styles[:, place], draw, f"noise {place}")
            image = doubled(image) + self.paint[number + 1](maps, styles[:, 2 * number + 3]) + self.color[number + 1]
        return image


@final
class Halving(nn.Module):
    """A residual downsampling block: the sum of two convolutions and a 1×1 shortcut, divided by √2."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first, self.second = EqualConv(before, before, 3), EqualConv(before, after, 3, halving=True)
        self.past = EqualConv(before, after, 1, bias=False, halving=True)

    def forward(self, maps: Tensor) -> Tensor:
        result: Tensor = activated(self.second(activated(self.first(maps)))) + self.past(maps)
        return result / math.sqrt(2)


@final
class ResidualBody(DiscriminatorBody):
    def __init__(self, space: Space, section: Net) -> None:
        super().__init__()
        widths = widths_by_size(section)[::-1]
        self.read = EqualConv(space.channels, widths[0], 1)
        self.smaller = nn.Sequential(*(Halving(before, after) for before, after in itertools.pairwise(widths)))

    def forward(self, images: Tensor, draw: Draw) -> Tensor:
        result: Tensor = self.smaller(activated(self.read(images)))
        return result


@final
class Ending(nn.Module):
    """Feature maps → features: a convolution and a fully connected layer."""

    def __init__(self, before: int, after: int, places: int) -> None:
        super().__init__()
        self.convolution, self.whole = EqualConv(before, after, 3), EqualLinear(after * places, after)

    def forward(self, maps: Tensor) -> Tensor:
        return activated(self.whole(activated(self.convolution(maps)).flatten(1)))


@final
class PathLength(GeneratorPenalty):
    """The path length penalty (‖Jᵀ y‖ − a)² (equation 4).

    y has standard normal pixels, J is the Jacobian of the image with respect to the styles, and a the running mean of
    the lengths. y is divided by √(H W), so that the weight does not depend on the resolution.
    """

    def __init__(self, generator: Styled, section: Net) -> None:
        self._generator, self._section, self.every = generator, section, section.path_every

    def __call__(self, draw: Draw, classes: Tensor | None) -> Tensor:
        generator = self._generator
        styles = generator.styles(draw.normal("latent", (self._section.latent,)), classes, draw)
        lengths = path_lengths(generator, styles, draw)
        with torch.no_grad():
            generator.path_mean.lerp_(gathered(lengths.detach()).mean(), 0.01)
        return self._section.path_length * (lengths - generator.path_mean).square()


def path_lengths(generator: Styled, styles: Tensor, draw: Draw) -> Tensor:
    """‖Jᵀ y‖, [B]: squares are summed over a style's components and averaged over layers."""
    with torch.autocast(styles.device.type, enabled=False):
        images = generator.synthesis(styles, draw)
        directions = draw.normal("direction", images.shape[1:]) / math.sqrt(images[0, 0].numel())
        (slopes,) = torch.autograd.grad((images * directions).sum(), styles, create_graph=True)
    return (slopes.square().sum(2).mean(1) + 1e-12).sqrt()


@final
class StyleGan2(Adversarial):
    def pair(self, section: Section) -> tuple[Generator, Discriminator, GeneratorPenalty | None]:
        """Build both networks, and the path length penalty if the recipe has one."""
        assert isinstance(section, Net)
        (height, width), channels = (
            halved(self.space.height, self.space.width, section.halvings),
            widths_by_size(section)[0],
        )
        generator: Styled
        if section.alias_free:
            from finetune.models.scratch.gan.stylegan3 import AliasFreeGenerator

            generator = AliasFreeGenerator(self.space, section)
        else:
            generator = SkipGenerator(self.space, section)

        def ending(before: int) -> tuple[nn.Module, int]:
            return Ending(before, channels, height * width), channels

        discriminator = Discriminator(
            self.space, section, ResidualBody(self.space, section), channels, ending, EqualLinear
        )
        return generator, discriminator, PathLength(generator, section) if section.path_length else None


def create(space: Space, section: Net) -> StyleGan2:
    return StyleGan2(space, section)
