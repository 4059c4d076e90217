"""The base class of denoising objectives, and the objective for discrete noise schedules (ε, x_0 or v prediction).

Notation of Ho et al. 2020 (arXiv:2006.11239): x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε, t = 0 … T−1. The signal-to-noise ratio is
SNR(t) = ᾱ_t / (1−ᾱ_t). v_t = √ᾱ_t ε − √(1−ᾱ_t) x_0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetune.config.schema import Diffusion
from finetune.rng import Draw

Prediction = Literal["epsilon", "sample", "v_prediction"]
Part = tuple[float, float]
WHOLE: Part = (0.0, 1.0)  # quantiles of the distribution of noise levels, from low to high noise


def among(place: Tensor, part: Part) -> Tensor:
    """Map quantiles in [0, 1] of all noise levels into `part`."""
    low, high = part
    return place if part == WHOLE else low + (high - low) * place


@dataclass(frozen=True)
class Noised:
    """Noised examples: x_t [B, …], t [B] (float32 or int64), the target [B, …], the loss weight of each example [B]."""

    sample: Tensor
    timestep: Tensor
    target: Tensor
    weight: Tensor


class Objective(ABC):
    """How examples are noised, what the network should predict, and the loss of a prediction."""

    @abstractmethod
    def noise(self, clean: Tensor, draw: Draw) -> Noised:
        """Noise `clean` [B, C, H, W], each example at its own noise level."""

    def element(self, difference: Tensor) -> Tensor:
        """The loss of each element of predicted − target."""
        return difference.square()

    def error(self, predicted: Tensor, noised: Noised, mask: Tensor | None = None) -> Tensor:
        """The weighted loss of each example, [B] float32: the mean over its elements.

        `mask` [B, 1, h, w] weights each position; the mean still runs over all of them, so small masked areas count
        less.
        """
        element = self.element(predicted.float() - noised.target)
        return (element if mask is None else element * mask).flatten(1).mean(1) * noised.weight


class Denoising(Objective):
    """Denoising with a discrete noise schedule.

    Args:
        alphas_cumprod: ᾱ_t of the pipeline's scheduler, [T] float32 (the last is 0 with zero terminal SNR).
        prediction: what the network predicts.
        loss: the recipe's section.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: Prediction, loss: Diffusion) -> None:
        self.alphas_cumprod, self.prediction, self._loss = alphas_cumprod.float(), prediction, loss

    def noise(self, clean: Tensor, draw: Draw, part: Part = WHOLE) -> Noised:
        """Noise `clean` [B, C, H, W] at timesteps within `part`, uniform before the recipe's shift."""
        timestep = self._shifted(draw.integers("timestep", len(self.alphas_cumprod)), part)
        noise = draw.normal("noise", clean.shape[1:])
        if self._loss.noise_offset:
            # One value per channel shifts the whole image, so that its mean brightness is noised too
            # (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
            noise = noise + self._loss.noise_offset * draw.normal("noise offset", (clean.shape[1], 1, 1))
        alpha = self.alphas_cumprod.to(clean.device)[timestep].view(-1, *[1] * (clean.dim() - 1))
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        target = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - sigma * clean}[self.prediction]
        return Noised(signal * clean + sigma * noise, timestep, target, self.weight(timestep))

    def _shifted(self, timestep: Tensor, part: Part) -> Tensor:
        """Map timesteps into `part` and shift them.

        The center u of each timestep's interval in [0, 1] becomes s u / (1 + (s − 1) u), as in flow matching
        (arXiv:2403.03206, equation 23).
        """
        count, factor = len(self.alphas_cumprod), self._loss.shift
        if factor == 1 and part == WHOLE:
            return timestep
        share = among((timestep + 0.5) / count, part)
        return (count * factor * share / (1 + (factor - 1) * share)).long()

    def weight(self, timestep: Tensor) -> Tensor:
        """min-SNR-γ weights (Hang et al. 2023, arXiv:2303.09556, §3.4): min(SNR, γ) on the x_0 loss.

        The loss in ε is SNR times the loss in x_0, the loss in v is SNR + 1 times, so the weight is divided by these.
        """
        gamma = self._loss.min_snr_gamma
        if gamma is None:
            return torch.ones(len(timestep), device=timestep.device)
        alpha = self.alphas_cumprod.to(timestep.device)[timestep]
        if self.prediction == "sample":
            return (alpha / (1 - alpha)).clamp(max=gamma)
        if self.prediction == "v_prediction":
            # min(SNR, γ) / (SNR + 1) with SNR + 1 = 1 / (1 − ᾱ): finite where ᾱ is 0 or 1.
            return torch.minimum(alpha, gamma * (1 - alpha))
        return torch.minimum(torch.ones_like(alpha), gamma * (1 - alpha) / alpha)

    def element(self, difference: Tensor) -> Tensor:
        """Squared or pseudo-Huber error.

        Pseudo-Huber: 2δ(√(e² + δ²) − δ), which is e² for small e and 2δ|e| for large (arXiv:2403.16728, eq. 6, scaled).
        """
        if self._loss.huber is None:
            return difference.square()
        delta = self._loss.huber
        return 2 * delta * ((difference.square() + delta**2).sqrt() - delta)
