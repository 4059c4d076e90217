"""Samplers: from noise to images along a decreasing sequence of noise levels with x = α x_0 + σ ε, for any noise path.

All of them evaluate D(x), the expectation of x_0 given x, and use ε̂ = (x − α D) / σ. The last level has σ = 0, where x
= D.

    ddpm   Ho et al. 2020 (arXiv:2006.11239), equations 6 and 7, for any step size: samples q(x' | x, x_0 = D)
    ddim   Song et al. 2020 (arXiv:2010.02502), equations 12 and 16: η = 0 is deterministic, η = 1 is DDPM (posterior
    variance) dpm++  Lu et al. 2022 (arXiv:2211.01095), algorithm 2 (2M): second-order multistep in λ = ln(α/σ)
    heun   Karras et al. 2022 (arXiv:2206.00364), algorithm 1 without churn: second order, two evaluations per step
    euler  first order, for the ODE dx/dt = α̇ D + σ̇ ε̂ in the path's own time t
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Level:
    """One noise level of a path.

    Attributes:
        alpha, sigma: x = alpha · x_0 + sigma · ε.
        time: the path's time, decreasing to 0; alpha_rate, sigma_rate: derivatives with respect to it.
        timestep: the level as the network's input.
    """

    alpha: float
    sigma: float
    time: float
    alpha_rate: float
    sigma_rate: float
    timestep: float


@dataclass(frozen=True)
class Options:
    """Options for stochastic samplers: DDIM's η in [0, 1], and the variance of DDPM's steps (see `Posterior`)."""

    eta: float = 0.0
    variance: Literal["large", "small"] = "small"


Denoise = Callable[[Tensor, Level], Tensor]  # x [B, …] → D(x) [B, …]
StepNoise = Callable[[int], Tensor]  # step number → standard normal [B, …], deterministic


@dataclass(frozen=True)
class Posterior:
    """q(x' | x, x_0) = N(noisy · x + clean · x_0, small) of a step to less noise; `large`: variance of q(x | x')."""

    noisy: float
    clean: float
    small: float
    large: float


def posterior(now: Level, then: Level) -> Posterior:
    """The posterior of a step, by Bayes' rule from q(x | x') = N(x' α/α', σ² − σ'² α²/α'²) (DDPM, equation 7)."""
    ratio = now.alpha / then.alpha
    added = now.sigma**2 - (ratio * then.sigma) ** 2
    share = added / now.sigma**2
    return Posterior(ratio * (then.sigma / now.sigma) ** 2, then.alpha * share, share * then.sigma**2, added)


def noise_of(noisy: Tensor, clean: Tensor, level: Level) -> Tensor:
    """The noise ε̂ with x = α D + σ ε̂."""
    return (noisy - level.alpha * clean) / level.sigma


def _steps(levels: Sequence[Level]) -> Iterator[tuple[int, tuple[Level, Level]]]:
    return enumerate(itertools.pairwise(levels))


def ddpm(denoise: Denoise, noisy: Tensor, levels: Sequence[Level], step_noise: StepNoise, options: Options) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, equations 6 and 7)."""
    for number, (now, then) in _steps(levels):
        step, clean = posterior(now, then), denoise(noisy, now)
        noisy = step.noisy * noisy + step.clean * clean
        if then.sigma:
            noisy = noisy + math.sqrt(getattr(step, options.variance)) * step_noise(number)
    return noisy


def ddim(denoise: Denoise, noisy: Tensor, levels: Sequence[Level], step_noise: StepNoise, options: Options) -> Tensor:
    """DDIM (Song et al. 2020, arXiv:2010.02502, equations 12 and 16)."""
    for number, (now, then) in _steps(levels):
        clean = denoise(noisy, now)
        added = options.eta**2 * posterior(now, then).small
        noisy = then.alpha * clean + math.sqrt(then.sigma**2 - added) * noise_of(noisy, clean, now)
        if added:
            noisy = noisy + math.sqrt(added) * step_noise(number)
    return noisy


def dpm_plus_plus(
    denoise: Denoise, noisy: Tensor, levels: Sequence[Level], step_noise: StepNoise, options: Options
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2); the first and the last step are first-order."""
    before: tuple[Tensor, float] | None = None  # D of the previous step, and the change of λ in it
    for _, (now, then) in _steps(levels):
        clean = denoise(noisy, now)
        if not then.sigma:  # λ goes to infinity: the limit of the first-order step
            return clean
        shrinks = then.sigma / now.sigma
        rises = math.log(then.alpha / now.alpha / shrinks) if now.alpha else math.inf
        guess = clean
        if before is not None and rises:
            earlier, rose = before
            guess = clean + (rises / (2 * rose)) * (clean - earlier)  # 1 / 2r, r = the ratio of the changes of λ
        noisy = shrinks * noisy + (then.alpha - shrinks * now.alpha) * guess
        before = clean, rises
    return noisy


def slope(noisy: Tensor, clean: Tensor, level: Level) -> Tensor:
    """dx/dt of the probability flow ODE."""
    return level.alpha_rate * clean + level.sigma_rate * noise_of(noisy, clean, level)


def euler(denoise: Denoise, noisy: Tensor, levels: Sequence[Level], step_noise: StepNoise, options: Options) -> Tensor:
    """Euler's method on the probability flow ODE."""
    for _, (now, then) in _steps(levels):
        clean = denoise(noisy, now)
        noisy = noisy + (then.time - now.time) * slope(noisy, clean, now) if then.sigma else clean
    return noisy


def heun(denoise: Denoise, noisy: Tensor, levels: Sequence[Level], step_noise: StepNoise, options: Options) -> Tensor:
    """Heun's method with a final Euler step (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""
    for _, (now, then) in _steps(levels):
        clean = denoise(noisy, now)
        if not then.sigma:
            return clean
        first, width = slope(noisy, clean, now), then.time - now.time
        ahead = noisy + width * first
        noisy = noisy + width / 2 * (first + slope(ahead, denoise(ahead, then), then))
    return noisy


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_plus_plus, "heun": heun, "euler": euler}
