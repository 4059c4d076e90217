"""Minibatch statistics, which let the discriminator detect mode collapse: a batch of similar images is not real."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn


def stddev(maps: Tensor, group: int) -> Tensor:
    """Append a channel with the minibatch standard deviation (Karras et al. 2018, arXiv:1710.10196, §3).

    The standard deviation of each feature over a group of images (n, n + B/group, n + 2B/group …), averaged over
    features and positions. A batch that is not a multiple of the group is one group; for a single image it is 0.
    """
    count = len(maps)
    size = group if count % group == 0 else count
    if size == 1:
        return torch.cat([maps, maps.new_zeros(1, 1, *maps.shape[2:])], 1)
    grouped = maps.reshape(size, count // size, -1)
    # Constant features are common, and the square root has no derivative at 0.
    deviations = (grouped.var(0) + 1e-8).sqrt().mean(1)
    return torch.cat([maps, deviations.repeat(size).view(count, 1, 1, 1).expand(-1, -1, *maps.shape[2:])], 1)


@final
class MinibatchDiscrimination(nn.Module):
    """Minibatch discrimination (Salimans et al. 2016, arXiv:1606.03498, §3.2): [B, F] → [B, F + kernels].

    o_b(x_i) = Σ_{j ≠ i} exp(−‖M_{i,b} − M_{j,b}‖₁), with M = x T.
    """

    def __init__(self, features: int, kernels: int = 16, width: int = 8) -> None:
        super().__init__()
        self.kernels = kernels
        self.tensor = nn.Parameter(torch.randn(features, kernels, width) / features**0.5)

    def forward(self, features: Tensor) -> Tensor:
        rows = torch.einsum("nf,fkw->nkw", features, self.tensor)
        closeness = torch.exp(-(rows[:, None] - rows[None]).abs().sum(3)).sum(1) - 1
        return torch.cat([features, closeness], 1)
