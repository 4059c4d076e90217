"""Diffusion of Gaussian data, for which a perfect network has a closed form."""

from __future__ import annotations

import math

from torch import Tensor

from finetune.models.objectives.samplers import Level

MEAN, DEVIATION = 0.7, 0.25  # of the Gaussian data


def spread(level: Level) -> float:
    """The standard deviation of x, where x_0 is the Gaussian data."""
    return math.hypot(level.alpha * DEVIATION, level.sigma)


def oracle(noisy: Tensor, level: Level) -> Tensor:
    """E[x_0 | x]."""
    return MEAN + DEVIATION**2 * level.alpha / spread(level) ** 2 * (noisy - level.alpha * MEAN)


def flow_solution(noisy: Tensor, first: Level, last: Level) -> Tensor:
    """The solution of the probability-flow ODE from x: its distance to the mean in standard deviations is constant."""
    return last.alpha * MEAN + spread(last) / spread(first) * (noisy - first.alpha * MEAN)


def angle(time: float) -> Level:
    return Level(math.cos(time), math.sin(time), time, -math.sin(time), math.cos(time), 0)
