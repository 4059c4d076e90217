"""Likelihoods of diffusion models by integrating the probability flow ODE from images to noise."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from finetune.data.batch import Batch
from finetune.models.objectives.ode_likelihood import angles, log_density
from finetune.models.objectives.samplers import Level
from finetune.models.scratch.base import LikelihoodModel, levels_and_classes
from finetune.models.scratch.diffusion.base import DiffusionModel
from finetune.rng import Draw


class FlowLikelihood(DiffusionModel, LikelihoodModel):
    """A diffusion model whose likelihood is bounded by uniform dequantization.

    log P(x) ≥ E[log p(x + u)] + D log (width of a level).

    The bound is subject to the errors of the ODE's discretization, of the unbiased trace estimate, and of starting at
    `MIN_ANGLE`.
    """

    exact = False

    @abstractmethod
    def at_angle(self, angle: float) -> Level:
        """The path's level with σ/α = tan(angle)."""

    @abstractmethod
    def max_angle(self) -> float:
        """The angle of the path's noisiest level."""

    @torch.no_grad()
    def nats(self, batch: Batch, draw: Draw, particles: int = 1) -> Tensor:
        """A bound on −log p of each image, [B]: the mean over `particles` samples of noise and trace probe."""
        levels, classes = levels_and_classes(batch)
        width, along = 2 / (self.space.levels - 1), angles(self.max_angle())

        def expected(values: Tensor, angle: float) -> Tensor:
            level = self.at_angle(angle)
            return self.predict_clean(values * math.hypot(level.alpha, level.sigma), level, classes)

        total = torch.zeros(len(levels), dtype=torch.float64, device=levels.device)
        for number in range(particles):
            filled = self.canvas.encode(levels) + width * (
                draw.uniform(f"dequantisation {number}", self.space.shape) - 0.5
            )
            probe = 1 - 2 * draw.uniform(f"trace {number}", self.space.shape).round()
            total -= log_density(expected, filled, along, probe)
        return (total / particles - self.space.dimensions * math.log(width)).float()
