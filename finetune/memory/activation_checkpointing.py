"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): blocks recompute activations in the backward pass.

For every block, or every n-th: diffusers' networks pass each of their blocks to one function, which here decides by the
block's position in the first forward pass.
"""

from __future__ import annotations

from typing import Any, final

import torch.utils.checkpoint
from transformers import PreTrainedModel


def checkpoint_activations(net: Any, every: int) -> None:
    """Make `net` recompute the first of each `every` blocks; 0: none.

    Text encoders of transformers recompute all or none.
    """
    if not every:
        return
    if isinstance(net, PreTrainedModel):
        # The reentrant kind, once the default there, gives no gradient to adapters behind frozen embeddings.
        enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    else:
        net.enable_gradient_checkpointing(EveryNth(every))


@final
class EveryNth:
    """diffusers' `gradient_checkpointing_func`: calls a block with its arguments and returns its output."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._positions: dict[int, int] = {}  # block → its position

    def __call__(self, block: Any, *arguments: Any) -> Any:
        position = self._positions.setdefault(id(block), len(self._positions))
        if position % self._every:
            return block(*arguments)
        return torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)
