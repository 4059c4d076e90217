"""Generative adversarial networks (Goodfellow et al. 2014, arXiv:1406.2661): what all GANs share.

Each step trains the discriminator on real and fake images, then the generator with the discriminator's weights
constant. A family provides a `Generator` and a `Discriminator`. The recipe's section chooses the loss
(`objectives.gan_losses`), what regularizes the discriminator (penalties, augmentation, minibatch statistics) and the
number of unrolled steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from finetune.config.nets.gan import Adversarial as Section
from finetune.data.batch import Batch
from finetune.models.base import SampleRequest, TrainStep, detached_forward
from finetune.models.objectives.gan_losses import ADVERSARIAL_LOSSES, one_centered_penalty, zero_centered_penalty
from finetune.models.scratch.base import PixelModel, Space, class_embedding, levels_and_classes
from finetune.models.scratch.gan.ada import Augmentation
from finetune.models.scratch.gan.minibatch_stats import MinibatchDiscrimination, stddev
from finetune.rng import Draw


class Generator(nn.Module, ABC):
    """The network that generates images."""

    @abstractmethod
    def forward(self, latent: Tensor, classes: Tensor | None, draw: Draw, truncation: float = 1.0) -> Tensor:
        """Latents [B, L] and classes [B] → scaled images [B, C, H, W].

        Args:
            draw: the source of further noise.
            truncation: 1 as trained; lower values trade variety for quality.
        """


class DiscriminatorBody(nn.Module, ABC):
    """The convolutional part of a discriminator."""

    @abstractmethod
    def forward(self, images: Tensor, draw: Draw) -> Tensor:
        """Scaled images [B, C, H, W] → feature maps [B, channels, h, w]; `draw.step` is the training step."""


class GeneratorPenalty(ABC):
    """A regularization of the generator, applied every `every` steps with `every` times the weight."""

    every: int

    @abstractmethod
    def __call__(self, draw: Draw, classes: Tensor | None) -> Tensor:
        """The penalty of each example, [B]."""


@final
class Discriminator(nn.Module):
    """Scaled images [B, C, H, W] and classes [B] → logits [B], class-conditional by projection.

    The projection is from Miyato & Koyama 2018, arXiv:1802.05637. Attribute names are stored in checkpoints.

    Args:
        reader: the convolutional part, images → feature maps.
        channels: number of the feature maps.
        ending: a function of the number of channels (one more with minibatch standard deviation) that returns a module
            from feature maps to features [B, F], and F.
        linear: makes the last layer from its numbers of inputs and outputs.
    """

    def __init__(
        self,
        space: Space,
        section: Section,
        reader: DiscriminatorBody,
        channels: int,
        ending: Callable[[int], tuple[nn.Module, int]],
        linear: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self._group = section.stddev_group if section.minibatch == "stddev" else 0
        self.augment = Augmentation(section.ada_target, section.ada_images) if section.ada_target else None
        self.reader = reader
        self.ending, features = ending(channels + bool(self._group))
        self.beside = MinibatchDiscrimination(features) if section.minibatch == "discrimination" else None
        self.classes = class_embedding(space, features)
        self.logit = linear(features + (self.beside.kernels if self.beside is not None else 0), 1)

    def augmented(self, images: Tensor, draw: Draw) -> Tensor:
        """Augment images if the recipe says so."""
        return self.augment(images, draw) if self.augment is not None else images

    def forward(self, images: Tensor, classes: Tensor | None, draw: Draw) -> Tensor:
        maps = self.reader(images, draw)
        features = self.ending(stddev(maps, self._group) if self._group else maps)
        result: Tensor = self.logit(self.beside(features) if self.beside is not None else features).squeeze(1)
        if self.classes is not None:
            result = result + (self.classes(classes) * features).sum(1)
        return result.float()


@final
class DiscriminatorStep(TrainStep):
    """Trains the discriminator to tell real images from fake ones; the generator's weights are constants."""

    name = "critic"  # as in checkpoints and `metrics.jsonl` of earlier runs

    def __init__(self, discriminator: Discriminator, generator: Generator, space: Space, section: Section) -> None:
        self.net, self._unwrapped, self._generator, self._space, self._section = (
            discriminator,
            discriminator,
            generator,
            space,
            section,
        )
        self.cycle = section.penalty_every
        self._objective = ADVERSARIAL_LOSSES[section.objective]

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The discriminator's loss, [B] float32, every `penalty_every` steps with its gradient penalties."""
        levels, classes = levels_and_classes(batch)
        section, discriminator, draw = self._section, self._unwrapped, draw.apart("critic")
        with torch.no_grad():
            fake = discriminator.augmented(self._generator(latent_of(draw, section), classes, draw), draw.apart("made"))
            real = discriminator.augmented(self._space.scaled(levels), draw.apart("true"))
        training = torch.is_grad_enabled()
        penalized = training and int(draw.step) % section.penalty_every == 0
        fake.requires_grad_(penalized and section.r2 > 0)
        real.requires_grad_(penalized and section.r1 > 0)
        # Only one pass may go through the wrapper of distributed training; the others add to the same gradients.
        real_logits, fake_logits = self.net(real, classes, draw), discriminator(fake, classes, draw)
        result = self._objective.discriminator(real_logits, fake_logits)
        if penalized:
            result = result + section.penalty_every * self._penalties(
                real, fake, real_logits, fake_logits, classes, draw
            )
        if training and discriminator.augment is not None:
            discriminator.augment.steer(real_logits)
        return result

    def _penalties(
        self, real: Tensor, fake: Tensor, real_logits: Tensor, fake_logits: Tensor, classes: Tensor | None, draw: Draw
    ) -> Tensor:
        section, result = self._section, torch.zeros_like(real_logits)
        if section.r1:
            result = result + section.r1 * zero_centered_penalty(real_logits, real)
        if section.r2:
            result = result + section.r2 * zero_centered_penalty(fake_logits, fake)
        if section.gradient_penalty:
            between = torch.lerp(
                fake.detach().float(), real.detach(), draw.uniform("between", (1, 1, 1))
            ).requires_grad_()
            result = result + section.gradient_penalty * one_centered_penalty(
                self._unwrapped(between, classes, draw), between
            )
        return result


