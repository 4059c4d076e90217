"""Log-likelihood of continuous images under the probability flow ODE, by the instantaneous change of variables.

Chen et al. 2018, arXiv:1806.07366, theorem 1. The ODE dx/dt = f(x, t) maps images to noise, with d log p/dt = −tr ∂f/∂x
(Song et al. 2021, arXiv:2011.13456, equation 39). The trace is estimated by vᵀ (∂f/∂x) v with v = ±1 (Hutchinson;
equation 40), and the ODE is integrated with Heun's method. For any noise path, the variable is y = x / √(α² + σ²) and
the time is the angle with tangent σ/α, for which f has the magnitude of y throughout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from finetune.models.objectives.samplers import Level, slope

STEPS = 40  # of Heun's method, with two evaluations and gradients each
MIN_ANGLE = 1e-3  # the angle at which images are considered clean


def angles(largest: float) -> list[float]:
    """STEPS + 1 angles from `MIN_ANGLE` to `largest`, evenly spaced in their square roots (denser at low noise)."""
    low, high = math.sqrt(MIN_ANGLE), math.sqrt(largest)
    return [(low + number / STEPS * (high - low)) ** 2 for number in range(STEPS + 1)]


def log_density(
    expected: Callable[[Tensor, float], Tensor], clean: Tensor, angles: Sequence[float], probe: Tensor
) -> Tensor:
    """log p of images, [B] float64, where y at the last angle is N(0, I).

    Args:
        expected: (y, angle) → D(x), differentiable.
        clean: the images [B, …], which are y at the first angle.
        angles: increasing.
        probe: v of the trace estimator, shaped like `clean`, with values 1 and −1.
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
