"""PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517): an autoregressive model of pixels.

Two streams of gated residual blocks with skip connections from the first half to the second (§2.3). The distribution of
a pixel is a mixture of logistics, autoregressive in its channels (§2.1–2.2), or categorical for gray images.
Differences from the paper: every second block may be dilated instead of downsampling and upsampling, which has the same
receptive field and allows caching; and there is no weight normalization. Implemented here because no maintained library
has it.
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
from finetune.models.base import SampleRequest, TrainStep
from finetune.models.scratch.autoregressive.masked_conv import CausalConv, Place
from finetune.models.scratch.base import LikelihoodModel, Space, build_from_scratch, class_embedding, levels_and_classes
from finetune.models.scratch.distributions import PixelDistribution, pixel_distribution
from finetune.rng import Draw

build = build_from_scratch


def concat_elu(features: Tensor) -> Tensor:
    """Concatenate ELU(x) and ELU(−x): [B, C, H, W] → [B, 2C, H, W]."""
    return functional.elu(torch.cat([features, -features], 1))


@final
class Gated(nn.Module):
    """A gated residual block x + a · σ(b), with a and b computed from x, another stream and the class."""

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
            self.second.weight.mul_(0.1)  # a new block is nearly the identity

    def forward(self, features: Tensor, beside: Tensor | None, condition: Tensor | None, place: Place | None) -> Tensor:
        """[B, width, H, W] → the same shape; `beside` [B, beside, H, W] is the other stream."""
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
    """Scaled images → parameters of each pixel's distribution given the previous pixels.

    Args:
        channels: of the images.
        outputs: parameters per pixel.
        section: the recipe's `net` section.
        conditioned: width of the condition [B, conditioned]; 0: none.
    """

    def __init__(self, channels: int, outputs: int, section: Stack, conditioned: int) -> None:
        super().__init__()
        width, inputs = section.width, channels + 1  # a channel of ones distinguishes the image from padding
        # Windows: the vertical stream sees two rows above; the horizontal one the row above, and to the left.
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
        """Outputs of the vertical stream's blocks, in the order in which the horizontal stream uses them."""
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
        """Parameters of each pixel, [B, outputs, H, W], from pixels to the left and the vertical stream."""
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
        """Sample into `scaled` [B, channels, H, W], pixel by pixel, with cached convolutions.

        Args:
            scaled: the images, overwritten.
            condition: the condition [B, conditioned].
            pick: (parameters [B, outputs, 1, 1], y, x) → the sampled pixel [B, channels, 1, 1].
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
                for first in (self.above, self.row_above, self.left):  # their input is the image itself
                    first.write(_with_ones(scaled[:, :, y : y + 1, x : x + 1]), caches)


def _with_ones(scaled: Tensor) -> Tensor:
    return functional.pad(scaled, (0, 0, 0, 0, 0, 1), value=1.0)


@final
class Conditioned(nn.Module):
    """The network with an embedding of the classes, if any."""

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
    """Trains the network: −log p of each image, in nats."""

    name = "pixels"

    def __init__(self, net: Conditioned, distribution: PixelDistribution) -> None:
        self.net, self._distribution = net, distribution

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        levels, classes = levels_and_classes(batch)
        return -self._distribution.log_prob(self.net(levels, classes), levels).flatten(1).sum(1)


@final
class PixelCnnPlusPlus(LikelihoodModel):
    """PixelCNN++, with an exact likelihood."""

    exact = True

    def __init__(self, space: Space, section: Net) -> None:
        super().__init__(space, section)
        self._distribution = pixel_distribution(section.distribution, space, section.mixtures)
        self.net: Conditioned = Conditioned(space, section, self._distribution.parameters)
        self._step = ExactStep(self.net, self._distribution)

    def train_steps(self) -> tuple[TrainStep, ...]:
        return (self._step,)

    @torch.no_grad()
    def nats(self, batch: Batch, draw: Draw, particles: int = 1) -> Tensor:
        return self._step.loss(batch, draw)

    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        """Generate levels [B, C, H, W] uint8 pixel by pixel, with cached convolutions."""
        uniform, levels = (
            self.uniform(draw),
            torch.zeros(len(draw.batch_indices), *self.space.shape, dtype=torch.uint8, device=self.device),
        )

        def pick(parameters: Tensor, y: int, x: int) -> Tensor:
            levels[:, :, y : y + 1, x : x + 1] = self._distribution.sample(
                parameters, uniform[:, :, y : y + 1, x : x + 1]
            )
            return self.space.scaled(levels[:, :, y : y + 1, x : x + 1])

        self.net.cnn.generate(torch.zeros(levels.shape, device=self.device), self.net.condition(classes), pick)
        return levels

    def generate_uncached(self, classes: Tensor | None, draw: Draw) -> Tensor:
        """Generate the same images with a full pass per pixel (the reference for tests and benchmarks)."""
        uniform, levels = (
            self.uniform(draw),
            torch.zeros(len(draw.batch_indices), *self.space.shape, dtype=torch.uint8, device=self.device),
        )
        for y in range(self.space.height):
            for x in range(self.space.width):
                result = self._distribution.sample(self.net(levels, classes), uniform)
                levels[:, :, y, x] = result[:, :, y, x]
        return levels

    def uniform(self, draw: Draw) -> Tensor:
        """All random numbers of an image, [B, draws, H, W]."""
        return draw.uniform("pixels", (self._distribution.draws, *self.space.shape[1:]))


def create(space: Space, section: Net) -> PixelCnnPlusPlus:
    return PixelCnnPlusPlus(space, section)
