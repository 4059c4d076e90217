"""PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517): an image's pixels one after the other, each given those before.

Two streams of gated residual blocks; the blocks on the way up also see those on the way down (§2.3). A pixel's levels
are a mixture of logistics, its channels one after the other (§2.1–2.2), or, for gray, a probability for each level. What
differs from the paper: instead of halving the image and doubling it again, every second block may read `dilation` pixels
apart, which sees as far and lets each convolution keep what it has read; and weights are not normalized. Written by hand,
since no kept library has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.config.nets.pixelcnnpp import Net
from finetune.config.nets.transformer import Stack
from finetune.data.batch import Batch
from finetune.errors import UserError
from finetune.models.base import SampleRequest, TrainStep
from finetune.models.scratch.autoregressive.masked_conv import CausalConv, Place
from finetune.models.scratch.base import LikelihoodModel, Space, build_from_scratch, class_embedding, levels_and_classes
from finetune.models.scratch.distributions import PixelDistribution, pixel_distribution
from finetune.rng import Draw

build = build_from_scratch


def concat_elu(features: Tensor) -> Tensor:
    """ELU of x and of −x, side by side: [B, C, H, W] → [B, 2C, H, W]."""
    return functional.elu(torch.cat([features, -features], 1))


@final
class Gated(nn.Module):
    """x + a · σ(b), where a and b are convolutions of x, of what another stream says, and of the class."""

    def __init__(
        self, width: int, horizontal: bool, dilation: int, beside: int, dropout: float, conditioned: int
    ) -> None:
        super().__init__()
        kernel = (2, 2) if horizontal else (2, 3)
        self.first = CausalConv(2 * width, width, kernel, dilation, dilation, dilation)
        self.second = CausalConv(2 * width, 2 * width, kernel, dilation, dilation, dilation)
        self.beside = nn.Conv2d(2 * beside, width, 1) if beside else None
        self.condition = nn.Linear(conditioned, 2 * width) if conditioned else None
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.second.weight.mul_(0.1)  # a new block all but passes x through

    def forward(self, features: Tensor, beside: Tensor | None, condition: Tensor | None, place: Place | None) -> Tensor:
        """[B, width, H, W] → the same; `beside` [B, beside, H, W]; `condition` [B, conditioned]."""
        result: Tensor = self.first(concat_elu(features), place)
        if self.beside is not None and beside is not None:
            result = result + self.beside(concat_elu(beside))
        result = self.second(self.dropout(concat_elu(result)), place)
        if self.condition is not None and condition is not None:
            result = result + self.condition(condition)[:, :, None, None]
        value, gate = result.chunk(2, 1)
        return torch.addcmul(features, value, gate.sigmoid())


@final
class PixelCnn(nn.Module):
    """Levels, scaled, → for each pixel the parameters of its distribution given the pixels before.

    Args:
        channels: of a scaled image.
        outputs: parameters a pixel.
        conditioned: width of a condition [B, conditioned]; 0 is none.
    """

    def __init__(self, channels: int, outputs: int, section: Stack, conditioned: int) -> None:
        super().__init__()
        width, inputs = section.width, channels + 1  # a channel of ones tells the image from its padding
        # The window of the vertical stream: two rows above; of the horizontal: the row above, and to the left.
        self.above = CausalConv(inputs, width, (2, 3), 2, 1)
        self.row_above = CausalConv(inputs, width, (1, 3), 1, 1)
        self.left = CausalConv(inputs, width, (2, 1), 1, 1)
        apart = [section.dilation if number % 2 else 1 for number in range(section.blocks)]

        def blocks(horizontal: bool, apart: list[int], beside: int) -> nn.ModuleList:
            return nn.ModuleList(
                Gated(width, horizontal, dilation, beside, section.dropout, conditioned) for dilation in apart
            )

        self.down_vertical, self.down_horizontal = blocks(False, apart, 0), blocks(True, apart, width)
        self.up_vertical, self.up_horizontal = blocks(False, apart[::-1], width), blocks(True, apart[::-1], 2 * width)
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, scaled: Tensor, condition: Tensor | None) -> Tensor:
        """[B, channels, H, W] → [B, outputs, H, W]."""
        return self.horizontal(scaled, self.vertical(scaled, condition, None), condition, None)

    def vertical(self, scaled: Tensor, condition: Tensor | None, place: Place | None) -> list[Tensor]:
        """What every block of the vertical stream says, in the order in which the horizontal stream's blocks read it."""
        down = [self.above(_with_ones(scaled), place)]
        for block in self.down_vertical:
            down.append(block(down[-1], None, condition, place))
        result, features = down[1:], down[-1]
        for block, before in zip(self.up_vertical, reversed(down[:-1]), strict=True):
            features = block(features, before, condition, place)
            result.append(features)
        return result

    def horizontal(
        self, scaled: Tensor, vertical: list[Tensor], condition: Tensor | None, place: Place | None
    ) -> Tensor:
        """What is said of each pixel, [B, out, H, W], by the pixels left of it and by what the `vertical` stream says of the rows above."""
        ones = _with_ones(scaled)
        down = [self.row_above(ones, place) + self.left(ones, place)]
        half = len(self.down_horizontal)
        for block, above in zip(self.down_horizontal, vertical[:half], strict=True):
            down.append(block(down[-1], above, condition, place))
        features = down[-1]
        for block, before, above in zip(self.up_horizontal, reversed(down[:-1]), vertical[half:], strict=True):
            features = block(features, torch.cat([above, before], 1), condition, place)
        result: Tensor = self.out(functional.elu(features))
        return result

    @torch.no_grad()
    def generate(self, scaled: Tensor, condition: Tensor | None, pick: Callable[[Tensor, int, int], Tensor]) -> None:
        """Draw into `scaled` [B, channels, H, W], pixel by pixel, each convolution keeping what it has read.

        Args:
            pick: (parameters [B, outputs, 1, 1], y, x) → what is drawn there, [B, channels, 1, 1].
        """
        caches = Place(*scaled.shape[2:])
        for y in range(scaled.shape[2]):
            caches.y, caches.x = y, None
            vertical = self.vertical(scaled[:, :, y : y + 1], condition, caches)
            for x in range(scaled.shape[3]):
                caches.x = x
                above = [features[:, :, :, x : x + 1] for features in vertical]
                parameters = self.horizontal(scaled[:, :, y : y + 1, x : x + 1], above, condition, caches)
                scaled[:, :, y : y + 1, x : x + 1] = pick(parameters, y, x)
                for first in (self.above, self.row_above, self.left):  # those that read the image itself
                    first.write(_with_ones(scaled[:, :, y : y + 1, x : x + 1]), caches)


