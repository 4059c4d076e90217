"""Diffusion of Gaussian data, where what a perfect net says is closed form."""

from __future__ import annotations

import math

from torch import Tensor

from finetune.models.objectives.samplers import Level

MEAN, DEVIATION = 0.7, 0.25  # of the Gaussian data


def spread(level: Level) -> float:
    """Of x, where x_0 is the Gaussian data."""
    return math.hypot(level.alpha * DEVIATION, level.sigma)


def oracle(noisy: Tensor, level: Level) -> Tensor:
    """E[x_0 | x]."""
    return MEAN + DEVIATION**2 * level.alpha / spread(level) ** 2 * (noisy - level.alpha * MEAN)


def carried(noisy: Tensor, first: Level, last: Level) -> Tensor:
    """Where the flow's differential equation takes x: how many deviations it lies from the mean stays."""
    return last.alpha * MEAN + spread(last) / spread(first) * (noisy - first.alpha * MEAN)


def angle(time: float) -> Level:
    return Level(math.cos(time), math.sin(time), time, -math.sin(time), math.cos(time), 0)
