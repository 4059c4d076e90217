"""Weights shared out among processes by FSDP2 (torch's `fully_shard`), as Accelerate puts it on: each keeps its part of every tensor.

The trainer steps on the parts. What is written is whole, and the same as without: `whole` gathers what is read off, `shared` takes this
process's part of what was read.
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
    """Block by block; gathered in the precision that autocast computes in. What else there is to say, the launcher's configuration says.

    Inputs are not cast: in bfloat16, timestep 567 would be 568. Gradients are summed in float32.
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
    """Raise if Accelerate did not do what its configuration asks for: where it finds no GPU, it leaves the weights whole and says nothing."""
    if not accelerator.is_fsdp2:
        raise UserError(
            "the configuration asks for FSDP, and Accelerate shares weights out among GPUs only: it has found none here",
            where="the configuration of Accelerate, distributed_type",
            remedy="take MULTI_GPU (`ft train --accelerate many-gpus`), which CPUs have too",
        )


def settle_strides(net: nn.Module) -> None:
    """Give tensors of `net` that lie the same in every layout, such as 1×1 kernels, the strides of torch's ordinary one, in place.

    With those of channels last, torch, as it sends weights to other processes, takes its flat copy for another tensor at the same place,
    and refuses to copy that back.
    """
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_contiguous():
            tensor.data = tensor.data.view(-1).view(tensor.shape)


def cut(accelerator: Accelerator, net: nn.Module) -> None:
    """Name the blocks of `net` that are gathered one at a time: those that diffusers and transformers say not to split.

    No smaller units: LoRA layers that go together (`models.fused`) read each other's weights.
    """
    wanted = {name for module in net.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    there = {type(module).__name__ for module in net.modules()}
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(wanted & there)


def whole(value: Any, kept: bool = True) -> Any:
    """`value`, a tensor or a dict or list of such, with every shared tensor gathered; all processes call this together.

    Args:
        kept: whether this process wants them: if not, it gets nothing in their places. They come one by one, and lie on the host.
    """
    if isinstance(value, DTensor):
        found = full(value.detach())
        return found.cpu() if kept else None
    if isinstance(value, dict):
        return {key: whole(one, kept) for key, one in value.items()}
    return [whole(one, kept) for one in value] if isinstance(value, list) else value


def full(tensor: Tensor) -> Tensor:
    """`tensor` itself, or, of a part, the whole one, on every process's device; all call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared(found: Any, like: Tensor) -> Any:
    """This process's part of a whole tensor that all have read, or of each in a dict, where `like`, of the same shape, is a part; else itself."""
    if isinstance(found, dict):
        return {key: shared(one, like) for key, one in found.items()}
    if not isinstance(like, DTensor) or not isinstance(found, Tensor) or found.shape != like.shape:
        return found
    return distribute_tensor(found.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def part(tensor: Tensor) -> Tensor:
    """What of `tensor` lies on this process's device."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
