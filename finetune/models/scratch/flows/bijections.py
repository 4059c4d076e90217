"""Bijections: invertible layers of normalizing flows with the log-determinant of their Jacobian.

From Dinh et al. 2017 (RealNVP, arXiv:1605.08803), Kingma & Dhariwal 2018 (Glow, arXiv:1807.03039) and Ho et al. 2019
(Flow++, arXiv:1902.00275). Implemented here because normflows has not been maintained since 2023; tested against it and
autograd.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.models.scratch.blocks import Residual

BISECTIONS = 60  # steps to invert a mixture's cumulative distribution
SCALE_BOUND = 3.0  # bound of a coupling's log-scale: a single one scales by at most e³


class Bijection(nn.Module, ABC):
    """An invertible map of each example of a batch."""

    @abstractmethod
    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values [B, …] → mapped values, and log |det| of each example's Jacobian [B]."""

    @abstractmethod
    def inverse(self, values: Tensor) -> Tensor:
        """The inverse of `forward`, without the determinant."""


def _zeros(values: Tensor) -> Tensor:
    return values.new_zeros(len(values))


@final
class Chain(Bijection):
    """A composition of bijections."""

    def __init__(self, parts: Sequence[Bijection]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        total = _zeros(values)
        for part in self.parts:
            values, log_det = part(values)
            total = total + log_det
        return values, total

    def inverse(self, values: Tensor) -> Tensor:
        for part in reversed(self.parts):
            values = cast(Bijection, part).inverse(values)
        return values


@final
class Logit(Bijection):
    """[0, 1] → ℝ: logit(margin + (1 − 2 · margin) · x) (Dinh et al. 2017, §4.1); with margin 0 it is x − ½."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self._margin = margin

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self._margin:
            return values - 0.5, _zeros(values)
        inner = self._margin + (1 - 2 * self._margin) * values
        log_det = math.log(1 - 2 * self._margin) - inner.log() - (-inner).log1p()
        return inner.log() - (-inner).log1p(), log_det.flatten(1).sum(1)

    def inverse(self, values: Tensor) -> Tensor:
        return (values.sigmoid() - self._margin) / (1 - 2 * self._margin) if self._margin else values + 0.5


@final
class Squeeze(Bijection):
    """[B, C, H, W] → [B, 4C, H/2, W/2]: moves each 2×2 block into channels."""

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return functional.pixel_unshuffle(values, 2), _zeros(values)

    def inverse(self, values: Tensor) -> Tensor:
        return functional.pixel_shuffle(values, 2)


@final
class Checkerboard(Bijection):
    """[B, C, H, W] → [B, 2C, H, W/2]: the black squares of a checkerboard, then the white ones.

    A coupling of the two halves of the channels is then RealNVP's checkerboard coupling. `inverted` swaps the
    directions.
    """

    def __init__(self, inverted: bool = False) -> None:
        super().__init__()
        self._undone = inverted

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._joined(values) if self._undone else self._split(values), _zeros(values)

    def inverse(self, values: Tensor) -> Tensor:
        return self._split(values) if self._undone else self._joined(values)

    def _split(self, values: Tensor) -> Tensor:
        return self._swap_odd_rows(torch.cat([values[..., 0::2], values[..., 1::2]], 1))

    def _joined(self, values: Tensor) -> Tensor:
        even, odd = self._swap_odd_rows(values).chunk(2, 1)
        return torch.stack([even, odd], -1).flatten(-2)

    def _swap_odd_rows(self, values: Tensor) -> Tensor:
        """Swap the halves of the channels in every second row."""
        first, second = values.chunk(2, 1)
        odd = (torch.arange(values.shape[2], device=values.device) % 2).bool()[:, None]
        return torch.cat([torch.where(odd, second, first), torch.where(odd, first, second)], 1)


@final
class ActNorm(Bijection):
    """Scale and shift of each channel, initialized to normalize a batch of the data (Glow, §3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale, self.shift = (
            nn.Parameter(torch.zeros(channels, 1, 1)),
            nn.Parameter(torch.zeros(channels, 1, 1)),
        )
        self.initializing = False  # if set, the next batch initializes both

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.initializing:
            deviation, mean = torch.std_mean(values.detach(), (0, 2, 3))
            self.log_scale.data = -(deviation[:, None, None] + 1e-6).log().to(self.log_scale.dtype)
            self.shift.data = -mean[:, None, None].to(self.shift.dtype)
        log_det = self.log_scale.sum() * values.shape[2] * values.shape[3]
        return (values + self.shift) * self.log_scale.exp(), log_det.expand(len(values))

    def inverse(self, values: Tensor) -> Tensor:
        return values * (-self.log_scale).exp() - self.shift


@final
class InvertibleConv(Bijection):
    """An invertible 1×1 convolution P L (U + diag s), initialized to a random rotation (Glow, §3.2)."""

    permutation: Tensor
    signs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels))[0])
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation)
        self.register_buffer("signs", diagonal.sign())
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())

    def _weight(self) -> Tensor:
        lower = self.lower.tril(-1) + torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        return self.permutation @ lower @ (self.upper.triu(1) + torch.diag(self.signs * self.log_diagonal.exp()))

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        log_det = self.log_diagonal.sum() * values.shape[2] * values.shape[3]
        return functional.conv2d(values, self._weight()[:, :, None, None]), log_det.expand(len(values))

    def inverse(self, values: Tensor) -> Tensor:
        return functional.conv2d(values, torch.linalg.inv(self._weight())[:, :, None, None])


