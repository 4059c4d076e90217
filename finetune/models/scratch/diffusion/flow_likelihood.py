"""Likelihoods of the diffusion models whose deterministic flow can be followed from images to noise."""

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
    """A model of pixels whose levels are filled with even noise u: log P(x) ≥ E[log p(x + u)] + D log (a level's width).

    The bound is as good as the flow is followed: by STEPS steps, an estimate of the trace that is right on average, and from LEAST on.
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
        """−log p of each image's levels [B], by dequantisation and the change of variables along the flow; a mean over `particles` draws."""
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
