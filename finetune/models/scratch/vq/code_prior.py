"""The second stage of vector-quantized models: a prior over the codes of a trained autoencoder.

`model.vae` names the run of the first stage, which is frozen and saved with the prior. −log p(codes) − log p(x|codes)
is an upper bound on −log p(x), since it counts only the codes that the encoder chooses.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, final

import torch
from torch import Tensor, nn

from finetune.config import nets
from finetune.config.nets.vqvae import Net as FirstNet
from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch
from finetune.errors import UserError
from finetune.models.base import Model, SampleRequest, TrainStep
from finetune.models.scratch.base import (
    LikelihoodModel,
    PixelModel,
    Space,
    initialize,
    levels_and_classes,
    open_model,
    space_of,
)
from finetune.models.scratch.vq.vqvae import VqVae
from finetune.planning import Plan
from finetune.rng import Draw


class Prior(nn.Module):
    """A distribution p(codes | class)."""

    @abstractmethod
    def log_prob(self, codes: Tensor, classes: Tensor | None) -> Tensor:
        """Log-probabilities of codes [B, h, w] int64 in nats, [B]."""

    @abstractmethod
    def generate(self, uniform: Tensor, classes: Tensor | None) -> Tensor:
        """Sample codes [B, h, w] from uniform values [B, h, w], with caches."""

    @abstractmethod
    def generate_uncached(self, uniform: Tensor, classes: Tensor | None) -> Tensor:
        """Sample the same codes with a full pass for each."""

    def forward(self, codes: Tensor, classes: Tensor | None) -> Tensor:
        return self.log_prob(codes, classes)


@final
class Stages(nn.Module):
    """Both stages in one module, so that one file holds both; the first is frozen and stays in evaluation mode."""

    def __init__(self, first: nn.Module, prior: Prior) -> None:
        super().__init__()
        self.first, self.prior = first.requires_grad_(False).eval(), prior

    def train(self, mode: bool = True) -> Stages:
        super().train(mode)
        self.first.eval()
        return self

    def forward(self, levels: Tensor, classes: Tensor | None) -> Tensor:
        """The log-probability of the images' codes, [B]."""
        with torch.no_grad():
            codes = self.first.codes(levels)  # type: ignore[operator]
        result: Tensor = self.prior(codes, classes)
        return result


@final
class CodesStep(TrainStep):
    """Trains the prior: −log p of each image's codes, in nats."""

    name = "codes"

    def __init__(self, net: Stages) -> None:
        self.net = net

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        result: Tensor = -self.net(*levels_and_classes(batch))
        return result


class SecondStage(LikelihoodModel):
    """A prior over codes together with the frozen first stage, with a bound on the likelihood."""

    exact = False

    def __init__(self, space: Space, section: nets.Section, first: VqVae) -> None:
        super().__init__(space, section)
        self.first = first
        self.net: Stages = Stages(first.net, self.prior(space, section, first))
        self._step = CodesStep(self.net)

    @abstractmethod
    def prior(self, space: Space, section: Any, first: VqVae) -> Prior:
        """Build the prior with random weights."""

    def train_steps(self) -> tuple[TrainStep, ...]:
        return (self._step,)

    @torch.no_grad()
    def nats(self, batch: Batch, draw: Draw, particles: int = 1) -> Tensor:
        return self._step.loss(batch, draw) + self.first.reconstruction_nats(batch["pixels"])

    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        return self.first.decoded(self.net.prior.generate(draw.uniform("codes", self.first.net.grid), classes))

    def generate_uncached(self, classes: Tensor | None, draw: Draw) -> Tensor:
        return self.first.decoded(self.net.prior.generate_uncached(draw.uniform("codes", self.first.net.grid), classes))

    def parts(self) -> dict[str, Any]:
        section: Any = self.first.section
        return {"first": {"space": dataclasses.asdict(self.first.space), "net": dataclasses.asdict(section)}}


def built(plan: Plan, audit: Audit, make: type[SecondStage]) -> Model:
    """Build a second stage on the first stage that `model.vae` names.

    Raises:
        UserError: there is no first stage, it is not a vector-quantized autoencoder, or it has another kind of images.
    """
    space, given = space_of(plan, audit), plan.recipe.model.vae
    assert given is not None  # a rule of `config.rules.networks`
    first = open_model(given)
    if not isinstance(first, VqVae):
        raise UserError(
            f"{given} is not a vector-quantized autoencoder",
            where="model.vae",
            remedy="set model.vae to a run of scratch/vqvae or scratch/vqgan",
        )
    if dataclasses.replace(first.space, classes=()) != dataclasses.replace(space, classes=()):
        wanted, there = (
            f"{one.channels} × {one.height} × {one.width} with {one.levels} levels" for one in (space, first.space)
        )
        raise UserError(
            f"{given} was trained on images of {there}, not {wanted}",
            where="model.vae",
            remedy="use the same data section in both stages",
        )
    return initialize(plan, audit, lambda: make(space, plan.recipe.net, first))


def restored(space: Space, section: nets.Section, config: dict[str, Any], make: type[SecondStage]) -> PixelModel:
    """Build the model of a saved configuration."""
    result = config["first"]
    net = nets.from_config(FirstNet, result["net"], "config.json")
    first = VqVae(Space(**result["space"] | {"classes": tuple(result["space"]["classes"])}), net)
    return make(space, section, first)
