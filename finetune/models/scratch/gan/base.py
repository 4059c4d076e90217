"""Two nets against each other (Goodfellow et al. 2014, arXiv:1406.2661): what all GANs share, whatever nets they are made of.

A step has two turns. The critic's comes first: true and made images, the generator as it is. Then the generator's, the critic's
weights constants. A family gives a `Generator` and a `Critic`; the recipe's section says what the two want (`objectives`), what holds
the critic back (penalties, augmentation, company) and how far the generator looks ahead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from finetune.config.nets.gan import Adversarial as Section
from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch
from finetune.errors import UserError
from finetune.models.base import Model, SampleRequest, TrainStep, detached_forward
from finetune.models.objectives.gan_losses import OBJECTIVES, flatness, unit_slope
from finetune.models.scratch.base import PixelModel, Space, class_embedding, levels_in, started
from finetune.models.scratch.gan.ada import Augmentation
from finetune.models.scratch.gan.minibatch_stats import Discrimination, stddev
from finetune.planning import Plan
from finetune.rng import Draw


class Generator(nn.Module, ABC):
    """What draws."""

    @abstractmethod
    def forward(self, latent: Tensor, classes: Tensor | None, draw: Draw, truncation: float = 1.0) -> Tensor:
        """Latents [B, L] and classes [B] → scaled images [B, C, H, W]. `draw` gives what else is at random.

        `truncation`: how far from the mean image one is, 1 as trained; less is more alike and better made.
        """


class Reader(nn.Module, ABC):
    """What a critic sees with."""

    @abstractmethod
    def forward(self, images: Tensor, draw: Draw) -> Tensor:
        """Scaled images [B, C, H, W] → maps [B, channels, h, w]; `draw` says which step it is."""


class Penalty(ABC):
    """What a generator is held to besides its critic."""

    every: int  # it is taken each so many steps, and then counts as often

    @abstractmethod
    def __call__(self, draw: Draw, classes: Tensor | None) -> Tensor:
        """Of each example, [B]."""


@final
class Critic(nn.Module):
    """Scaled images [B, C, H, W] and classes [B] → logits [B]; the classes' part is their projection (Miyato & Koyama 2018, arXiv:1802.05637).

    Args:
        reader: images → maps of so many `channels`.
        ending: channels of the maps, one more if they are told of their company → (what makes features [B, F] of the maps, F).
        linear: makes the last layer, of so many inputs and outputs.
    """

    def __init__(
        self,
        space: Space,
        section: Section,
        reader: Reader,
        channels: int,
        ending: Callable[[int], tuple[nn.Module, int]],
        linear: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self._group = section.stddev_group if section.minibatch == "stddev" else 0
        self.augment = Augmentation(section.ada_target, section.ada_images) if section.ada_target else None
        self.reader = reader
        self.ending, features = ending(channels + bool(self._group))
        self.beside = Discrimination(features) if section.minibatch == "discrimination" else None
        self.classes = class_embedding(space, features)
        self.logit = linear(features + (self.beside.kernels if self.beside is not None else 0), 1)

    def seen(self, images: Tensor, draw: Draw) -> Tensor:
        """Images as the critic is shown them."""
        return self.augment(images, draw) if self.augment is not None else images

    def forward(self, images: Tensor, classes: Tensor | None, draw: Draw) -> Tensor:
        maps = self.reader(images, draw)
        features = self.ending(stddev(maps, self._group) if self._group else maps)
        found: Tensor = self.logit(self.beside(features) if self.beside is not None else features).squeeze(1)
        if self.classes is not None:
            found = found + (self.classes(classes) * features).sum(1)
        return found.float()


@final
class CriticTurn(TrainStep):
    """The critic learns to tell true images from made ones; the generator's weights are constants."""

    name = "critic"

    def __init__(self, critic: Critic, generator: Generator, space: Space, section: Section) -> None:
        self.net, self._plain, self._generator, self._space, self._section = critic, critic, generator, space, section
        self.cycle = section.penalty_every
        self._objective = OBJECTIVES[section.objective]

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The critic's loss on true and made images, and in one of `lazy` steps its penalties, as often heavier, [B] float32."""
        levels, classes = levels_in(batch)
        section, critic, draw = self._section, self._plain, draw.apart("critic")
        with torch.no_grad():
            made = critic.seen(self._generator(latent_of(draw, section), classes, draw), draw.apart("made"))
            true = critic.seen(self._space.scaled(levels), draw.apart("true"))
        learns = torch.is_grad_enabled()
        penalised = learns and int(draw.step) % section.penalty_every == 0
        made.requires_grad_(penalised and section.r2 > 0)
        true.requires_grad_(penalised and section.r1 > 0)
        # Through the wrapper of several processes but once: what follows it adds to the same gradients.
        of_true, of_made = self.net(true, classes, draw), critic(made, classes, draw)
        found = self._objective.critic(of_true, of_made)
        if penalised:
            found = found + section.penalty_every * self._penalties(true, made, of_true, of_made, classes, draw)
        if learns and critic.augment is not None:
            critic.augment.steer(of_true)
        return found

    def _penalties(
        self, true: Tensor, made: Tensor, of_true: Tensor, of_made: Tensor, classes: Tensor | None, draw: Draw
    ) -> Tensor:
        section, found = self._section, torch.zeros_like(of_true)
        if section.r1:
            found = found + section.r1 * flatness(of_true, true)
        if section.r2:
            found = found + section.r2 * flatness(of_made, made)
        if section.gradient_penalty:
            between = torch.lerp(
                made.detach().float(), true.detach(), draw.uniform("between", (1, 1, 1))
            ).requires_grad_()
            found = found + section.gradient_penalty * unit_slope(self._plain(between, classes, draw), between)
        return found


