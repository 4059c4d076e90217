"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): blocks forget what they computed and compute it again in the backward pass.

Of every block, or of every n-th: diffusers' nets hand each of their blocks to one function, which decides here by the
block's place in the order of the first forward pass.
"""

from __future__ import annotations

from typing import Any, final

import torch.utils.checkpoint
from transformers import PreTrainedModel


def checkpoint_activations(net: Any, every: int) -> None:
    """Let `net` recompute its first block of each `every` blocks; 0: none. A text encoder of transformers recomputes all or none."""
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
    """diffusers' `gradient_checkpointing_func`: called with a block and its arguments, returns what the block returns."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._places: dict[int, int] = {}  # block → its place

    def __call__(self, block: Any, *arguments: Any) -> Any:
        place = self._places.setdefault(id(block), len(self._places))
        if place % self._every:
            return block(*arguments)
        return torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)