def _with_ones(scaled: Tensor) -> Tensor:
    return functional.pad(scaled, (0, 0, 0, 0, 0, 1), value=1.0)


@final
class Conditioned(nn.Module):
    """The net, and the embedding of its classes where there are any."""

    def __init__(self, space: Space, section: Net, outputs: int) -> None:
        super().__init__()
        self.classes = class_embedding(space, section.width)
        self.cnn = PixelCnn(space.channels, outputs, section, section.width if space.classes else 0)
        self._space = space

    def condition(self, classes: Tensor | None) -> Tensor | None:
        return None if self.classes is None else self.classes(classes)

    def forward(self, levels: Tensor, classes: Tensor | None) -> Tensor:
        """Levels [B, C, H, W] → parameters [B, P, H, W]."""
        result: Tensor = self.cnn(self._space.scaled(levels), self.condition(classes))
        return result


@final
class ExactStep(TrainStep):
    """−log p of each image, in nats."""

    name = "pixels"

    def __init__(self, net: Conditioned, distribution: PixelDistribution) -> None:
        self.net, self._distribution = net, distribution

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        levels, classes = levels_and_classes(batch)
        return -self._distribution.log_prob(self.net(levels, classes), levels).flatten(1).sum(1)


@final
class PixelCnnPlusPlus(LikelihoodModel):
    exact = True

    def __init__(self, space: Space, section: Net) -> None:
        super().__init__(space, section)
        if section.distribution == "categorical" and space.channels > 1:
            raise UserError(
                "a categorical pixel's channels would not see each other",
                where="net.distribution",
                remedy="set net.distribution: logistics, or data.grayscale: true",
            )
        self._distribution = pixel_distribution(section.distribution, space, section.mixtures)
        self.net: Conditioned = Conditioned(space, section, self._distribution.parameters)
        self._step = ExactStep(self.net, self._distribution)

    def train_steps(self) -> tuple[TrainStep, ...]:
        return (self._step,)

    @torch.no_grad()
    def nats(self, batch: Batch, draw: Draw, particles: int = 1) -> Tensor:
        return self._step.loss(batch, draw)

    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        """Levels uint8, [B, C, H, W], pixel by pixel, what earlier pixels gave being kept."""
        uniform, levels = (
            self.uniform(draw),
            torch.zeros(len(draw.places), *self.space.shape, dtype=torch.uint8, device=self.device),
        )

        def pick(parameters: Tensor, y: int, x: int) -> Tensor:
            levels[:, :, y : y + 1, x : x + 1] = self._distribution.sample(
                parameters, uniform[:, :, y : y + 1, x : x + 1]
            )
            return self.space.scaled(levels[:, :, y : y + 1, x : x + 1])

        self.net.cnn.generate(torch.zeros(levels.shape, device=self.device), self.net.condition(classes), pick)
        return levels

    def generate_uncached(self, classes: Tensor | None, draw: Draw) -> Tensor:
        """The same images by a whole pass a pixel: what `draw` is tested and timed against."""
        uniform, levels = (
            self.uniform(draw),
            torch.zeros(len(draw.places), *self.space.shape, dtype=torch.uint8, device=self.device),
        )
        for y in range(self.space.height):
            for x in range(self.space.width):
                result = self._distribution.sample(self.net(levels, classes), uniform)
                levels[:, :, y, x] = result[:, :, y, x]
        return levels

    def uniform(self, draw: Draw) -> Tensor:
        """All the chance that an image takes, [B, draws, H, W]."""
        return draw.uniform("pixels", (self._distribution.draws, *self.space.shape[1:]))


def create(space: Space, section: Net) -> PixelCnnPlusPlus:
    return PixelCnnPlusPlus(space, section)
