"""Block offloading: frozen weights are kept in host memory and copied to the device only while their block computes.

diffusers has hooks for this too (`apply_group_offloading`). They move the whole block, trained weights included, copy
back what has not changed, and replace the data of parameters that the backward pass still refers to. These hooks copy
frozen weights, one way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast, final

import torch
from torch import nn


def offload_blocks(net: nn.Module, device: torch.device) -> int:
    """Keep the frozen weights of `net`'s blocks in host memory; returns their bytes. Everything else stays where it is.

    For networks with one sequence of blocks (transformers, text encoders). In training, the weights of a block without
    activation checkpointing stay on the device until the backward pass has read them, so nothing is saved.
    """
    blocks = list(blocks_of(net))
    for block in blocks:
        _Offloaded(block, device)
    return sum(cast(int, block.waiting_bytes) for block in blocks)


def blocks_of(net: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost `ModuleList`s."""
    for child in net.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks_of(child)


@final
class _Offloaded:
    """The hooks of one block. Between calls its weights are empty parameters, so that `.to` moves nothing.

    The parameters themselves are replaced, not their data: activation checkpointing keeps frozen ones by reference,
    and the backward pass would read whatever data they have by then.
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self._device = device
        self._places = [
            (module, name)
            for module in block.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and not parameter.requires_grad
        ]
        self._host = [module.get_parameter(name).data.to("cpu") for module, name in self._places]
        if device.type == "cuda":  # copies from pinned memory are asynchronous
            self._host = [tensor.pin_memory() for tensor in self._host]
        self._empty = [
            nn.Parameter(torch.empty(0, dtype=tensor.dtype, device=device), requires_grad=False)
            for tensor in self._host
        ]
        block.waiting_bytes = sum(tensor.nbytes for tensor in self._host)  # type: ignore[assignment]
        block.packed_away = sum(tensor.numel() for tensor in self._host)  # type: ignore[assignment]
        block.register_forward_pre_hook(self._load)
        block.register_forward_hook(self._release, always_call=True)
        self._put(self._empty)

    def _load(self, block: nn.Module, inputs: Any) -> None:
        copies = (tensor.to(self._device, non_blocking=True, copy=True) for tensor in self._host)
        self._put(nn.Parameter(tensor, requires_grad=False) for tensor in copies)

    def _release(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self._put(self._empty)

    def _put(self, parameters: Iterable[nn.Parameter]) -> None:
        for (module, name), parameter in zip(self._places, parameters, strict=True):
            module._parameters[name] = parameter
