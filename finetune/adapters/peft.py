"""Add adapters to networks through PEFT, and save and load them.

A LoRA is saved in diffusers' file format. LoHa, LoKr and OFT have no such format: they are saved as one PEFT folder per
network, `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` reads.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from finetune.adapters.kinds import Layer, Scales, kind_of
from finetune.adapters.lora_file import PEFT_CONFIG, PEFT_FILE
from finetune.config.schema import Adapter
from finetune.errors import UserError, did_you_mean
from finetune.kernels import ADAPTER_NAME
from finetune.models.registry import specs

# Ends of layer names that most denoisers of diffusers and CLIP text encoders of transformers have, as regular
# expressions. What only one family has is in its record (`FamilySpec.lora_targets`).
ATTENTION = ("to_[qkv]", r"to_out(\.0)?", "add_[qkv]_proj", "to_add_out")
MLP = (r"(ff|ff_context)\.net\.(0\.proj|2)",)
CLIP_ATTENTION, CLIP_MLP = ("[qkv]_proj", "out_proj"), (r"mlp\.fc[12]",)
ADAPTED = (nn.Linear, nn.Conv2d)
PEFT_PREFIX = "base_model.model."  # of names in PEFT's own files


def layers(net: nn.Module, targets: str) -> list[str]:
    """Names of the layers of `net` that `targets` selects, in the network's order.

    Args:
        targets: attention, attention+mlp, all-linear, or comma-separated ends of layer names (such as
            `to_q, mid_block.*conv1`).

    Raises:
        UserError: nothing matches (with the nearest name), or an end is not a regular expression.
    """
    adaptable = {name: module for name, module in net.named_modules() if isinstance(module, ADAPTED)}
    if targets == "all-linear":
        found = [name for name, module in adaptable.items() if isinstance(module, nn.Linear)]
    else:
        named = target_patterns(type(net).__name__)
        ends = named.get(targets) or tuple(end.strip() for end in targets.split(","))
        found = [name for name in adaptable if any(_ends(name, end, "adapter.targets") for end in ends)]
    if not found:
        raise _no_match(
            f"no layer of {type(net).__name__}",
            targets,
            "adapter.targets",
            adaptable,
            ("attention", "attention+mlp", "all-linear"),
        )
    return found


def target_patterns(class_name: str) -> dict[str, tuple[str, ...]]:
    """What `adapter.targets: attention` and `attention+mlp` mean for a network's class.

    A class that is no family's denoiser (text encoders) gets the patterns of all families and of CLIP.
    """
    known = [spec for spec in specs().values() if spec.denoiser_class]
    of_class = [spec for spec in known if spec.denoiser_class == class_name]
    attention, mlp = (
        common
        + (() if of_class else clip)
        + tuple(end for spec in of_class or known for end in spec.lora_targets.get(key, ()))
        for key, common, clip in (("attention", ATTENTION, CLIP_ATTENTION), ("mlp", MLP, CLIP_MLP))
    )
    return {"attention": attention, "attention+mlp": attention + mlp}


def _ends(name: str, end: str, where: str) -> bool:
    """Whether a layer's name ends with the pattern, as PEFT matches the keys of its patterns (`get_pattern_key`)."""
    try:
        return re.match(rf"(.*\.)?({end})$", name) is not None
    except re.error as error:
        raise UserError(
            f'"{end}" is not a regular expression: {error}',
            where=where,
            remedy="give the end of a layer's name, such as to_q",
        ) from error


def _no_match(what: str, given: str, where: str, names: Iterable[str], besides: Iterable[str] = ()) -> UserError:
    ends = {name.rpartition(".")[2] for name in names} | set(besides)
    return UserError(f'{what} matches "{given}"', where=where, remedy=did_you_mean(given, ends))


