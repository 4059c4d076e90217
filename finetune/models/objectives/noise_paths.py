"""Noise paths x = α x_0 + σ ε from images to noise: the training objective of each, and its noise levels for sampling.

VariancePreserving  α² + σ² = 1, in T steps (Ho et al. 2020, arXiv:2006.11239; Nichol & Dhariwal 2021, arXiv:2102.09672)
LinearPath          α = 1 − σ (Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003)
VarianceExploding   α = 1 (Karras et al. 2022, arXiv:2206.00364)
"""

from __future__ import annotations

import itertools
import math
import operator
from abc import ABC, abstractmethod
from typing import Literal, final

import torch
from torch import Tensor

from finetune.config.schema import Diffusion, Flow
from finetune.errors import UserError
from finetune.models.objectives.flow_matching import FlowMatching
from finetune.models.objectives.noise_prediction import Denoising, Noised, Objective, Prediction
from finetune.models.objectives.samplers import Level
from finetune.rng import Draw

FLOW_STEPS = 1000  # the timestep of σ = 1 on a linear path


class Path(ABC):
    """A noise path and how to read a network's prediction on it.

    Attributes:
        objective: the training objective.
        initial_std: standard deviation of the noise that sampling starts from.
    """

    objective: Objective
    initial_std: float = 1.0

    @abstractmethod
    def levels(self, steps: int) -> list[Level]:
        """The steps + 1 noise levels for sampling, from the noisiest to σ = 0.

        Raises:
            UserError: the path has fewer levels.
        """

    def scale_input(self, noisy: Tensor, level: Level) -> Tensor:
        """The network's input for x."""
        return noisy

    @abstractmethod
    def clean(self, predicted: Tensor, noisy: Tensor, level: Level) -> Tensor:
        """D(x), the expectation of x_0, from the network's prediction."""


def alphas_cumprod(steps: int, schedule: Literal["linear", "cosine"]) -> list[float]:
    """ᾱ_t = Π (1 − β) for t = 0 … T − 1.

    Linear: β from 10⁻⁴ to 0.02 for 1000 steps, scaled by 1000 / T for other T. Cosine: ᾱ is cos² (π/2 · (t/T + 0.008) /
    1.008) relative to its value at 0, with β ≤ 0.999 (arXiv:2102.09672, equation 17).
    """
    if schedule == "linear":
        kept = [1 - (1e-4 + (0.02 - 1e-4) * step / (steps - 1)) * 1000 / steps for step in range(steps)]
    else:
        bars = [math.cos(math.pi / 2 * (step / steps + 0.008) / 1.008) ** 2 for step in range(steps + 1)]
        kept = [max(1 - 0.999, after / before) for before, after in itertools.pairwise(bars)]
    return list(itertools.accumulate(kept, operator.mul))


