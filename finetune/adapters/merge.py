"""An adapter's whole pipeline, with W + scale · B A, or what else its kind makes of W, in place of W."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from finetune.adapters import peft
from finetune.adapters.formats.safetensors_io import copy_folder, forget_places
from finetune.config.schema import Recipe
from finetune.models.pretrained import textual_inversion
from finetune.models.pretrained.loading import open_pipeline
from finetune.models.pretrained.model import set_schedule
from finetune.models.registry import spec_of


def write_merged(final: Path, recipe: Recipe, dtype: str | None, target: Path) -> None:
    """Write the recipe's base with the adapter in `final` added to its weights, and the schedule it was trained with.

    Added in float32, cast after: the sum is rounded once. What lies beside `target` is the caller's to clear away.

    Raises:
        UserError: the base is gone; or a weight does not fit in `dtype`.
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
        forget_places(target)
        return
    # Not pipeline.to(dtype): transformers writes that into the text encoder's configuration and opens it so, diffusers opens
    # the UNet beside it in float32, and the two do not fit.
    whole = target.with_name("float32")
    pipeline.save_pretrained(whole)
    copy_folder(whole, dtype, target)
