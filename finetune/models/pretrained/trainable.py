"""From a loaded pipeline to one that trains: named passes, in the order of `PASSES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from finetune import kernels
from finetune.adapters import peft
from finetune.adapters.kinds import kind_of
from finetune.config.schema import Adapter, Recipe
from finetune.errors import UserError
from finetune.memory import apply
from finetune.memory.activation_checkpointing import checkpoint_activations
from finetune.models.pretrained.family import ClipFamily, Family
from finetune.models.pretrained.init_lora import load_initial_lora
from finetune.models.pretrained.textual_inversion import NewTokens


@dataclass
class Trainable:
    """A pipeline on its way to training.

    Attributes:
        denoiser: of the pipeline.
        text_encoders: those whose embeddings or weights train, by name.
        tokens: embeddings of new tokens, by the name of the text encoder.
        dtype, device: of the run.
        adapted: adapted layers by network; the passes fill it.
    """

    pipeline: Any
    family: Family
    recipe: Recipe
    denoiser: nn.Module
    text_encoders: Mapping[str, nn.Module]
    tokens: Mapping[str, NewTokens]
    dtype: torch.dtype
    device: torch.device
    adapted: dict[str, list[str]] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter | None:
        """The recipe's section."""
        return self.recipe.adapter

    @property
    def networks(self) -> dict[str, Any]:
        """Networks that train or are adapted, by name. With new tokens alone, text encoders are not among them."""
        whole = not self.tokens or self.recipe.model.train_text_encoder
        return {self.family.spec.denoiser: self.denoiser, **(self.text_encoders if whole else {})}


def freeze_all(model: Trainable) -> None:
    """Freeze every component."""
    for component in model.pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)


def load_lora(model: Trainable) -> None:
    """Continue from the LoRA of `adapter.init_lora`. Before quantization: diffusers' loader needs the original layers."""
    if model.adapter is not None and model.adapter.init_lora:
        model.adapted |= load_initial_lora(model.pipeline, model.networks, model.adapter)


def quantize(model: Trainable) -> None:
    """Quantize the frozen denoiser. Before adapters are added, so that they wrap quantized layers."""
    apply.quantize_base(model.denoiser, model.recipe, model.dtype, model.device)


def add_adapters(model: Trainable) -> None:
    """Add new adapters, or make all weights train."""
    for name, network in model.networks.items():
        if model.adapter is None:
            network.requires_grad_(True)
        elif name not in model.adapted:
            model.adapted[name] = peft.add_adapter(network, model.adapter)


def apply_kernels(model: Trainable) -> None:
    """Replace operations by faster ones with the same result."""
    for network in model.networks.values():
        if model.adapter is not None:
            kernels.apply("unet_blocks", network)
            kernels.apply("fused_lora", network)
        kernels.apply("rope", network)


def checkpoint_blocks(model: Trainable) -> None:
    """Recompute activations in the backward pass."""
    for network in model.networks.values():
        checkpoint_activations(network, model.recipe.train.checkpointed)


def check_adapters(model: Trainable) -> None:
    """Refuse settings of the adapter that match no layer, or that no file can hold.

    Raises:
        UserError: with the key.
    """
    if model.adapter is None:
        return
    if model.adapter.pissa and saves_peft_folders(model.pipeline, model.adapter):
        problem = (
            f"a {model.family.spec.pipeline} loads no LoRA file, and a LoRA initialized by PiSSA has no other form"
        )
        raise UserError(problem, where="adapter.pissa", remedy="set it to false")
    peft.check_patterns(model.adapter, [name for names in model.adapted.values() for name in names])


def offload(model: Trainable) -> None:
    """Keep blocks of the frozen denoiser in host memory."""
    apply.offload_base(model.denoiser, model.recipe, model.device)


def freeze_untrained(model: Trainable) -> None:
    """Freeze parts that must not train, or that the output does not depend on."""
    parts = model.family.untrained(model.denoiser)
    if model.text_encoders and isinstance(model.family, ClipFamily):
        parts += model.family.untrained_text(model.text_encoders)
    for part in parts:
        part.requires_grad_(False)


def train_tokens(model: Trainable) -> None:
    """Let the embeddings of new tokens train."""
    for embedding in model.tokens.values():
        embedding.offset.requires_grad_(True)


PASSES: tuple[Callable[[Trainable], None], ...] = (
    freeze_all,
    load_lora,
    quantize,
    add_adapters,
    apply_kernels,
    checkpoint_blocks,
    check_adapters,
    offload,
    freeze_untrained,
    train_tokens,
)


def make_trainable(model: Trainable) -> dict[str, list[str]]:
    """Run all passes; returns the adapted layers by network."""
    for run in PASSES:
        run(model)
    return model.adapted


def saves_peft_folders(pipeline: Any, adapter: Adapter | None) -> bool:
    """Whether an adapter has no form in diffusers: not a LoRA, or the pipeline (PixArt-Σ's) loads none."""
    return adapter is not None and (not kind_of(adapter).has_lora_file or not hasattr(pipeline, "save_lora_weights"))
