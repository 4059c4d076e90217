"""Building blocks shared by several families."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from finetune.errors import UserError


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalization with about 16 channels per group, and at least two groups."""
    groups = max(2, channels // 16)
    return nn.GroupNorm(next(g for g in range(groups, 0, -1) if channels % g == 0), channels)


@final
class Residual(nn.Module):
    """A pre-activation residual block (He et al. 2016, arXiv:1603.05027): [B, C, H, W] → the same shape.

    The last convolution is initialized to zero, so a new block is the identity.
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
        result: Tensor = features + self.inner(features)
        return result


def downsampling(inputs: int, widths: Sequence[int], blocks: int, dropout: float) -> list[nn.Module]:
    """Residual blocks with strided convolutions in between.

    [B, inputs, H, W] → [B, widths[-1], H/2ⁿ, W/2ⁿ] with n = len(widths) − 1.
    """
    result: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 3, padding=1)]
    for before, after in itertools.pairwise(widths):
        result += [Residual(before, dropout) for _ in range(blocks)] + [nn.Conv2d(before, after, 4, 2, 1)]
    return [*result, nn.SiLU()]


def upsampling(widths: Sequence[int], outputs: int, blocks: int, dropout: float) -> list[nn.Module]:
    """The reverse of `downsampling`: [B, widths[-1], h, w] → [B, outputs, 2ⁿh, 2ⁿw]."""
    result: list[nn.Module] = []
    for before, after in itertools.pairwise(widths[::-1]):
        result += [Residual(before, dropout) for _ in range(blocks)] + [nn.ConvTranspose2d(before, after, 4, 2, 1)]
    return [*result, Residual(widths[0], dropout), nn.SiLU(), nn.Conv2d(widths[0], outputs, 3, padding=1)]


def halved(
    height: int, width: int, times: int, where: str = "net.halvings", less: str = "set net.halvings lower"
) -> tuple[int, int]:
    """Height and width after `times` halvings.

    Args:
        where: the recipe key that sets the number of halvings, for the error.
        less: how to lower it.

    Raises:
        UserError: a side is not divisible.
    """
    factor = 2**times
    if height % factor or width % factor:
        raise UserError(
            f"{width}×{height} pixels cannot be halved {times} times",
            where=where,
            remedy=f"{less}, or set data.resolution to a multiple of {factor}",
        )
    return height // factor, width // factor