@final
class Conditioner(nn.Module):
    """The network of a coupling: [B, inputs, H, W] → [B, outputs, H, W], initialized to output 0."""

    def __init__(self, inputs: int, outputs: int, width: int, blocks: int, dropout: float) -> None:
        super().__init__()
        last = nn.Conv2d(width, outputs, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        middle: list[nn.Module] = [Residual(width, dropout) for _ in range(blocks)] or [
            nn.SiLU(),
            nn.Conv2d(width, width, 1),
        ]
        self.net = nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), *middle, nn.SiLU(), last)

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = self.net(values)
        return result


class Coupling(Bijection):
    """Transforms half of the channels with parameters predicted from the other half and an optional context.

    Args:
        channels: of the values, even.
        second: whether the second half is transformed.
        numbers: parameters per transformed value.
        net: (width, blocks, dropout) of the conditioner.
        context: channels of the context.
    """

    def __init__(
        self, channels: int, second: bool, numbers: int, net: tuple[int, int, float], context: int = 0
    ) -> None:
        super().__init__()
        self.conditioner = Conditioner(channels // 2 + context, numbers * channels // 2, *net)
        self._second, self._numbers = second, numbers

    @abstractmethod
    def transform(self, values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Values [B, C/2, H, W], parameters [B, numbers, C/2, H, W] → transformed values, log-derivative of each."""

    @abstractmethod
    def inverse_transform(self, values: Tensor, numbers: Tensor) -> Tensor:
        """The inverse of `transform`."""

    def _halves(self, values: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The half to keep, the half to transform, and its parameters."""
        kept, changing = values.chunk(2, 1) if self._second else reversed(values.chunk(2, 1))
        read = kept if context is None else torch.cat([kept, context], 1)
        return kept, changing, self.conditioner(read).unflatten(1, (self._numbers, -1))

    def _joined(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.cat([kept, changed] if self._second else [changed, kept], 1)

    def forward(self, values: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changing, numbers = self._halves(values, context)
        changed, log_det = self.transform(changing, numbers)
        return self._joined(kept, changed), log_det.flatten(1).sum(1)

    def inverse(self, values: Tensor) -> Tensor:
        kept, changed, numbers = self._halves(values)
        return self._joined(kept, self.inverse_transform(changed, numbers))


def bounded(log_scale: Tensor) -> Tensor:
    """Softly bound a log-scale of any shape: b·tanh(s / b), b = `SCALE_BOUND`."""
    return SCALE_BOUND * (log_scale / SCALE_BOUND).tanh()


@final
class Affine(Coupling):
    """Affine coupling x · e^s + t (RealNVP, equation 7)."""

    def __init__(self, channels: int, second: bool, net: tuple[int, int, float], context: int = 0) -> None:
        super().__init__(channels, second, 2, net, context)

    def transform(self, values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = bounded(numbers[:, 0])
        return values * log_scale.exp() + numbers[:, 1], log_scale

    def inverse_transform(self, values: Tensor, numbers: Tensor) -> Tensor:
        return (values - numbers[:, 1]) * (-bounded(numbers[:, 0])).exp()


@final
class MixtureCdf(Coupling):
    """Coupling logit(F(x)) · e^s + t with F the CDF of a mixture of logistics (Flow++, §3.2); inverted by bisection."""

    def __init__(
        self, channels: int, second: bool, net: tuple[int, int, float], mixtures: int, context: int = 0
    ) -> None:
        super().__init__(channels, second, 2 + 3 * mixtures, net, context)
        self._mixtures = mixtures
        # Different initial means: equal components would stay equal.
        self.means = nn.Parameter(
            torch.linspace(-1.5, 1.5, mixtures)[:, None, None, None] if mixtures > 1 else torch.zeros(1, 1, 1, 1)
        )

    def _parts(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        k = self._mixtures
        logits, means, scales = numbers[:, 2:].split([k, k, k], 1)
        return bounded(numbers[:, 0]), numbers[:, 1], logits.log_softmax(1), means + self.means, scales.clamp(min=-7.0)

    def _logit_cdf(self, values: Tensor, logits: Tensor, means: Tensor, scales: Tensor) -> Tensor:
        standard = (values[:, None] - means) * (-scales).exp()
        below, above = (
            (logits + functional.logsigmoid(standard)).logsumexp(1),
            (logits + functional.logsigmoid(-standard)).logsumexp(1),
        )
        return below - above

    def transform(self, values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift, logits, means, scales = self._parts(numbers)
        standard = (values[:, None] - means) * (-scales).exp()
        log_below, log_above = functional.logsigmoid(standard), functional.logsigmoid(-standard)
        below, above = (logits + log_below).logsumexp(1), (logits + log_above).logsumexp(1)
        density = (logits - scales + log_below + log_above).logsumexp(1)
        # d logit(F) / dx = f / (F (1 − F))
        return (below - above) * log_scale.exp() + shift, density - below - above + log_scale

    @torch.no_grad()
    def inverse_transform(self, values: Tensor, numbers: Tensor) -> Tensor:
        """Invert `transform` by bisection: the CDF of a mixture has no inverse in closed form."""
        log_scale, shift, logits, means, scales = self._parts(numbers)
        wanted = (values - shift) * (-log_scale).exp()
        # A single logistic has its quantile at mean + scale · wanted; the mixture's lies between the extremes of these.
        quantiles = means + scales.exp() * wanted[:, None]
        low, high = quantiles.amin(1), quantiles.amax(1)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            under = self._logit_cdf(middle, logits, means, scales) < wanted
            low, high = torch.where(under, middle, low), torch.where(under, high, middle)
        return (low + high) / 2


@final
class LearnedPrior(Bijection):
    """Standardizes the half of the channels that leaves at the end of a scale, given the other half (Glow, §3.3).

    It is a learned prior as a bijection, [B, C, H, W] → the same shape; the caller splits off the second half.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.coupling = Affine(channels, True, (width, 0, 0.0))

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.coupling(values)
        return result

    def inverse(self, values: Tensor) -> Tensor:
        return self.coupling.inverse(values)
