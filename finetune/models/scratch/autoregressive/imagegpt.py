"""ImageGPT (Chen et al. 2020): an autoregressive transformer over an image as a sequence of tokens.

A token is the level of one channel of one pixel, with an exact likelihood; or a pixel's color from a palette (found by
k-means on the data; the paper's has 512 colors), which makes sequences a third as long but gives no likelihood of the
original image.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from finetune.config.nets.imagegpt import Net
from finetune.data.batch import Batch
from finetune.errors import UserError
from finetune.models.base import SampleRequest, TrainStep
from finetune.models.scratch.autoregressive.transformer import TokenTransformer
from finetune.models.scratch.base import LikelihoodModel, Space, build_from_scratch, levels_and_classes
from finetune.rng import Draw

build = build_from_scratch
PALETTE_IMAGES, PALETTE_ROUNDS = 256, 20  # training images and iterations of k-means


@final
class TokenizedImages(nn.Module):
    """The transformer with conversions between images and tokens."""

    palette: Tensor

    def __init__(self, space: Space, section: Net) -> None:
        super().__init__()
        self._space = space
        self.register_buffer("palette", torch.zeros(section.palette, space.channels))  # levels
        vocabulary = section.palette or space.levels
        length = space.dimensions // (space.channels if section.palette else 1)
        self.transformer = TokenTransformer(
            vocabulary, length, len(space.classes), section.width, section.layers, section.heads, section.dropout
        )

    def tokens(self, levels: Tensor) -> Tensor:
        """Levels [B, C, H, W] → tokens [B, length] int64 in raster order, channels innermost."""
        pixels = levels.permute(0, 2, 3, 1)
        if not len(self.palette):
            return pixels.flatten(1).long()
        return torch.cdist(pixels.flatten(1, 2).float(), self.palette).argmin(-1)

    def levels(self, tokens: Tensor) -> Tensor:
        """Tokens → levels [B, C, H, W] uint8: the inverse of `tokens`."""
        channels, height, width = self._space.shape
        values = self.palette[tokens].round() if len(self.palette) else tokens
        return values.reshape(-1, height, width, channels).permute(0, 3, 1, 2).to(torch.uint8)

    def forward(self, levels: Tensor, classes: Tensor | None) -> Tensor:
        """The log-probability of each image's tokens, [B]."""
        return self.transformer.log_prob(self.tokens(levels), classes)


@final
class TokenStep(TrainStep):
    """Trains the transformer: −log p of each image's tokens, in nats."""

    name = "tokens"

    def __init__(self, net: TokenizedImages) -> None:
        self.net = net

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        result: Tensor = -self.net(*levels_and_classes(batch))
        return result


@final
class ImageGpt(LikelihoodModel):
    """ImageGPT, with an exact likelihood if it has no palette."""

    exact = True

    def __init__(self, space: Space, section: Net) -> None:
        super().__init__(space, section)
        self.net: TokenizedImages = TokenizedImages(space, section)
        self._step = TokenStep(self.net)

    def train_steps(self) -> tuple[TrainStep, ...]:
        return (self._step,)

    @torch.no_grad()
    def start(self) -> None:
        """Find the palette of the training images by k-means."""
        if len(self.net.palette):
            pixels = self.examples(PALETTE_IMAGES)["pixels"].permute(0, 2, 3, 1).flatten(0, 2).float()
            self.net.palette.copy_(k_means(pixels, len(self.net.palette)))

    @torch.no_grad()
    def nats(self, batch: Batch, draw: Draw, particles: int = 1) -> Tensor:
        """−log p of each image in nats, [B].

        Raises:
            UserError: the model has a palette.
        """
        if len(self.net.palette):
            problem = "a model with a palette has no likelihood that is comparable with others"
            raise UserError(problem, where="net.palette", remedy="train with net.palette: 0")
        return self._step.loss(batch, draw)

    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        return self.net.levels(
            self.net.transformer.generate(draw.uniform("tokens", (self.net.transformer.length,)), classes)
        )

    def generate_uncached(self, classes: Tensor | None, draw: Draw) -> Tensor:
        return self.net.levels(
            self.net.transformer.generate_uncached(draw.uniform("tokens", (self.net.transformer.length,)), classes)
        )


def k_means(points: Tensor, count: int) -> Tensor:
    """k-means: `count` centers [count, D] of points [N, D] by Lloyd's algorithm, initialized farthest-first."""
    points, weights = points.unique(dim=0, return_counts=True)
    weights = weights.float()
    centers = points[weights.argmax()][None]
    while len(centers) < min(count, len(points)):
        centers = torch.cat([centers, points[torch.cdist(points, centers).amin(1).argmax()][None]])
    for _ in range(PALETTE_ROUNDS):
        nearest = torch.cdist(points, centers).argmin(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, points * weights[:, None])
        counts = torch.zeros(len(centers), device=points.device).index_add_(0, nearest, weights)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers)
    return torch.cat([centers, centers[:1].expand(count - len(centers), -1)])


def create(space: Space, section: Net) -> ImageGpt:
    return ImageGpt(space, section)
