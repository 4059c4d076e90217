"""Models without weights: what a recipe starts from, built from configurations alone."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from finetune.config.loader import bundled_recipes, load_recipe
from finetune.config.machine import Machine
from finetune.config.schema import Model as ModelSection
from finetune.config.schema import Precision, Recipe
from finetune.data import latent_cache
from finetune.data.audit.audit import scan
from finetune.data.shape import ImageShape
from finetune.estimate.tracing.fake_inputs import FakeTokenizer
from finetune.models import registry
from finetune.models.pretrained import loading
from finetune.models.scratch import base
from finetune.paths import run_of
from finetune.planning import DataFacts, Plan

STEPS = 2  # the first creates the optimizer's state, the second is like all later ones


def plan_for(recipe: Recipe, precision: Precision, size: tuple[int, int]) -> Plan:
    """A plan with the recipe's numbers, for images of one size (width, height)."""
    facts = DataFacts(images=1, examples=1, held_out=0, buckets=((ImageShape(size[1], size[0]), 1),), digest="")
    machine = Machine(device="cpu", name="traced", processes=1, threads=1, bfloat16=True, memory_bytes=0)
    batch = recipe.train.batch_size * recipe.train.accumulation
    return Plan(recipe, facts, machine, precision, batch, 1.0, STEPS, "", ())


@contextlib.contextmanager
def skeletons(device: torch.device | None = None) -> Iterator[None]:
    """Within, base models are built from configurations, without weights.

    Args:
        device: for real tensors, the device that initializes them, since a CPU takes minutes for billions of values;
            networks then move to host memory, where loaded ones would be.
    """
    with (
        loading.open_pipeline.replaced_by(functools.partial(_pipeline, device=device)),
        loading.open_vae.replaced_by(_vae),
        base.open_model.replaced_by(_first_stage),
        latent_cache.fingerprint.replaced_by(lambda tensors: ""),  # fake values are not cached
    ):
        yield


def _pipeline(
    section: ModelSection,
    class_name: str,
    dtype: torch.dtype,
    own: Mapping[str, torch.dtype] = MappingProxyType({}),
    device: torch.device | None = None,
) -> Any:
    """`loading.open_pipeline` without weights."""
    from finetune.estimate.architecture import configs_of
    from finetune.models.pretrained.single_file import clip_tokenizer

    folder, name = configs_of(section)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {}
    known = registry.variants()
    for key, entry in index.items():
        if (
            not isinstance(entry, list)
            or entry[0] is None
            or key in ("safety_checker", "feature_extractor", "image_encoder")
        ):
            continue
        if entry[0] == "transformers" and "Tokenizer" in entry[1]:
            local = folder / key
            padding = known[name][1].padding.get(key) if name in known else None
            if local.is_dir():
                parts[key] = transformers.AutoTokenizer.from_pretrained(str(local))
            else:
                parts[key] = clip_tokenizer(padding) if padding else FakeTokenizer()
        elif entry[0] == "transformers":
            cls = getattr(transformers, entry[1])
            parts[key] = _net(
                functools.partial(cls, cls.config_class.from_pretrained(str(folder / key))), own.get(key, dtype), device
            )
        elif key == "scheduler":
            cls = getattr(diffusers, entry[1])
            with unset_fake_temporarily():  # it reads its own values, which are few
                parts[key] = cls.from_config(cls.load_config(str(folder / key)))
        else:
            cls = getattr(diffusers, entry[1])
            kept = torch.float32 if key == "vae" else own.get(key, dtype)
            parts[key] = _net(functools.partial(cls.from_config, cls.load_config(str(folder / key))), kept, device)
    if class_name == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if section.vae:
        parts["vae"] = _vae(section.vae)
    return getattr(diffusers, class_name)(**parts)


def _net(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device | None) -> nn.Module:
    # nn.Module.to, because diffusers' own `to` warns about from_pretrained.
    if device is None:
        return nn.Module.to(make(), dtype).eval()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # twenty billion float32 values do not fit most devices
    try:
        with device:
            return nn.Module.to(make(), "cpu", dtype).eval()
    finally:
        torch.set_default_dtype(before)


def _vae(given: str, class_name: str = "") -> Any:
    from finetune.estimate.architecture import vae_config

    return diffusers.AutoencoderKL.from_config(vae_config(given)).eval()


def _first_stage(path: str | Path) -> base.PixelModel:
    """`open_model`; for a bundled recipe that has not run yet, the model that it will make."""
    name = next((name for name in bundled_recipes() if path == run_of(name)), "")
    if not name or Path(path).exists():
        return base.open_model.original(path)
    recipe = load_recipe(name)
    found = registry.build(plan_for(recipe, "float32", (recipe.data.resolution,) * 2), scan(recipe.data))
    assert isinstance(found, base.PixelModel)
    return found
