"""Byte-exact stand-ins for what does not run on fake tensors: bitsandbytes' 8-bit AdamW.

Their layouts are bitsandbytes' (optim/optimizer.py, `Optimizer2State.init_state`), and a test holds them against the real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, final
from unittest import mock

import torch

SMALLEST = 4096  # elements; tensors with fewer keep float32 state (bitsandbytes' min_8bit_size)
BLOCK = 256  # elements that share one float32 scale


@final
class AdamW8bit(torch.optim.Optimizer):
    """The state of bitsandbytes' AdamW8bit: a byte an element and moment, a scale a block, two maps of 256 values for all."""

    def __init__(self, parameters: Any, **defaults: Any) -> None:
        super().__init__(parameters, defaults)
        self._maps: list[torch.Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter] = self._layout(parameter)
                # One kernel reads the gradient and both moments and writes the weights and both moments.
                parameter.add_(parameter.grad)

    def _layout(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        count = parameter.numel()
        if count < SMALLEST:
            return {"state1": torch.zeros_like(parameter, dtype=torch.float32), "state2": torch.zeros_like(parameter, dtype=torch.float32)}
        if not self._maps:
            self._maps = [torch.empty(256), torch.empty(256)]
        blocks = -(-count // BLOCK)
        return {
            "state1": torch.zeros_like(parameter, dtype=torch.uint8),
            "state2": torch.zeros_like(parameter, dtype=torch.uint8),
            "absmax1": torch.zeros(blocks),
            "absmax2": torch.zeros(blocks),
            "qmap1": self._maps[0],
            "qmap2": self._maps[1],
        }


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """Within, `bitsandbytes.optim.AdamW8bit` is its stand-in."""
    import bitsandbytes

    with mock.patch.object(bitsandbytes.optim, "AdamW8bit", AdamW8bit):
        yield