@final
class VariancePreserving(Path):
    """A variance-preserving path in T steps; its time is the angle φ with α = cos φ and σ = sin φ, so v = dx/dφ."""

    def __init__(
        self, steps: int, schedule: Literal["linear", "cosine"], prediction: Prediction, loss: Diffusion | None = None
    ) -> None:
        if loss is not None and loss.zero_terminal_snr:
            raise UserError(
                "this family's schedules already end in noise (α below 0.007)",
                where="diffusion.zero_terminal_snr",
                remedy="remove diffusion.zero_terminal_snr",
            )
        self._alphas, self._prediction = alphas_cumprod(steps, schedule), prediction
        self.objective = Denoising(torch.tensor(self._alphas), prediction, loss or Diffusion())

    def __len__(self) -> int:
        return len(self._alphas)

    def level(self, step: int) -> Level:
        """The level of step 0 … T − 1; −1 is the clean image."""
        square = self._alphas[step] if step >= 0 else 1.0
        alpha, sigma = math.sqrt(square), math.sqrt(1 - square)
        return Level(alpha, sigma, math.atan2(sigma, alpha), -sigma, alpha, float(step))

    def levels(self, steps: int) -> list[Level]:
        """Evenly spaced levels that include the last one (`trailing` spacing): sampling starts from pure noise."""
        if steps > len(self):
            raise UserError(
                f"{steps} sampling steps exceed the {len(self)} steps of the noise schedule",
                where="sample.steps",
                remedy=f"set sample.steps to at most {len(self)}",
            )
        return [self.level(round(len(self) * (1 - number / steps)) - 1) for number in range(steps + 1)]

    def clean(self, predicted: Tensor, noisy: Tensor, level: Level) -> Tensor:
        return self.expected(predicted, noisy, level.alpha, level.sigma)

    def expected(self, predicted: Tensor, noisy: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """`clean` for α and σ that may differ by example."""
        if self._prediction == "epsilon":
            return (noisy - sigma * predicted) / alpha
        return predicted if self._prediction == "sample" else alpha * noisy - sigma * predicted


@final
class LinearPath(Path):
    """The straight path, whose time is σ and velocity dx/dσ = ε − x_0; `shift` applies to training and sampling."""

    def __init__(self, shift: float = 1.0, loss: Flow | None = None) -> None:
        self._shift = shift
        self.objective = FlowMatching(
            {"num_train_timesteps": FLOW_STEPS, "shift": shift}, loss or Flow(), "logit_normal", patch=1
        )

    def levels(self, steps: int) -> list[Level]:
        even = [1 - number / steps for number in range(steps + 1)]
        return [self.level(self._shift * one / (1 + (self._shift - 1) * one)) for one in even]

    def level(self, sigma: float) -> Level:
        return Level(1 - sigma, sigma, sigma, -1.0, 1.0, FLOW_STEPS * sigma)

    def clean(self, predicted: Tensor, noisy: Tensor, level: Level) -> Tensor:
        return noisy - level.sigma * predicted


@final
class EdmObjective(Objective):
    """EDM's preconditioning D(x) = c_skip x + c_out F(c_in x, c_noise) and loss λ |D − x_0|².

    arXiv:2206.00364, table 1.

    As λ c_out² = 1, this is the squared error of F against (x_0 − c_skip x) / c_out, which has variance 1 at every σ.

    Args:
        sigma_data: standard deviation of the data.
        mean: mean of ln σ in training.
        std: standard deviation of ln σ in training.
    """

    def __init__(self, sigma_data: float, mean: float, std: float) -> None:
        self._sigma_data, self._mean, self._std = sigma_data, mean, std

    def scales(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in and c_noise."""
        total = sigma.square() + self._sigma_data**2
        return self._sigma_data**2 / total, sigma * self._sigma_data * total.rsqrt(), total.rsqrt(), sigma.log() / 4

    def noise(self, clean: Tensor, draw: Draw) -> Noised:
        """Noise `clean` [B, C, H, W] with ln σ ~ N(mean, std²)."""
        sigma = (self._mean + self._std * draw.normal("timestep", ())).exp()
        skip, out, in_, timestep = (one.view(-1, *[1] * (clean.dim() - 1)) for one in self.scales(sigma))
        noisy = clean + sigma.view_as(skip) * draw.normal("noise", clean.shape[1:])
        return Noised(in_ * noisy, timestep.flatten(), (clean - skip * noisy) / out, torch.ones_like(sigma))


@final
class VarianceExploding(Path):
    """A variance-exploding path, whose time is σ.

    Sampling levels go from `sigma_max` to `sigma_min` in equal steps of σ^(1/ρ), then to 0 (equation 5).
    """

    def __init__(self, objective: EdmObjective, sigma_min: float, sigma_max: float, rho: float) -> None:
        self.objective: EdmObjective = objective
        self.initial_std, self._sigma_min, self._rho = sigma_max, sigma_min, rho

    def levels(self, steps: int) -> list[Level]:
        high, low = self.initial_std ** (1 / self._rho), self._sigma_min ** (1 / self._rho)
        return [
            self.level((high + number / max(1, steps - 1) * (low - high)) ** self._rho) for number in range(steps)
        ] + [self.level(0.0)]

    def level(self, sigma: float) -> Level:
        return Level(1.0, sigma, sigma, 0.0, 1.0, math.log(sigma) / 4 if sigma else -math.inf)

    def scale_input(self, noisy: Tensor, level: Level) -> Tensor:
        return noisy * self._scales(level)[2]

    def clean(self, predicted: Tensor, noisy: Tensor, level: Level) -> Tensor:
        skip, out, _, _ = self._scales(level)
        return skip * noisy + out * predicted

    def _scales(self, level: Level) -> list[float]:
        return [float(one) for one in self.objective.scales(torch.tensor(level.sigma, dtype=torch.float64))]
