"""Stateless randomness: seeds, content keys and `Draw`, the random numbers of one training step.

The random numbers of an example are a function of (seed, step, index in the global batch). So a resumed run sees the
same numbers as an uninterrupted one, and 1 process × batch 4, 4 processes × batch 1 and 4 accumulated batches of 1
agree. Numbers are generated on the CPU and then moved, so they do not depend on the device. Torch is imported on first
use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def mix(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on `parts` alone: the same on every machine, unrelated for unequal parts."""
    return int(key_of(*parts)[:16], 16) >> 1


def key_of(*parts: int | str) -> str:
    """Return a content address: the SHA-256 of `parts`, in hexadecimal."""
    return hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode()).hexdigest()


class Draw:
    """The random numbers of some examples of one step.

    Args:
        seed: of the run.
        step: of the optimizer, counted from 0.
        batch_indices: each example's index in the global batch.
        device: where tensors go.
    """

    def __init__(
        self, seed: int, step: int | str, batch_indices: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self._seed, self.step, self.batch_indices, self._device = seed, step, tuple(batch_indices), device

    def on(self, device: torch.device | str) -> Draw:
        """Return the same random numbers, as tensors on `device`."""
        return Draw(self._seed, self.step, self.batch_indices, device)

    def of_step(self, step: int | str) -> Draw:
        """Return the random numbers of the same examples in another step."""
        return Draw(self._seed, step, self.batch_indices, self._device)

    def apart(self, use: str) -> Draw:
        """Return independent random numbers of the same step and examples, for another use."""
        return Draw(mix(self._seed, use), self.step, self.batch_indices, self._device)

    def _generators(self, purpose: str) -> list[torch.Generator]:
        import torch

        return [
            torch.Generator().manual_seed(mix(self._seed, self.step, index, purpose)) for index in self.batch_indices
        ]

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, [B, *shape] float32. Equal purposes give equal numbers: each use needs its own."""
        import torch

        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators(purpose)]).to(self._device)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), [B, *shape] float32."""
        import torch

        return torch.stack([torch.rand(tuple(shape), generator=g) for g in self._generators(purpose)]).to(self._device)

    def integers(self, purpose: str, below: int) -> Tensor:
        """Uniform in 0 … below − 1, [B] int64."""
        import torch

        return torch.stack([torch.randint(below, (), generator=g) for g in self._generators(purpose)]).to(self._device)
