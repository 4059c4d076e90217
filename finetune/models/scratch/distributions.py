"""Distributions over the levels of a pixel, parametrized by a network's outputs.

Both give probabilities of discrete levels, not densities, so −log₂ p / dimensions is bits/dim and comparable between
families.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from finetune.models.scratch.base import Space

MINIMUM_LOG_SCALE = -7.0


class PixelDistribution(ABC):
    """p(levels of a pixel | parameters).

    Attributes:
        parameters: number of network outputs per pixel.
        draws: number of uniform random values that `sample` needs per pixel.
    """

    _space: Space
    parameters: int
    draws: int

    @abstractmethod
    def log_prob(self, parameters: Tensor, levels: Tensor) -> Tensor:
        """Log-probabilities in nats: parameters [B, parameters, H, W], levels [B, C, H, W] → [B, H, W]."""

    @abstractmethod
    def sample(self, parameters: Tensor, uniform: Tensor) -> Tensor:
        """Sample levels [B, C, H, W] uint8, given parameters [B, parameters, H, W] and uniform [B, draws, H, W]."""

    @abstractmethod
    def expected(self, parameters: Tensor) -> Tensor:
        """E[x], scaled to [-1, 1], [B, C, H, W] float32, differentiable."""

    def mean(self, parameters: Tensor) -> Tensor:
        """E[x] rounded to levels, uint8."""
        return self._space.quantized(self.expected(parameters))


@final
class Categorical(PixelDistribution):
    """A categorical distribution over levels; channels are independent given the parameters."""

    def __init__(self, space: Space) -> None:
        self._space, self._channels, self._levels = space, space.channels, space.levels
        self.parameters, self.draws = space.channels * space.levels, space.channels

    def _logits(self, parameters: Tensor) -> Tensor:
        """Logits [B, C, H, W, levels]."""
        result: Tensor = parameters.unflatten(1, (self._channels, self._levels)).permute(0, 1, 3, 4, 2).float()
        return result

    def log_prob(self, parameters: Tensor, levels: Tensor) -> Tensor:
        chosen = self._logits(parameters).log_softmax(-1).gather(-1, levels.long()[..., None])
        return chosen.squeeze(-1).sum(1)

    def sample(self, parameters: Tensor, uniform: Tensor) -> Tensor:
        """Sample by inverting the cumulative distribution."""
        cumulative = self._logits(parameters).softmax(-1).cumsum(-1)
        return (uniform[..., None] > cumulative[..., :-1]).sum(-1).to(torch.uint8)

    def expected(self, parameters: Tensor) -> Tensor:
        probabilities = self._logits(parameters).softmax(-1)
        return torch.matmul(probabilities, self._space.scaled(torch.arange(self._levels, device=parameters.device)))


@final
class Logistics(PixelDistribution):
    """A discretized mixture of logistic distributions (Salimans et al. 2017, arXiv:1701.05517, §2.1–2.2).

    A level's probability is the mass between its edges, half a step to either side; the lowest and the highest level
    include the tails. A channel's mean depends linearly on the previous channels of the pixel. Each component has a
    logit, C means, C log-scales and C(C − 1)/2 coefficients. In units of [-1, 1] a step is 2 / (levels − 1).
    """

    def __init__(self, space: Space, mixtures: int) -> None:
        self._space, self._mixtures, self._channels = space, mixtures, space.channels
        self._coefficients = space.channels * (space.channels - 1) // 2
        self.parameters = mixtures * (1 + 2 * space.channels + self._coefficients)
        self.draws = 1 + space.channels

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits [B, K, H, W], means and log-scales [B, C, K, H, W], coefficients [B, C(C−1)/2, K, H, W]."""
        k, c = self._mixtures, self._channels
        logits, rest = parameters.float().split([k, parameters.shape[1] - k], dim=1)
        means, scales, coefficients = rest.unflatten(1, (-1, k)).split([c, c, self._coefficients], dim=1)
        return logits, means, scales.clamp(min=MINIMUM_LOG_SCALE), coefficients.tanh()

    def _mean(self, channel: int, means: Tensor, coefficients: Tensor, scaled: Tensor) -> Tensor:
        """Means of one channel [B, K, H, W], given the scaled previous channels [B, ≥ channel, H, W]."""
        first = channel * (channel - 1) // 2
        result = means[:, channel]
        for before in range(channel):
            result = result + coefficients[:, first + before] * scaled[:, before, None]
        return result

    def log_prob(self, parameters: Tensor, levels: Tensor) -> Tensor:
        """Log-probability of each pixel (all channels), [B, H, W] (arXiv:1701.05517, equations 2 and 3)."""
        logits, means, scales, coefficients = self._split(parameters)
        scaled, half = self._space.scaled(levels), 1 / (self._space.levels - 1)
        of_components = logits.log_softmax(1)
        for channel in range(self._channels):
            mean = self._mean(channel, means, coefficients, scaled)
            distance, inverse = scaled[:, channel, None] - mean, (-scales[:, channel]).exp()
            upper, lower = (distance + half) * inverse, (distance - half) * inverse
            # log(σ(u) − σ(l)) = log σ(u) + log σ(−l) + log(1 − e^(l − u)) avoids subtracting nearly equal numbers.
            inside = (
                functional.logsigmoid(upper) + functional.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
            )
            result = torch.where(levels[:, channel, None] == 0, functional.logsigmoid(upper), inside)
            result = torch.where(
                levels[:, channel, None] == self._space.levels - 1, functional.logsigmoid(-lower), result
            )
            of_components = of_components + result
        return of_components.logsumexp(1)  # probabilities of components add up, not their logarithms

    def sample(self, parameters: Tensor, uniform: Tensor) -> Tensor:
        """Choose a component, then invert the logistic's cumulative for each channel and round to the nearest level."""
        logits, means, scales, coefficients = self._split(parameters)
        cumulative = logits.softmax(1).cumsum(1)
        component = (uniform[:, :1] > cumulative[:, :-1]).sum(1, keepdim=True)

        def chosen(values: Tensor) -> Tensor:
            return values.gather(2, component[:, None].expand(-1, values.shape[1], -1, -1, -1))

        means, scales, coefficients = chosen(means), chosen(scales), chosen(coefficients)
        result: list[Tensor] = []
        scaled = torch.zeros_like(means[:, :, 0])
        for channel in range(self._channels):
            u = uniform[:, 1 + channel].clamp(1e-6, 1 - 1e-6)
            drawn = self._mean(channel, means, coefficients, scaled)[:, 0] + scales[:, channel, 0].exp() * (
                u.log() - (-u).log1p()
            )
            level = self._space.quantized(drawn)
            scaled = torch.cat([scaled[:, :channel], self._space.scaled(level)[:, None], scaled[:, channel + 1 :]], 1)
            result.append(level)
        return torch.stack(result, 1)

    def expected(self, parameters: Tensor) -> Tensor:
        """E[x] of the continuous logistics: tails beyond the lowest and highest level are ignored."""
        logits, means, _, coefficients = self._split(parameters)
        weights = logits.softmax(1)
        scaled = torch.zeros_like(means[:, :, 0])
        for channel in range(self._channels):
            result = (weights * self._mean(channel, means, coefficients, scaled)).sum(1).clamp(-1, 1)
            scaled = torch.cat([scaled[:, :channel], result[:, None], scaled[:, channel + 1 :]], 1)
        return scaled


def log_mass(space: Space, levels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log of the mass of N(mean, std²) between each level's edges, in nats, float64, shaped like `mean`.

    The lowest and the highest level include the tails. Masses in the upper tail are mirrored into the lower one, to
    avoid subtracting numbers near 1.
    """
    scaled, half = space.scaled(levels).double(), 1 / (space.levels - 1)
    upper = torch.where(levels == space.levels - 1, torch.inf, (scaled + half - mean) / std)
    lower = torch.where(levels == 0, -torch.inf, (scaled - half - mean) / std)
    upper, lower = torch.where(lower > 0, -lower, upper), torch.where(lower > 0, -upper, lower)
    below = torch.special.log_ndtr(upper)
    result: Tensor = below + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - below))
    return result


def pixel_distribution(kind: Literal["categorical", "logistics"], space: Space, mixtures: int) -> PixelDistribution:
    """The distribution that `net.distribution` names."""
    return Categorical(space) if kind == "categorical" else Logistics(space, mixtures)
