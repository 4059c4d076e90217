"""The flow matching objective (Lipman et al. 2022, arXiv:2210.02747) for rectified flows.

Notation of Esser et al. 2024 (arXiv:2403.03206) with σ for their t: x_σ = (1−σ) x_0 + σ ε, and the network predicts the
velocity dx/dσ = ε − x_0. The distribution of σ is from §3.1, its shift towards noise for large images from §5.3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.config.schema import Flow
from finetune.models.objectives.noise_prediction import WHOLE, Noised, Objective, Part, among
from finetune.rng import Draw

Sampling = Literal["logit_normal", "mode", "uniform"]
MIN_SIGMA = 1e-3  # the lowest noise level of schedulers with 1000 steps; loss weights are clamped there


class FlowMatching(Objective):
    """Velocity prediction on the straight path.

    Args:
        schedule: the configuration of the pipeline's scheduler.
        loss: the recipe's section.
        sampling: the family's default distribution of noise levels.
        patch: latent pixels per token along one side.
    """

    def __init__(self, schedule: Mapping[str, Any], loss: Flow, sampling: Sampling, patch: int) -> None:
        self._schedule, self._loss, self._patch = schedule, loss, patch
        self._sampling = loss.sampling or sampling

    def noise(self, clean: Tensor, draw: Draw, part: Part = WHOLE) -> Noised:
        """Noise `clean` [B, C, H, W] at levels σ in (0, 1] within `part`; t = σ × training timesteps, float32."""
        sigma = self._shifted(self._levels(draw, part), tokens=clean.shape[2] * clean.shape[3] // self._patch**2)
        noise = draw.normal("noise", clean.shape[1:])
        share = sigma.view(-1, *[1] * (clean.dim() - 1))
        return Noised(
            (1 - share) * clean + share * noise,
            sigma * self._schedule["num_train_timesteps"],
            noise - clean,
            self._weight(sigma),
        )

    def _levels(self, draw: Draw, part: Part) -> Tensor:
        """Noise levels before the shift, [B] (arXiv:2403.03206, eq. 19 and 20)."""
        if self._sampling == "logit_normal":
            normal = draw.normal("timestep", ())
            if part != WHOLE:
                normal = torch.special.ndtri(among(torch.special.ndtr(normal), part))
            return torch.sigmoid(self._loss.mean + self._loss.std * normal)
        place = draw.uniform("timestep")
        if self._sampling == "uniform":
            return among(1 - place, part)  # in (0, 1]: σ = 0 has no noise
        uniform = 1 - among(place, part)  # u of equation 20, where 0 is pure noise
        result = 1 - uniform - self._loss.mode_scale * (torch.cos(math.pi / 2 * uniform).square() - 1 + uniform)
        return result.clamp(MIN_SIGMA, 1)

    def _shifted(self, level: Tensor, tokens: int) -> Tensor:
        """σ' = α σ / (1 + (α − 1) σ) (equation 23), with α from the recipe or the scheduler."""
        factor = self._loss.shift or shift(self._schedule, tokens)
        return factor * level / (1 + (factor - 1) * level)

    def _weight(self, sigma: Tensor) -> Tensor:
        """Loss weights as in diffusers' trainers: 1, σ⁻² (`sigma_sqrt`) or 2 / (π (1 − 2σ + 2σ²)) (`cosmap`)."""
        if self._loss.weighting == "sigma_sqrt":
            return sigma.clamp(min=MIN_SIGMA) ** -2
        if self._loss.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
        return torch.ones_like(sigma)


def shift(schedule: Mapping[str, Any], tokens: int) -> float:
    """The shift α of a scheduler's configuration for an image with `tokens` tokens.

    With dynamic shifting (diffusers' `calculate_shift` and `time_shift`), μ grows linearly with the number of tokens,
    and α is exp(μ), or μ for linear time shifts. `shift_terminal` only affects sampling.
    """
    if schedule.get("use_flow_sigmas"):  # DPM-Solver++ on a flow
        return float(schedule["flow_shift"])
    if not schedule.get("use_dynamic_shifting"):
        return float(schedule["shift"])
    fewest, most = schedule["base_image_seq_len"], schedule["max_image_seq_len"]
    least, largest = schedule["base_shift"], schedule["max_shift"]
    mu = least + (largest - least) * (tokens - fewest) / (most - fewest)
    return math.exp(mu) if schedule["time_shift_type"] == "exponential" else float(mu)
