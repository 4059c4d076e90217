"""Weights sharded by FSDP2 (torch's `fully_shard`) through Accelerate: each process holds a shard of every tensor.

The trainer updates the shards. Files are written whole, and are the same as without FSDP: `whole` gathers tensors, and
`shared` takes this process's shard of a tensor that was read.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune.config.schema import Precision
from finetune.errors import UserError


def plugin(precision: Precision) -> FullyShardedDataParallelPlugin:
    """Accelerate's FSDP2 plugin: sharded by block, gathered in autocast's precision; the launcher configures the rest.

    Inputs are not cast: in bfloat16, timestep 567 would become 568. Gradients are reduced in float32.
    """
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bfloat16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        ),
        activation_checkpointing=False,
        cpu_ram_efficient_loading=False,
    )


def check(accelerator: Accelerator) -> None:
    """Raise if Accelerate did not shard as configured: without a GPU, it silently leaves the weights whole."""
    if not accelerator.is_fsdp2:
        raise UserError(
            "the configuration selects FSDP, but Accelerate shards weights only across GPUs, and found none",
            where="the Accelerate configuration, distributed_type",
            remedy="use MULTI_GPU, which works on CPUs too: ft train --accelerate many-gpus",
        )


def settle_strides(net: nn.Module) -> None:
    """Give tensors of `net` whose layout is ambiguous, such as 1×1 kernels, contiguous strides, in place.

    With channels-last strides, torch refuses to copy weights back after broadcasting them to other processes: it takes
    the flat copy for another tensor at the same address.
    """
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_contiguous():
            tensor.data = tensor.data.view(-1).view(tensor.shape)


def cut(accelerator: Accelerator, net: nn.Module) -> None:
    """Set the blocks of `net` that are gathered one at a time: the `_no_split_modules` of diffusers and transformers.

    No smaller units: fused LoRA layers (`kernels.fused_lora`) read each other's weights.
    """
    wanted = {name for module in net.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    there = {type(module).__name__ for module in net.modules()}
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(wanted & there)


def whole(value: Any, kept: bool = True) -> Any:
    """`value` (a tensor, or a dict or list of them) with sharded tensors gathered; all processes call this together.

    Args:
        kept: whether this process needs the result; if not, it gets None in place of tensors. Gathered tensors come one
            by one and are moved to the host.
    """
    if isinstance(value, DTensor):
        found = full(value.detach())
        return found.cpu() if kept else None
    if isinstance(value, dict):
        return {key: whole(one, kept) for key, one in value.items()}
    return [whole(one, kept) for one in value] if isinstance(value, list) else value


def full(tensor: Tensor) -> Tensor:
    """`tensor`, gathered if it is sharded, on every process's device; all processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared(found: Any, like: Tensor) -> Any:
    """This process's shard of a tensor that all have read (or of each in a dict), if `like` is sharded."""
    if isinstance(found, dict):
        return {key: shared(one, like) for key, one in found.items()}
    if not isinstance(like, DTensor) or not isinstance(found, Tensor) or found.shape != like.shape:
        return found
    return distribute_tensor(found.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def part(tensor: Tensor) -> Tensor:
    """The local shard of `tensor`, or `tensor` itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
