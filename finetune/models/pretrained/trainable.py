"""The passes that turn a loaded pipeline into one that trains, in the order in which they run.

| pass | does | if |
| --- | --- | --- |
| `channels_last` | stores the denoiser's weights channels-last | it is a pipeline |
| `freeze` | freezes every network | always |
| `unfreeze` | lets whole networks train | there is no adapter |
| `init_lora` | puts the recipe's LoRA file on the networks | `adapter.init_lora` |
| `quantize` | quantizes the frozen denoiser, under a LoRA that is already there | `model.quantize` |
| `adapters` | adds adapters to networks that have none yet | there is an adapter |
| `unet_blocks` | kernel: U-Net blocks | there is an adapter |
| `fused_lora` | kernel: LoRA layers, after the layers are there | there is an adapter |
| `rope` | kernel: rotary embeddings | always |
| `activation_checkpointing` | recomputes blocks in the backward pass | `train.gradient_checkpointing` |
| `offload` | moves frozen weights to host memory, so all layers must be there | `train.offload_blocks` |
| `freeze_unused` | freezes parts that the output does not depend on | always |
| `train_tokens` | lets new tokens' embeddings train | `tokens` |
| `tile_vae` | encodes and decodes in tiles | `model.vae_tiling` |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from finetune import kernels
from finetune.adapters import peft
from finetune.config.schema import Adapter, Recipe
from finetune.errors import UserError
from finetune.memory import apply
from finetune.memory.activation_checkpointing import checkpoint_activations
from finetune.models.pretrained.family import ClipFamily, Family
from finetune.models.pretrained.init_lora import load_initial_lora


@dataclass
class Trainable:
    """A pipeline on its way to training, or a denoiser alone.

    Attributes:
        networks: those that train, by their names in the pipeline.
        denoiser: name of the denoiser among them.
        pipeline, family: None where a denoiser is trained alone, as for an estimate.
        encoders: text encoders that run in the training step.
        tokens: modules with the embeddings of new tokens.
        adapted: filled by the passes; the adapted layers of each network.
        done: filled by the passes; names of those that have run.
    """

    recipe: Recipe
    networks: Mapping[str, nn.Module]
    denoiser: str
    dtype: torch.dtype
    device: torch.device
    pipeline: Any = None
    family: Family | None = None
    encoders: Mapping[str, nn.Module] = field(default_factory=dict)
    tokens: Iterable[Any] = ()
    adapted: dict[str, list[str]] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    @property
    def adapter(self) -> Adapter:
        """The recipe's section, for passes that run only if there is one."""
        assert self.recipe.adapter is not None
        return self.recipe.adapter

    @property
    def components(self) -> list[nn.Module]:
        """Every network, of the pipeline if there is one."""
        parts = self.pipeline.components if self.pipeline is not None else self.networks
        return [part for part in parts.values() if isinstance(part, nn.Module)]


@dataclass(frozen=True)
class Pass:
    """One step of the model. A pass that is not `repeatable` raises if it has already run."""

    name: str
    run: Callable[[Trainable], None]
    applies: Callable[[Trainable], bool] = lambda model: True
    repeatable: bool = True


def _channels_last(model: Trainable) -> None:
    model.networks[model.denoiser].to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _freeze(model: Trainable) -> None:
    for network in model.components:
        network.requires_grad_(False)


def _unfreeze(model: Trainable) -> None:
    for network in model.networks.values():
        network.requires_grad_(True)


def _init_lora(model: Trainable) -> None:
    model.adapted |= load_initial_lora(model.pipeline, model.networks, model.adapter)


def _quantize(model: Trainable) -> None:
    apply.quantize_base(model.networks[model.denoiser], model.recipe, model.dtype, model.device)


def _add_adapters(model: Trainable) -> None:
    if model.adapter.pissa and model.pipeline is not None and peft.saved_as_folders(model.pipeline, model.adapter):
        raise UserError(
            f"a {type(model.pipeline).__name__} loads no LoRA file, and a LoRA initialized by PiSSA has no other form",
            where="adapter.pissa",
            remedy="set it to false",
        )
    for name, network in model.networks.items():
        if name not in model.adapted:
            model.adapted[name] = peft.add_adapter(network, model.adapter)
    if model.pipeline is not None:
        peft.check_patterns(model.adapter, [layer for layers in model.adapted.values() for layer in layers])


def _kernel(name: str) -> Callable[[Trainable], None]:
    def run(model: Trainable) -> None:
        for network in model.networks.values():
            kernels.apply(name, network)

    return run


def _checkpoint(model: Trainable) -> None:
    for network in model.networks.values():
        checkpoint_activations(network, model.recipe.train.checkpointed)


def _offload(model: Trainable) -> None:
    apply.offload_base(model.networks[model.denoiser], model.recipe, model.device)


def _freeze_unused(model: Trainable) -> None:
    assert model.family is not None
    unused = model.family.untrained(model.networks[model.denoiser])
    if model.encoders and isinstance(model.family, ClipFamily):
        unused += model.family.untrained_text(model.encoders)
    for part in unused:
        part.requires_grad_(False)


def _train_tokens(model: Trainable) -> None:
    for token in model.tokens:
        token.offset.requires_grad_(True)


def _tile_vae(model: Trainable) -> None:
    apply.tile(model.pipeline.vae, model.recipe.model)


def _has_adapter(model: Trainable) -> bool:
    return model.recipe.adapter is not None


def _has_lora_file(model: Trainable) -> bool:
    return _has_adapter(model) and model.adapter.init_lora is not None and model.pipeline is not None


PASSES = (
    Pass("channels_last", _channels_last, lambda model: model.pipeline is not None),
    Pass("freeze", _freeze),
    Pass("unfreeze", _unfreeze, lambda model: not _has_adapter(model)),
    Pass("init_lora", _init_lora, _has_lora_file, False),
    Pass("quantize", _quantize, lambda model: model.recipe.model.quantize is not None, False),
    Pass("adapters", _add_adapters, _has_adapter, False),
    Pass("unet_blocks", _kernel("unet_blocks"), _has_adapter),
    Pass("fused_lora", _kernel("fused_lora"), _has_adapter),
    Pass("rope", _kernel("rope")),
    Pass("activation_checkpointing", _checkpoint, lambda model: model.recipe.train.checkpointed > 0),
    Pass("offload", _offload, lambda model: model.recipe.train.offload_blocks, False),
    Pass("freeze_unused", _freeze_unused, lambda model: model.family is not None),
    Pass("train_tokens", _train_tokens),
    Pass("tile_vae", _tile_vae, lambda model: model.pipeline is not None and model.recipe.model.vae_tiling),
)
ADAPTER_PASSES = ("init_lora", "adapters", "unet_blocks", "fused_lora")  # what makes a base one with adapters


def make_trainable(
    model: Trainable, only: Iterable[str] | None = None, without: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Run the passes that apply, in order; returns the adapted layers of each network.

    Args:
        only: names of passes; None: all.
        without: names of passes to leave out.

    Raises:
        RuntimeError: a pass that cannot be repeated has already run.
    """
    for step in PASSES:
        if (only is not None and step.name not in only) or step.name in without or not step.applies(model):
            continue
        if step.name in model.done and not step.repeatable:
            raise RuntimeError(f"the pass {step.name} cannot run twice")
        step.run(model)
        model.done.append(step.name)
    return model.adapted
