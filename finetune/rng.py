"""Stateless randomness: seeds, content keys and `Draw`, the random numbers of one training step.

What an example draws is a function of (seed, step, index in the global batch). So a resumed run draws what an unbroken run
would have drawn, and 1 process × batch 4, 4 processes × batch 1 and 4 accumulated batches of 1 draw the same numbers.
Numbers are drawn on the CPU and then moved, so they do not depend on the device. Torch is imported on the first draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def mix(*parts: int | str) -> int:
    """A 63-bit seed that is a function of `parts` alone: the same on every machine, unrelated for unequal parts."""
    return int(key_of(*parts)[:16], 16) >> 1


def key_of(*parts: int | str) -> str:
    """A content address: the SHA-256 of `parts`, in hexadecimal."""
    return hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode()).hexdigest()


class Draw:
    """The draws of some examples of one step.

    Args:
        seed: of the run.
        step: of the optimizer, counted from 0.
        places: each example's place in the global batch.
        device: where drawn tensors go.
    """

    def __init__(self, seed: int, step: int | str, places: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._seed, self.step, self.places, self._device = seed, step, tuple(places), device

    def on(self, device: torch.device | str) -> Draw:
        """The same draws, their tensors on `device`."""
        return Draw(self._seed, self.step, self.places, device)

    def of_step(self, step: int | str) -> Draw:
        """What the same places draw in another step."""
        return Draw(self._seed, step, self.places, self._device)

    def apart(self, use: str) -> Draw:
        """Draws of the same step and places that have nothing to do with these, for a use of their own."""
        return Draw(mix(self._seed, use), self.step, self.places, self._device)

    def _generators(self, purpose: str) -> list[torch.Generator]:
        import torch

        return [torch.Generator().manual_seed(mix(self._seed, self.step, place, purpose)) for place in self.places]

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, [B, *shape] float32. Equal purposes draw equal numbers: name each use apart."""
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
