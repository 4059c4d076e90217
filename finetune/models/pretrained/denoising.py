"""The train step of pretrained denoisers: the network, its objective, and self-distillation of the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters import peft
from finetune.config.schema import Diffusion, Flow, Recipe
from finetune.data.batch import Batch
from finetune.memory.quantization import dtype_of
from finetune.models.base import TrainStep
from finetune.models.objectives.flow_matching import FlowMatching
from finetune.models.objectives.noise_prediction import Denoising, Noised
from finetune.models.pretrained.family import ClipFamily, Family
from finetune.rng import Draw

LatentObjective = Denoising | FlowMatching


class Denoiser(nn.Module):
    """The denoiser, and the text encoders if they train: one module, so that one wrapper (DDP) holds everything.

    Args:
        guidance: input of networks that embed the guidance scale, while training; None for others.
    """

    def __init__(
        self, family: Family, denoiser: nn.Module, encoders: Mapping[str, nn.Module], guidance: float | None
    ) -> None:
        super().__init__()
        self.family, self.denoiser, self.encoders = family, denoiser, nn.ModuleDict(dict(encoders))
        self.guidance = guidance

    def forward(self, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        if self.encoders and isinstance(self.family, ClipFamily):
            batch = batch | self.family.embed(dict(self.encoders.items()), batch)
        if self.guidance is not None:
            batch = batch | {"guidance": torch.full_like(timestep, self.guidance)}
        dtype = dtype_of(self.denoiser)
        return self.family.predict(self.denoiser, noisy.to(dtype), timestep, batch)

    @torch.no_grad()
    def without_adapters(self, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Prediction of the base, without its adapters."""
        with peft.switched_off(self):
            found: Tensor = self(noisy, timestep, batch)
        return found


class DenoiseStep(TrainStep):
    """The train step of denoising.

    Args:
        distill_every: n: every n-th step is a self-distillation step at the noisiest 1/n of the noise levels: the
            adapter is held to the base model's prediction. The other steps use the remaining levels. None: no such
            steps.
    """

    name = "denoiser"

    def __init__(self, net: Denoiser, objective: LatentObjective, distill_every: int | None = None) -> None:
        self.net: nn.Module = net  # until several processes wrap it
        self.objective, self._denoiser, self.cycle = objective, net, distill_every or 1

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Loss of each example, [B] float32: the objective's, or in a distillation step the change by the adapter."""
        mean, deviation = batch["mean"].float(), batch["deviation"].float() if "deviation" in batch else None
        latents = mean if deviation is None else mean + deviation * draw.normal("posterior", mean.shape[1:])
        if self.cycle == 1 or not self.net.training:  # validation covers all noise levels
            return self._error(self.objective.noise(latents, draw), batch, batch.get("mask"))
        boundary = 1 - 1 / self.cycle
        if int(draw.step) % self.cycle != self.cycle - 1:
            return self._error(self.objective.noise(latents, draw, (0.0, boundary)), batch, batch.get("mask"))
        noised = self.objective.noise(latents, draw, (boundary, 1.0))
        base = self._denoiser.without_adapters(noised.sample, noised.timestep, batch).float()
        return self._error(replace(noised, target=base, weight=torch.ones_like(noised.weight)), batch)

    def _error(self, noised: Noised, batch: Batch, mask: Tensor | None = None) -> Tensor:
        return self.objective.error(self.net(noised.sample, noised.timestep, batch), noised, mask)


def objective_of(family: Family, scheduler: Any, recipe: Recipe) -> LatentObjective:
    """The family's objective, with the schedule of the checkpoint's own scheduler."""
    if family.spec.objective == "flow":
        return FlowMatching(scheduler.config, recipe.flow or Flow(), family.spec.sampling, family.patch)
    return Denoising(scheduler.alphas_cumprod, scheduler.config.prediction_type, recipe.diffusion or Diffusion())