def add_adapter(net: Any, adapter: Adapter) -> list[str]:
    """Add adapters to `net` in place and make only them trainable. Returns the adapted layers.

    They are float32 whatever the base's dtype: gradients of float16 weights cannot be unscaled, and bfloat16 rounds
    small updates away.

    Raises:
        UserError: nothing matches, a layer is too narrow for its rank, or the kind does not exist for a layer.
    """
    names = layers(net, adapter.targets)
    kind = kind_of(adapter)
    for name in names:
        rank = next((rank for end, rank in adapter.rank_pattern.items() if _ends(name, end, "")), adapter.rank)
        kind.check_layer(_layer(name, net.get_submodule(name)), adapter, rank)
    config = kind.config(adapter, _scales(adapter, names))
    if hasattr(net, "add_adapter"):
        net.add_adapter(config)
    else:
        inject_adapter_in_model(config, net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(f".{kind.parameters}" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if adapter.pissa:
        # PiSSA decomposes W = W′ + B₀ A₀ and changes the base to W′. Users of the file have W, so the file
        # needs B₀ A₀ too.
        net.pissa_start = {name: tensor.clone() for name, tensor in _weights(net).items()}
    return names


@contextlib.contextmanager
def switched_off(net: nn.Module) -> Iterator[None]:
    """Disable the adapters of `net` in this context. (PEFT's `enable_adapters` also changes which weights train.)"""
    tuned = [module for module in net.modules() if isinstance(module, BaseTunerLayer)]
    for layer in tuned:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in tuned:
            layer._disable_adapters = False


def check_patterns(adapter: Adapter, names: list[str]) -> None:
    """Raise if a pattern matches none of the adapted layers, `names` of all networks."""
    for key in ("rank_pattern", "alpha_pattern"):
        for end in getattr(adapter, key):
            if not any(_ends(name, end, f"adapter.{key}") for name in names):
                raise _no_match("no adapted layer", end, f"adapter.{key}", names)


def _scales(adapter: Adapter, names: list[str]) -> Scales:
    """Ranks and alphas for PEFT. Without an alpha in the recipe, the scale is 1 at every rank."""
    ranks = _matching(names, adapter.rank_pattern, "rank")
    alphas = _matching(names, adapter.alpha_pattern, "alpha")
    if adapter.alpha is None:
        alphas |= {end: rank for end, rank in ranks.items() if end not in alphas}
    return Scales(names, adapter.rank, adapter.alpha if adapter.alpha is not None else adapter.rank, ranks, alphas)


def _matching(names: list[str], pattern: Mapping[str, float], key: str) -> dict[str, Any]:
    """The part of a pattern that matches these layers: PEFT warns about the rest."""
    return {
        end: value
        for end, value in pattern.items()
        if any(_ends(name, end, f"adapter.{key}_pattern") for name in names)
    }


def _layer(name: str, layer: Any) -> Layer:
    if isinstance(layer, nn.Conv2d):
        return Layer(name, layer.in_channels, layer.out_channels, tuple(layer.kernel_size))
    return Layer(name, layer.in_features, layer.out_features)


def named_as_in_files(net: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prefix a CLIP text encoder's weights with `text_model.`.

    transformers 5 dropped it, but programs that read files expect it.
    """
    prefix = "text_model." if isinstance(net, CLIPTextModel) and not hasattr(net, "text_model") else ""
    return {prefix + name: tensor for name, tensor in weights.items()}


def _weights(net: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights under PEFT's names, as contiguous float32 on the CPU."""
    return {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in get_peft_model_state_dict(net).items()
    }


def lora_weights(net: Any) -> dict[str, Tensor]:
    """A LoRA's weights under PEFT's names, as contiguous float32 on the CPU, relative to the original base.

    diffusers' older names are not used: they exist for some layers only, and of a file with both, diffusers reads one
    kind. After PiSSA, the change is B A − B₀ A₀ = [B, −B₀] [A; A₀], of twice the rank.
    """
    found = _weights(net)
    for name, start in getattr(net, "pissa_start", {}).items():
        parts = (found[name], start) if ".lora_A." in name else (found[name], -start)
        found[name] = torch.cat(parts, 0 if ".lora_A." in name else 1).contiguous()
    return named_as_in_files(net, found)


def lora_configuration(net: Any) -> dict[str, Any]:
    """PEFT's configuration as plain values. Without alpha, rank, rsLoRA and DoRA in the file, images would be wrong.

    Dropout is left out: diffusers puts loaded adapters in training mode, and every image would differ.
    """
    found: dict[str, Any] = net.peft_config[ADAPTER_NAME].to_dict()
    if hasattr(net, "pissa_start"):  # twice the rank at the same scale, alpha / rank or alpha / √rank
        times = math.sqrt(2) if found["use_rslora"] else 2
        found |= {"r": 2 * found["r"], "lora_alpha": times * found["lora_alpha"], "init_lora_weights": True}
        found["rank_pattern"] = {end: 2 * rank for end, rank in found["rank_pattern"].items()}
        found["alpha_pattern"] = {end: times * alpha for end, alpha in found["alpha_pattern"].items()}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()} | {
        "lora_dropout": 0.0
    }


def saved_as_folders(pipeline: Any, adapter: Adapter) -> bool:
    """Whether an adapter is saved as PEFT's folders: kinds other than LoRA, and pipelines that load no LoRA file."""
    return not kind_of(adapter).has_lora_file or not hasattr(pipeline, "save_lora_weights")


def save_peft(net: Any, folder: Path) -> Path:
    """Write the adapter as PEFT's folder; returns the file with its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(net.peft_config[ADAPTER_NAME])
    config.inference_mode = True
    config.save_pretrained(folder)
    file = folder / PEFT_FILE
    save_file({f"{PEFT_PREFIX}{name}": tensor for name, tensor in _weights(net).items()}, file, {"format": "pt"})
    return file


def read_peft(file: Path, net: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_peft` wrote: weights (`unet.….lora_A.weight`) and PEFT's settings (`unet.r`, …)."""
    config: dict[str, Any] = json.loads(file.with_name(PEFT_CONFIG).read_text(encoding="utf-8"))
    tensors = {f"{net}.{name.removeprefix(PEFT_PREFIX)}": tensor for name, tensor in load_file(file).items()}
    return tensors, {f"{net}.{key}": value for key, value in config.items()}


def load(pipeline: Any, folder: Path) -> dict[str, PeftModel]:
    """Load a run's adapter from `folder` into a pipeline of its base.

    Returns the networks that PEFT wrapped: none for a LoRA.
    """
    saved = sorted(folder.glob(f"*/{PEFT_CONFIG}"))
    if not saved:
        pipeline.load_lora_weights(str(folder))
    return {
        path.parent.name: PeftModel.from_pretrained(getattr(pipeline, path.parent.name), path.parent) for path in saved
    }
