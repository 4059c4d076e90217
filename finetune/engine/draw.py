"""Randomness without state: what an example of step n draws is a function of (seed, step, place in the global batch).

So a resumed run draws what the unbroken one would have, and 1 process × batch 4, 4 × 1 and accumulation 4 × 1 draw the
same. Numbers are drawn on the CPU and moved, so the device does not change them either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.seeds import mix


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
        return [torch.Generator().manual_seed(mix(self._seed, self.step, place, purpose)) for place in self.places]

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, [B, *shape] float32. Equal purposes draw equal numbers: name each use apart."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators(purpose)]).to(self._device)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), [B, *shape] float32."""
        return torch.stack([torch.rand(tuple(shape), generator=g) for g in self._generators(purpose)]).to(self._device)

    def integers(self, purpose: str, below: int) -> Tensor:
        """Uniform in 0 … below − 1, [B] int64."""
        return torch.stack([torch.randint(below, (), generator=g) for g in self._generators(purpose)]).to(self._device)
