"""What normalizing flows over images (RealNVP, Glow) share; a family's own file defines the steps of a scale.

The log-likelihood of levels x is bounded by dequantization with noise u ~ q(u|x) in [0, 1): log P(x) ≥ E[log p((x + u)
/ levels) − D · log levels − log q(u|x)], where q is uniform (Theis et al. 2016, arXiv:1511.01844) or learned (Flow++,
Ho et al. 2019, arXiv:1902.00275, §3.1). p is the flow's density, log N(z; 0, I) + log |det|.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import cast, final

import torch
from torch import Tensor, nn

from finetune.config.nets.flow import Flow as Section
from finetune.data.batch import Batch
from finetune.models.base import SampleRequest, TrainStep
from finetune.models.scratch.base import LikelihoodModel, Space, class_embedding, levels_and_classes
from finetune.models.scratch.blocks import halved
from finetune.models.scratch.flows.bijections import (
    ActNorm,
    Affine,
    Bijection,
    Chain,
    Coupling,
    LearnedPrior,
    Logit,
    MixtureCdf,
    Squeeze,
)
from finetune.rng import Draw

STARTING_IMAGES = 256  # that initialize ActNorm
NOISE_STEPS = 4  # couplings of the learned dequantization noise


def coupling(section: Section, channels: int, second: bool, context: int = 0) -> Coupling:
    """A coupling of the kind that `net.coupling` names."""
    net = (section.width, section.blocks, section.dropout)
    if section.coupling == "mixture":
        return MixtureCdf(channels, second, net, section.mixtures, context)
    return Affine(channels, second, net, context)


def log_normal(values: Tensor) -> Tensor:
    """Standard normal log-density of each example, [B]."""
    return (-0.5 * (values.square() + math.log(2 * math.pi))).flatten(1).sum(1)


@final
class MultiScale(nn.Module):
    """Images in [0, 1] ↔ latents [B, D]; after each scale but the last, half of the channels becomes latents.

    Attribute names are stored in checkpoints.
    """

    def __init__(self, space: Space, section: Section, scales: Sequence[Bijection], rests: Sequence[Bijection]) -> None:
        super().__init__()
        self.logit, self.scales, self.rests = Logit(section.margin), nn.ModuleList(scales), nn.ModuleList(rests)
        self._sizes: list[tuple[int, int, int]] = []
        channels, height, width = space.shape
        for number in range(section.scales):
            channels, height, width = channels * 4, height // 2, width // 2
            if number < section.scales - 1:
                channels //= 2
                self._sizes.append((channels, height, width))
        self._sizes.append((channels, height, width))

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] → (latents [B, D], log |det| [B])."""
        values, total = self.logit(values)
        latents = []
        for number, scale in enumerate(self.scales):
            values, log_det = scale(values)
            total = total + log_det
            if number < len(self.rests):
                values, log_det = self.rests[number](values)
                total = total + log_det
                values, rest = values.chunk(2, 1)
                latents.append(rest.flatten(1))
        return torch.cat([*latents, values.flatten(1)], 1), total

    def inverse(self, latent: Tensor) -> Tensor:
        parts = [
            part.unflatten(1, size)
            for part, size in zip(latent.split([math.prod(size) for size in self._sizes], 1), self._sizes, strict=True)
        ]
        values = parts.pop()
        for number in reversed(range(len(self.scales))):
            if number < len(self.rests):
                values = cast(Bijection, self.rests[number]).inverse(torch.cat([values, parts.pop()], 1))
            values = cast(Bijection, self.scales[number]).inverse(values)
        return self.logit.inverse(values)


