"""Write a whole pipeline with an adapter merged into its weights: W + scale · B A, or what its kind computes from W."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from finetune.adapters import peft
from finetune.adapters.formats.safetensors_io import copy_folder, remove_local_paths
from finetune.config.schema import Recipe
from finetune.models.pretrained import textual_inversion
from finetune.models.pretrained.loading import open_pipeline
from finetune.models.pretrained.model import set_schedule
from finetune.models.registry import spec_of


def write_merged(final: Path, recipe: Recipe, dtype: str | None, target: Path) -> None:
    """Write the recipe's base with the adapter in `final` merged, and the noise schedule it was trained with.

    Merging is done in float32 and cast afterwards, so the sum is rounded once. The caller removes what lies beside
    `target`.

    Raises:
        UserError: the base is missing, or a weight is too large for `dtype`.
    """
    pipeline: Any = open_pipeline(recipe.model, spec_of(recipe.model.family).pipeline, torch.float32)
    set_schedule(pipeline, recipe)
    wrapped = peft.load(pipeline, final)
    for name, net in wrapped.items():
        setattr(pipeline, name, net.merge_and_unload(safe_merge=True))
    if not wrapped:
        pipeline.fuse_lora(
            components=[name for name in pipeline._lora_loadable_modules if hasattr(pipeline, name)], safe_fusing=True
        )
        pipeline.unload_lora_weights()
    textual_inversion.load(pipeline, final, recipe)
    if dtype is None:
        pipeline.save_pretrained(target)
        remove_local_paths(target)
        return
    # Not pipeline.to(dtype): transformers would write the dtype into the text encoder's configuration and load it so,
    # while diffusers loads the UNet in float32, and the two would not match.
    whole = target.with_name("float32")
    pipeline.save_pretrained(whole)
    copy_folder(whole, dtype, target)