@final
class GeneratorStep(TrainStep):
    """Trains the generator against the discriminator, whose weights are constants."""

    name = "generator"

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        space: Space,
        section: Section,
        penalty: GeneratorPenalty | None,
    ) -> None:
        self.net, self._discriminator, self._space, self._section, self._penalty = (
            generator,
            discriminator,
            space,
            section,
            penalty,
        )
        self.every = section.discriminator_steps
        self.cycle = self.every * (penalty.every if penalty is not None else 1)
        self._objective = ADVERSARIAL_LOSSES[section.objective]

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The generator's loss against the current (or unrolled) discriminator, plus its penalty, [B] float32."""
        levels, classes = levels_and_classes(batch)
        section, discriminator, draw = self._section, self._discriminator, draw.apart("generator")
        fake = discriminator.augmented(self.net(latent_of(draw, section), classes, draw), draw.apart("made"))
        if self._objective.paired or section.unroll:
            real = discriminator.augmented(self._space.scaled(levels), draw.apart("true"))
        if section.unroll:
            unrolled = self._unrolled_weights(real, fake, classes, draw)
            real_logits, fake_logits = (
                functional_call(discriminator, unrolled, (images, classes, draw)) for images in (real, fake)
            )
        else:
            fake_logits = detached_forward(discriminator, fake, classes, draw)
            real_logits = (
                detached_forward(discriminator, real, classes, draw) if self._objective.paired else fake_logits
            )
        result = self._objective.generator(real_logits, fake_logits)
        penalty = self._penalty
        if penalty is not None and (int(draw.step) // self.every) % penalty.every == 0:
            result = result + penalty.every * penalty(draw.apart("penalty"), classes)
        return result

    def _unrolled_weights(self, real: Tensor, fake: Tensor, classes: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """The discriminator's weights after `unroll` gradient steps, differentiable by the fake images.

        Metz et al. 2017, arXiv:1611.02163, equation 9.
        """
        discriminator, rate = self._discriminator, self._section.unroll_lr
        # Buffers are cloned: only the discriminator's own step may change them.
        buffers = {name: tensor.clone() for name, tensor in discriminator.named_buffers()}
        weights = {name: parameter.detach().requires_grad_() for name, parameter in discriminator.named_parameters()}
        for _ in range(self._section.unroll):
            real_logits, fake_logits = (
                functional_call(discriminator, weights | buffers, (images, classes, draw)) for images in (real, fake)
            )
            loss = self._objective.discriminator(real_logits, fake_logits).mean()
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
            weights = {
                name: weight if gradient is None else weight - rate * gradient
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            }
        return weights | buffers


class Pyramid(Protocol):
    """A `net` section whose networks halve the resolution repeatedly."""

    @property
    def width(self) -> int: ...
    @property
    def halvings(self) -> int: ...


def widths_by_size(section: Pyramid) -> list[int]:
    """Channels at each resolution, from the smallest to the full one: doubled per halving, at most 8 × `width`."""
    return [section.width * min(8, 2 ** (section.halvings - size)) for size in range(section.halvings + 1)]


def latent_of(draw: Draw, section: Section) -> Tensor:
    """Sample latents [B, L] from a standard normal distribution."""
    return draw.normal("latent", (section.latent,))


class Adversarial(PixelModel):
    """A GAN; what a run saves is the generator."""

    net: Generator
    discriminator: Discriminator

    def __init__(self, space: Space, section: Section) -> None:
        super().__init__(space, section)
        self._section = section
        self.net, self.discriminator, penalty = self.pair(section)
        self._steps = (
            DiscriminatorStep(self.discriminator, self.net, space, section),
            GeneratorStep(self.net, self.discriminator, space, section, penalty),
        )

    @abstractmethod
    def pair(self, section: Section) -> tuple[Generator, Discriminator, GeneratorPenalty | None]:
        """Build generator and discriminator with random weights, and the generator's penalty if there is one."""

    def train_steps(self) -> tuple[TrainStep, ...]:
        return self._steps

    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        return self.space.quantized(self.net(latent_of(draw, self._section), classes, draw, request.truncation))
