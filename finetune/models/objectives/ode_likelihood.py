"""−log p of continuous images along a path's flow, by the change of variables (Chen et al. 2018, arXiv:1806.07366, theorem 1).

The flow dx/dt = f(x, t) carries images to noise, and d log p/dt = −tr ∂f/∂x on the way (Song et al. 2021, arXiv:2011.13456,
equation 39). The trace is estimated by vᵀ (∂f/∂x) v with v of ±1 (Hutchinson; equation 40), the flow by Heun's steps. Whatever the
path, y = x / √(α² + σ²) is followed, by the angle whose tangent is σ/α: there f is of the size of y all the way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from finetune.models.objectives.samplers import Level, slope

STEPS = 40  # of the flow, two looks and their gradients each
MIN_ANGLE = 1e-3  # the angle at which images are taken to be clean


def angles(largest: float) -> list[float]:
    """STEPS + 1 of them from LEAST to `most`, closer where there is less noise: evenly spaced in their roots."""
    low, high = math.sqrt(MIN_ANGLE), math.sqrt(largest)
    return [(low + number / STEPS * (high - low)) ** 2 for number in range(STEPS + 1)]


def log_density(
    expected: Callable[[Tensor, float], Tensor], clean: Tensor, angles: Sequence[float], probe: Tensor
) -> Tensor:
    """log p of `clean` [B, …], taken to be y at the first angle, where y at the last is N(0, I): [B] float64.

    Args:
        expected: (y, angle) → D, differentiable.
        angles: rising.
        probe: v, as `clean`, each number 1 or −1.
    """
    values, total = clean, torch.zeros(len(clean), dtype=torch.float64, device=clean.device)

    def velocity_and_trace(values: Tensor, angle: float) -> tuple[Tensor, Tensor]:
        """f and vᵀ (∂f/∂y) v."""
        level = Level(math.cos(angle), math.sin(angle), angle, -math.sin(angle), math.cos(angle), math.nan)
        with torch.enable_grad():
            values = values.detach().requires_grad_()
            result = slope(values, expected(values, angle), level)
            (gradient,) = torch.autograd.grad((result * probe).sum(), values)
        return result.detach(), (gradient * probe).flatten(1).sum(1).double()

    for now, then in itertools.pairwise(angles):
        width = then - now
        first, grows = velocity_and_trace(values, now)
        second, later = velocity_and_trace(values + width * first, then)
        values, total = values + width / 2 * (first + second), total + width / 2 * (grows + later)
    return total - 0.5 * (values.double().square() + math.log(2 * math.pi)).flatten(1).sum(1)
