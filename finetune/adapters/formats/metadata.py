"""Metadata in the header of a LoRA file, for programs that list, filter and check such files.

`ss_…` are the keys of kohya-ss/sd-scripts (train_network.py), which A1111 and model managers show; `sshs_model_hash`
is its hash (library/train_util.py, precalculate_safetensors_hashes); `modelspec.…` follow ModelSpec 1.0.1
(https://github.com/Stability-AI/ModelSpec; the names of architectures as sd-scripts' and musubi-tuner's
sai_model_spec.py have them). Diffusers' own entry, `lora_adapter_metadata`, is left as it is. No paths of this
machine are written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from finetune.adapters.formats.safetensors_io import hashes, read
from finetune.adapters.kinds import kind_of
from finetune.adapters.lora_file import LORA_FILE, PEFT_FILE
from finetune.adapters.peft import read_peft
from finetune.config.schema import Recipe, trigger_words
from finetune.models.registry import spec_of, text_widths
from finetune.models.spec import ModelSpec
from finetune.paths import public_name
from finetune.planning import Plan

PEFT = "lora_adapter_metadata"  # diffusers' entry: PEFT's configuration of each net, in JSON


def stamp(folder: Path, plan: Plan, steps: int) -> None:
    """Write the metadata into the LoRA file in `folder`, or into PEFT's files, if there are any.

    Args:
        plan: the run's plan.
        steps: steps trained.
    """
    adapter = plan.recipe.adapter
    if adapter is None or not kind_of(adapter).has_lora_file:
        return
    for path in (folder / LORA_FILE, *folder.glob(f"*/{PEFT_FILE}")):
        if path.is_file():
            tensors, metadata = read(path)
            settings = settings_of(metadata) if path.name == LORA_FILE else read_peft(path, path.parent.name)[1]
            found = metadata | describe(plan.recipe, tensors, settings) | trained(plan, steps)
            save_file(tensors, path, found | hashes(tensors))


def settings_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration of each network, with keys such as `unet.r`."""
    found: dict[str, Any] = json.loads(metadata.get(PEFT, "{}"))
    return found


def describe(recipe: Recipe, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, str]:
    """Describe the LoRA: base, architecture, rank, alpha, resolution, trigger words. Unknown entries are left out.

    Args:
        tensors: under PEFT's names, before any conversion.
        settings: PEFT's.
    """
    base = _modelspec(recipe, tensors)
    ranks, nets = (
        [int(value) for key, value in settings.items() if key.endswith(".r")],
        {key.partition(".")[0] for key in settings},
    )
    words, size = trigger_words(recipe), recipe.data.resolution
    found = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)) if ranks else "",
        "ss_network_alpha": f"{max(folded_alpha(settings, net) for net in nets):g}" if ranks else "",
        "ss_base_model_version": base.base,
        "ss_v2": str(base.base.startswith("sd_v2")) if base.base else "",
        "ss_sd_model_name": public_name(recipe.model.transformer or recipe.model.path or ""),
        "ss_resolution": str((size, size)),
        "ss_output_name": recipe.name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.architecture}/lora" if base.architecture else "",
        "modelspec.implementation": base.implementation,
        "modelspec.title": recipe.name,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.trigger_phrase": ", ".join(words),
        "modelspec.usage_hint": f"Trigger words: {', '.join(words)}" if words else "",
    }
    return {key: value for key, value in found.items() if value}


def trained(plan: Plan, steps: int) -> dict[str, str]:
    """Describe the training: numbers under sd-scripts' keys, and ModelSpec's description."""
    recipe, data = plan.recipe, plan.data
    train, optimizer = recipe.train, recipe.optimizer
    mixed = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}[plan.precision]
    found: dict[str, Any] = {
        "ss_num_train_images": data.examples,
        "ss_num_batches_per_epoch": math.ceil(plan.steps_per_epoch * train.accumulation),
        "ss_num_epochs": math.ceil(steps / plan.steps_per_epoch),
        "ss_steps": steps,
        "ss_max_train_steps": plan.steps,
        "ss_batch_size_per_device": train.batch_size,
        "ss_gradient_accumulation_steps": train.accumulation,
        "ss_gradient_checkpointing": bool(train.gradient_checkpointing),
        "ss_learning_rate": optimizer.lr,
        "ss_lr_scheduler": optimizer.schedule,
        "ss_lr_warmup_steps": optimizer.warmup_steps,
        "ss_optimizer": optimizer.name,
        "ss_max_grad_norm": optimizer.clip_norm,
        "ss_mixed_precision": mixed,
        "ss_seed": train.seed,
        "ss_cache_latents": True,
        "ss_caption_dropout_rate": recipe.data.caption_dropout,
    }
    if recipe.diffusion is not None:
        found |= {"ss_min_snr_gamma": recipe.diffusion.min_snr_gamma, "ss_noise_offset": recipe.diffusion.noise_offset}
    return {key: str(value) for key, value in found.items()} | {
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.description": summary(plan, steps),
    }


def summary(plan: Plan, steps: int) -> str:
    """Describe the training in one sentence."""
    recipe, images = plan.recipe, f"{plan.data.images} image" + ("s" if plan.data.images > 1 else "")
    return (
        f"Trained by ft on {images}, {steps} steps of {plan.global_batch} at about "
        f"{recipe.data.resolution}×{recipe.data.resolution}"
        f" pixels, {recipe.optimizer.name} at a rate of {recipe.optimizer.lr:g}"
    )


def folded_alpha(settings: Mapping[str, Any], net: str, path: str = "", rank: int | None = None) -> float:
    """The alpha whose quotient by the rank is the trained scale: for rsLoRA, alpha · √rank.

    Args:
        path, rank: of a layer, which may match an alpha pattern; without them, the default.
    """
    own = settings.get(f"{net}.alpha_pattern") or {}
    alpha = float(next((own[end] for end in own if re.match(rf"(.*\.)?({end})$", path)), settings[f"{net}.lora_alpha"]))
    rank = rank or int(settings[f"{net}.r"])
    return alpha * math.sqrt(rank) if settings.get(f"{net}.use_rslora") else alpha


def _modelspec(recipe: Recipe, tensors: Mapping[str, Tensor]) -> ModelSpec:
    """The record's names of the base.

    The width of the text conditions tells Stable Diffusion 1.5 and 2.1 apart, if an adapted
    layer reads them.
    """
    known = spec_of(recipe.model.family).modelspec
    if "" in known:
        return known[""]
    widths = _widths((name, tensor.shape) for name, tensor in tensors.items())
    variant = text_widths().get(next(iter(widths), 0), "")
    velocity = f"{variant}-v" if recipe.model.prediction != "epsilon" else ""
    return known.get(velocity) or known.get(variant) or ModelSpec("", "", "")


def _widths(shapes: Iterable[tuple[str, Iterable[int]]]) -> set[int]:
    ends = (".attn2.to_k.lora_A.weight", ".attn2.to_v.lora_A.weight")
    return {list(shape)[1] for name, shape in shapes if name.endswith(ends)}