@final
class GeneratorTurn(TrainStep):
    """The generator learns what the critic takes for true; the critic's weights are constants."""

    name = "generator"

    def __init__(
        self, generator: Generator, critic: Critic, space: Space, section: Section, penalty: Penalty | None
    ) -> None:
        self.net, self._critic, self._space, self._section, self._penalty = generator, critic, space, section, penalty
        self.every = section.discriminator_steps
        self.cycle = self.every * (penalty.every if penalty is not None else 1)
        self._objective = OBJECTIVES[section.objective]

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The generator's loss by a critic that stands still (or, unrolled, has gone on), and at times its penalty, [B] float32."""
        levels, classes = levels_in(batch)
        section, critic, draw = self._section, self._critic, draw.apart("generator")
        made = critic.seen(self.net(latent_of(draw, section), classes, draw), draw.apart("made"))
        if self._objective.paired or section.unroll:
            true = critic.seen(self._space.scaled(levels), draw.apart("true"))
        if section.unroll:
            ahead = self._ahead(true, made, classes, draw)
            of_true, of_made = (functional_call(critic, ahead, (images, classes, draw)) for images in (true, made))
        else:
            of_made = detached_forward(critic, made, classes, draw)
            of_true = detached_forward(critic, true, classes, draw) if self._objective.paired else of_made
        found = self._objective.generator(of_true, of_made)
        penalty = self._penalty
        if penalty is not None and (int(draw.step) // self.every) % penalty.every == 0:
            found = found + penalty.every * penalty(draw.apart("penalty"), classes)
        return found

    def _ahead(self, true: Tensor, made: Tensor, classes: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """The critic's weights after `unroll` steps of descent on these images, as a function of the made ones (Metz et al. 2017, equation 9)."""
        critic, rate = self._critic, self._section.unroll_lr
        buffers = {
            name: tensor.clone() for name, tensor in critic.named_buffers()
        }  # they move in the critic's own turn alone
        weights = {name: parameter.detach().requires_grad_() for name, parameter in critic.named_parameters()}
        for _ in range(self._section.unroll):
            of_true, of_made = (
                functional_call(critic, weights | buffers, (images, classes, draw)) for images in (true, made)
            )
            loss = self._objective.critic(of_true, of_made).mean()
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
            weights = {
                name: weight if gradient is None else weight - rate * gradient
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            }
        return weights | buffers


class Pyramid(Protocol):
    """A section whose nets halve the sides again and again."""

    @property
    def width(self) -> int: ...
    @property
    def halvings(self) -> int: ...


def widths_by_size(section: Pyramid) -> list[int]:
    """Channels by size, from the smallest to full: twice as many after each halving, eight times at most."""
    return [section.width * min(8, 2 ** (section.halvings - size)) for size in range(section.halvings + 1)]


def latent_of(draw: Draw, section: Section) -> Tensor:
    """[B, L], standard normal."""
    return draw.normal("latent", (section.latent,))


class Adversarial(PixelModel):
    """A GAN. Its artifact is the generator."""

    net: Generator
    critic: Critic

    def __init__(self, space: Space, section: Section) -> None:
        super().__init__(space, section)
        self._section = section
        self.net, self.critic, penalty = self.pair(section)
        self._turns = (
            CriticTurn(self.critic, self.net, space, section),
            GeneratorTurn(self.net, self.critic, space, section, penalty),
        )

    @abstractmethod
    def pair(self, section: Section) -> tuple[Generator, Critic, Penalty | None]:
        """Both nets, their weights at random, and what the generator is held to besides."""

    def train_steps(self) -> tuple[TrainStep, ...]:
        return self._turns

    def draw(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        return self.space.quantised(self.net(latent_of(draw, self._section), classes, draw, request.truncation))


def build(plan: Plan, audit: Audit) -> Model:
    """What a GAN's module calls `build`.

    Raises:
        UserError: the batch does not suit the section.
    """
    section, batch = plan.recipe.net, plan.recipe.train.batch_size
    if section.minibatch == "stddev" and batch % section.stddev_group:
        divisible = max(1, round(batch / section.stddev_group)) * section.stddev_group
        raise UserError(
            f"a batch of {batch} images makes no whole groups of {section.stddev_group}",
            where="net.stddev_group, train.batch_size",
            remedy=f"set train.batch_size: {divisible}, or net.stddev_group to a divisor of {batch}",
        )
    if section.minibatch == "discrimination" and batch < 2:
        raise UserError(
            "one image a batch has no company",
            where="net.minibatch",
            remedy="set train.batch_size: 2 or more, or net.minibatch: none",
        )
    return started(plan, audit)
