"""Latents as patches and as sequences. Torch-free: these call methods of the tensors they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def patchify(latents: Tensor) -> Tensor:
    """[B, C, h, w] → [B, 4C, h/2, w/2]: 2×2 pixels become channels, ordered by channel, row, column."""
    batch, channels, height, width = latents.shape
    split = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(batch, 4 * channels, height // 2, width // 2)


def unpatchify(patches: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    batch, channels, height, width = patches.shape
    split = patches.reshape(batch, channels // 4, 2, 2, height, width)
    return split.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // 4, 2 * height, 2 * width)


def sequence(grid: Tensor) -> Tensor:
    """[B, C, h, w] → [B, h·w, C], row by row."""
    return grid.flatten(2).transpose(1, 2)


def grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `sequence`."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)


def places(height: int, width: int, device: torch.device) -> Tensor:
    """Position ids of FLUX.1's patches, [h·w, 3] float32: 0, row, column."""
    import torch

    found = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
    return found.to(device)
