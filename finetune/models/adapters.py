"""LoRA through PEFT: which layers get an adapter, and the adapters' weights and configuration for a file."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextModel

from finetune.errors import UserError, did_you_mean
from finetune.recipe import Adapter

# Endings of layer names in diffusers' denoisers and transformers' CLIP text encoders.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
MLP = ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
ADAPTED = (nn.Linear, nn.Conv2d)


def layers(net: nn.Module, targets: str) -> list[str]:
    """Names of the layers of `net` that `targets` means, in the net's order.

    Args:
        targets: attention, attention+mlp, all-linear, or comma-separated ends of layer names (`to_q, conv1`).

    Raises:
        UserError: nothing matches, with the nearest name.
    """
    adaptable = {name: module for name, module in net.named_modules() if isinstance(module, ADAPTED)}
    if targets == "all-linear":
        found = [name for name, module in adaptable.items() if isinstance(module, nn.Linear)]
    else:
        named = {"attention": ATTENTION, "attention+mlp": ATTENTION + MLP}
        endings = named.get(targets) or tuple(ending.strip() for ending in targets.split(","))
        found = [name for name in adaptable if any(name == ending or name.endswith(f".{ending}") for ending in endings)]
    if not found:
        endings_there = {name.rpartition(".")[2] for name in adaptable} | {"attention", "attention+mlp", "all-linear"}
        raise UserError(f'no layer of {type(net).__name__} matches "{targets}"', where="adapter.targets", remedy=did_you_mean(targets, endings_there))
    return found


def add_lora(net: Any, adapter: Adapter) -> list[str]:
    """Put adapters on `net` in place; only they train, in float32 whatever the base's dtype. Returns the adapted layers.

    float32, because the gradients of float16 weights cannot be unscaled, and bfloat16 weights round small updates away.
    """
    names = layers(net, adapter.targets)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha if adapter.alpha is not None else adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules=names,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights="gaussian",
    )
    if hasattr(net, "add_adapter"):
        net.add_adapter(config)
    else:
        inject_adapter_in_model(config, net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return names


def named_as_in_files(net: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as `text_model.…`: transformers 5 dropped this from its class, but all that reads files knows it."""
    prefix = "text_model." if isinstance(net, CLIPTextModel) and not hasattr(net, "text_model") else ""
    return {prefix + name: tensor for name, tensor in weights.items()}


def lora_weights(net: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights under PEFT's names, contiguous float32 on the CPU.

    Not under diffusers' older names: it knows those for some layers only, and of a file with both kinds it reads one.
    """
    found = named_as_in_files(net, get_peft_model_state_dict(net))
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in found.items()}


def lora_configuration(net: nn.Module) -> dict[str, Any]:
    """PEFT's configuration as plain values: alpha, rank, rsLoRA and DoRA travel in the file, or the picture is wrong.

    Dropout is for training and stays behind: diffusers puts loaded adapters in training mode, and each picture would differ.
    """
    configurations: Any = net.peft_config
    found: dict[str, Any] = configurations["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()} | {"lora_dropout": 0.0}
