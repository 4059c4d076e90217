"""A LoRA to go on from, put on the nets: ranks, alphas and layers as its file has them, read by diffusers' own loader."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.initial import KEY, look
from finetune.models.fused import NAME, fuse
from finetune.recipe import Adapter, public_name


def put_on(pipeline: Any, nets: Mapping[str, nn.Module], adapter: Adapter) -> dict[str, list[str]]:
    """Put the LoRA of `adapter.init` on the pipeline's nets, in place; only it trains, in float32. Returns the adapted layers by net.

    Args:
        pipeline: the base.
        nets: those that train, by their names in the pipeline.
        adapter: the recipe's section.

    Raises:
        UserError: it is a LoRA of another base, or of a net that does not train.
    """
    assert adapter.init is not None
    found = look(adapter.init)
    name = public_name(str(found.file))
    try:
        with _silence():
            state = _state_dict(pipeline, str(found.file))
            pipeline.load_lora_weights(str(found.file), adapter_name=NAME)
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise _another_base(name, " ".join(str(error).split())[:160], pipeline) from error
    adapted = {part: _adapted(net) for part, net in pipeline.components.items() if isinstance(net, nn.Module)}
    for part, layers in adapted.items():
        if layers and part not in nets:
            raise UserError(
                f"{name} also adapts the {part}, which this recipe does not train", where=KEY, remedy="set model.train_text_encoder: true"
            )
    if sum(map(len, adapted.values())) < found.layers:
        raise _another_base(name, f"{found.layers - sum(map(len, adapted.values()))} of its {found.layers} layers are not there", pipeline)
    for part, net in nets.items():
        fuse(net)
        _make_trainable(net, {key.removeprefix(f"{part}."): tensor for key, tensor in state.items() if key.startswith(f"{part}.")}, adapter)
    return {part: layers for part, layers in adapted.items() if layers}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Within, the libraries neither log nor warn: what does not fit they would tell layer by layer, and it is told here in one sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _state_dict(pipeline: Any, file: str) -> dict[str, Tensor]:
    """The file's weights under diffusers' names; they are copied once more, since its loader rounds them to the base's dtype."""
    more = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    found = type(pipeline).lora_state_dict(file, **more)
    state: dict[str, Tensor] = found[0] if isinstance(found, tuple) else found
    return state


def _adapted(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, LoraLayer)]


@torch.no_grad()
def _make_trainable(net: nn.Module, state: Mapping[str, Tensor], adapter: Adapter) -> None:
    for module in net.modules():
        if isinstance(module, LoraLayer) and adapter.dropout:
            module.lora_dropout[NAME] = nn.Dropout(adapter.dropout)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            key = name.replace(f".{NAME}", "")
            exact = state.get(key, state.get(f"text_model.{key}", parameter.data))  # of a net or a layer that files call otherwise, as it was loaded
            parameter.data = (exact if exact.shape == parameter.shape else parameter.data).to(parameter.device, torch.float32).clone()


def _another_base(name: str, detail: str, pipeline: Any) -> UserError:
    return UserError(
        f"{name} does not fit this {type(pipeline).__name__.removesuffix('Pipeline')}; it is a LoRA of another base: {detail}",
        where=KEY,
        remedy="give a LoRA of this base in adapter.init, or its base in model.path and model.family",
    )