@final
class LearnedNoise(nn.Module):
    """q(u|x): a conditional flow from normal noise to [0, 1) (Flow++, §3.1)."""

    def __init__(self, space: Space, section: Section) -> None:
        super().__init__()
        self._space = space
        net = (section.width, section.blocks, section.dropout)
        self.context = nn.Sequential(nn.Conv2d(4 * space.channels, section.width, 3, padding=1), nn.SiLU())
        self.couplings = nn.ModuleList(
            Affine(4 * space.channels, bool(n % 2), net, section.width) for n in range(NOISE_STEPS)
        )
        self.squeeze = Squeeze()

    def forward(self, levels: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Levels and normal noise [B, C, H, W] → u in (0, 1) and log q(u|x) [B]."""
        context = self.context(self.squeeze(self._space.scaled(levels).to(normal.dtype))[0])
        values, total = self.squeeze(normal)[0], log_normal(normal)
        for one in self.couplings:
            values, log_det = one(values, context)
            total = total - log_det
        values = self.squeeze.inverse(values)
        u = values.sigmoid()
        return u, total - (nn.functional.logsigmoid(values) + nn.functional.logsigmoid(-values)).flatten(1).sum(1)


@final
class Dequantized(nn.Module):
    """The flow with dequantization noise and class-conditional means of the latents."""

    def __init__(self, space: Space, section: Section, flow: MultiScale) -> None:
        super().__init__()
        self._space, self.flow = space, flow
        self.noise = LearnedNoise(space, section) if section.dequantization == "variational" else None
        self.means = class_embedding(space, space.dimensions)
        if self.means is not None:
            nn.init.zeros_(self.means.weight)

    def mean(self, classes: Tensor | None) -> Tensor | float:
        return 0.0 if self.means is None else self.means(classes)

    def forward(self, levels: Tensor, classes: Tensor | None, chance: Tensor) -> Tensor:
        """One sample of the bound on log P(x) in nats, [B].

        `chance` [B, C, H, W] is uniform in [0, 1), or normal for learned noise.
        """
        u, log_q = (chance, 0.0) if self.noise is None else self.noise(levels, chance)
        latent, log_det = self.flow((levels.float() + u) / self._space.levels)
        result: Tensor = (
            log_normal(latent - self.mean(classes))
            + log_det
            - self._space.dimensions * math.log(self._space.levels)
            - log_q
        )
        return result


@final
class FlowStep(TrainStep):
    """Trains the flow: −log P(x) of each image in nats, with one sample of dequantization noise."""

    name = "flow"

    def __init__(self, net: Dequantized, space: Space) -> None:
        self.net, self._space = net, space

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        result: Tensor = -self.net(*levels_and_classes(batch), self.chance(draw, ""))
        return result

    def chance(self, draw: Draw, which: str) -> Tensor:
        purpose = f"dequantisation{which}"
        net = getattr(self.net, "module", self.net)  # unwrapped in distributed training
        return (
            draw.uniform(purpose, self._space.shape) if net.noise is None else draw.normal(purpose, self._space.shape)
        )


class FlowModel(LikelihoodModel):
    """A normalizing flow, with a bound on the likelihood of levels."""

    exact = False

    def __init__(self, space: Space, section: Section) -> None:
        super().__init__(space, section)
        halved(space.height, space.width, section.scales, "net.scales", "lower net.scales")
        channels, scales, rests = space.channels, [], []
        for number in range(section.scales):
            scales.append(Chain(self.steps(section, channels, number)))
            channels *= 4
            if number < section.scales - 1:
                rests.append(LearnedPrior(channels, section.width))
                channels //= 2
        self.net: Dequantized = Dequantized(space, section, MultiScale(space, section, scales, rests))
        self._step = FlowStep(self.net, space)

    @abstractmethod
    def steps(self, section: Section, channels: int, number: int) -> list[Bijection]:
        """The bijections of a scale, including one squeeze: [B, channels, H, W] → [B, 4 · channels, H/2, W/2]."""

    def train_steps(self) -> tuple[TrainStep, ...]:
        return (self._step,)

    @torch.no_grad()
    def start(self) -> None:
        """Initialize each ActNorm in turn from some training images."""
        batch = self.examples(STARTING_IMAGES)
        norms = [module for module in self.net.modules() if isinstance(module, ActNorm)]
        for norm in norms:
            norm.initializing = True
        self._step.loss(batch, Draw(0, "start", range(len(batch["pixels"])), self.device))
        for norm in norms:
            norm.initializing = False

    @torch.no_grad()
    def nats(self, batch: Batch, draw: Draw, particles: int = 1) -> Tensor:
        result = [
            self.net(*levels_and_classes(batch), self._step.chance(draw, f" {number}" if number else ""))
            for number in range(particles)
        ]
        return math.log(particles) - torch.stack(result).logsumexp(0)

    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        latent = draw.normal("latent", (self.space.dimensions,)) + self.net.mean(classes)
        values = self.net.flow.inverse(latent) * self.space.levels
        return values.floor().clamp(0, self.space.levels - 1).to(torch.uint8)
