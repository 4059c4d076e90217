"""Parts that several families' nets are built of."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of about 16 channels; at 32 channels or fewer there are two."""
    groups = max(2, channels // 16)
    return nn.GroupNorm(next(g for g in range(groups, 0, -1) if channels % g == 0), channels)


@final
class Residual(nn.Module):
    """x + convolutions of x, pre-activated (He et al. 2016, arXiv:1603.05027); [B, C, H, W] → the same shape.

    The last convolution starts at zero, so that a new net passes x through.
    """

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *(group_norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)),
            *(group_norm(channels), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(channels, channels, 3, padding=1)),
        )
        nn.init.zeros_(self.inner[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.inner[-1].bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = features + self.inner(features)
        return found
