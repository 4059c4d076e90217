"""Forecast of a run: memory, hours and cost of a recipe on a GPU, and the memory options that make it fit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import combinations
from typing import Any, final

from finetune.config import training_length
from finetune.config.loader import error_location
from finetune.config.memory_options import PER_TENSOR, TILE
from finetune.config.schema import Recipe
from finetune.data.audit.index import held_out_of
from finetune.errors import UserError
from finetune.estimate import profiles
from finetune.estimate.architecture import configs_of
from finetune.estimate.constants import GIB, PACE
from finetune.estimate.hardware.gpus import Gpu
from finetune.estimate.hardware.parallelism import ALONE, Group
from finetune.estimate.memory import Memory, memory
from finetune.estimate.profiles import Profile, Variant
from finetune.estimate.step_time import Speed, speed
from finetune.models.registry import has_unet
from finetune.planning import step_arithmetic

MOST_OPTIONS = 3  # memory options that are proposed together
MOST_IMAGES = 100_000_000


@final
@dataclass(frozen=True)
class MemoryOption:
    """An edit of a recipe that saves memory.

    Attributes:
        key, value: the edit.
        cost: what it costs besides time.
        also: further edits that it requires.
    """

    key: str
    value: Any
    cost: str
    also: tuple[tuple[str, Any], ...] = ()

    @property
    def words(self) -> str:
        """The edit as a recipe writes it: `key: value`."""
        value = "null" if self.value is None else self.value
        return f"{self.key}: {str(value).lower() if isinstance(value, bool) else value}"


@final
@dataclass(frozen=True)
class Forecast:
    """A recipe on a GPU.

    Attributes:
        group: number of GPUs and how they share the work; every figure except `usd` is per GPU.
        edits: memory options applied to the recipe as given.
        images: images in the dataset.
        steps: optimizer steps.
        hours: training, sampling and encoding; downloads excluded.
        usd: (lowest, highest) cost; None if the GPU has no price.
        limit: bytes of GPU memory.
    """

    recipe: Recipe
    name: str
    profile: Profile
    variant: Variant
    gpu: Gpu
    group: Group
    edits: tuple[MemoryOption, ...]
    images: int
    memory: Memory
    speed: Speed
    steps: int
    arithmetic: str
    hours: float
    usd: tuple[float, float] | None
    limit: int

    @property
    def fits(self) -> bool:
        """Whether the peak over all phases is within the GPU's memory."""
        return self.memory.peak <= self.limit


def forecast(
    recipe: Recipe,
    name: str,
    gpu: Gpu,
    images: int,
    edits: tuple[MemoryOption, ...] = (),
    group: Group = ALONE,
    traced: Profile | None = None,
) -> Forecast:
    """Forecast `recipe` on `gpu` for `images` images.

    Args:
        edits: memory options already applied to `recipe`.
        group: the GPUs that train together, each on its own batches.
        traced: a profile of exactly this configuration, to use instead of its architecture's.

    Raises:
        UserError: no cost profile covers the recipe, or `images` is out of range.
    """
    if not 1 <= images <= MOST_IMAGES:
        raise UserError(
            f"--images must be between 1 and {MOST_IMAGES:,}, got {images:,}",
            where="--images",
            remedy="give the number of images in the dataset",
        )
    profile, variant = (traced, traced.variants[0]) if traced else _profile_and_variant(recipe, gpu)
    found = memory(profile, variant, recipe, gpu, group)
    pace = speed(profile, variant, recipe, gpu, group)
    gpus = group.count
    train = recipe.train
    batch = train.batch_size * train.accumulation * gpus
    trained = images - held_out_of(recipe.data.held_out, images)
    length = training_length.Facts(trained, batch, training_length.share(recipe, trained * _repeats(recipe)))
    resolved, steps, _ = training_length.resolve(recipe, length, trained / batch)
    arithmetic = step_arithmetic(trained, trained, train, steps, gpus, "GPUs")
    hours = (steps * pace.seconds + _outside(resolved, profile, gpu, images, steps)) / 3600
    usd = (gpus * hours * gpu.price.low, gpus * hours * gpu.price.high) if gpu.price else None
    limit = int(gpu.visible_gib * GIB)
    return Forecast(
        recipe, name, profile, variant, gpu, group, edits, images, found, pace, steps, arithmetic, hours, usd, limit
    )


def _repeats(recipe: Recipe) -> int:
    """Of the only source; 1 with several, whose numbers of images are unknown."""
    return recipe.data.sources[0].repeats if len(recipe.data.sources) == 1 else 1


def _profile_and_variant(recipe: Recipe, gpu: Gpu) -> tuple[Profile, Variant]:
    with error_location(recipe):
        if recipe.method == "scratch":
            profile = profiles.profile_of_build(recipe)
        else:
            name = configs_of(recipe.model)[1]
            profile = profiles.load(name) if name in profiles.known() else None
        if profile is None:
            known = ", ".join(profiles.known())
            raise UserError(
                "no cost profile covers this model",
                where="model.family",
                remedy=f"add --trace; profiles exist for {known}",
            )
        return profile, profiles.variant_of(profile, recipe, gpu.device)


def _outside(recipe: Recipe, profile: Profile, gpu: Gpu, images: int, steps: int) -> float:
    """Seconds to encode every image once, in float32, and to generate the samples during training."""
    area, out = (recipe.data.resolution / profile.resolution) ** 2, profile.outside[gpu.device]
    rate = gpu.calibration.conv.rate if gpu.calibration else gpu.tflops * 1e12 * PACE.conv
    encoding = rate if gpu.calibration else rate * PACE.float32
    grids = steps // recipe.sample.every + 2 if recipe.sample.every else 0
    prompts = len(recipe.sample.prompts)
    if not prompts and recipe.method != "scratch" and "sample.prompts" not in recipe.lines:
        prompts = training_length.PROMPTS  # captions
    sampling = grids * prompts * recipe.sample.steps * out.sample_flops
    return area * (images * out.encode_flops / encoding + sampling / rate)


def memory_options(recipe: Recipe) -> list[MemoryOption]:
    """The memory options that the recipe does not use yet."""
    train, found = recipe.train, []
    if not train.gradient_checkpointing:
        found.append(MemoryOption("train.gradient_checkpointing", True, "the same result"))
    if train.batch_size > 1:
        found.append(
            MemoryOption("train.batch_size", 1, f"train.accumulation × {train.batch_size} keeps the result the same")
        )
    elif train.accumulation > 1 and recipe.method == "full":
        found.append(MemoryOption("train.accumulation", 1, "each step sees one batch only, so gradients are noisier"))
    if recipe.optimizer.name == "adamw" and recipe.method != "scratch":
        found.append(
            MemoryOption("optimizer.name", "adamw8bit", "rounds the optimizer state, which rarely shows in the result")
        )
    if recipe.optimizer.name == "adamw8bit" and not recipe.optimizer.paged:
        found.append(MemoryOption("optimizer.paged", True, "slow while GPU memory is full"))
    if (
        recipe.optimizer.name in ("adamw", "adamw8bit") and recipe.method == "full"
    ):  # the learning rates of other optimizers would not suit it
        found.append(MemoryOption("optimizer.name", "adafactor", "less stable than AdamW"))
    if train.ema:
        found.append(MemoryOption("train.ema", None, "samples vary more from step to step"))
    found += _of_weights(recipe)
    if recipe.adapter and recipe.adapter.rank > 4:
        found.append(MemoryOption("adapter.rank", 4, "less adapter capacity"))
    smaller = int(recipe.data.resolution * 0.75) // 64 * 64
    if smaller >= 256:
        found.append(MemoryOption("data.resolution", smaller, "less detail than the base model was trained for"))
    return found


def _of_weights(recipe: Recipe) -> list[MemoryOption]:
    """The options that shrink weights or gradients, or move them to host memory."""
    model, train, optimizer, found = recipe.model, recipe.train, recipe.optimizer, list[MemoryOption]()
    if recipe.method == "lora":
        if model.quantize is None:
            found.append(
                MemoryOption(
                    "model.quantize", "nf4", "trains on the base model rounded to 4 bits; samples use full weights"
                )
            )
        if not train.offload_blocks and not has_unet(model.family):
            also = (("train.gradient_checkpointing", True),) if train.checkpointed != 1 else ()
            found.append(MemoryOption("train.offload_blocks", True, "the same result; needs host memory", also))
    elif recipe.method == "full" and optimizer.name in PER_TENSOR:
        if train.weights == "float32" and train.precision in (None, "bfloat16"):
            found.append(MemoryOption("train.weights", "bfloat16", "stochastic rounding: unbiased, slightly noisier"))
        if not train.fused_backward and train.precision != "float16":
            clip = (("optimizer.clip", "tensor"),) if optimizer.clip_norm and optimizer.clip == "global" else ()
            single = (("train.accumulation", 1),) if train.accumulation > 1 else ()
            cost = "each step is noisier" if single else "clips each gradient by itself" if clip else "the same result"
            found.append(MemoryOption("train.fused_backward", True, cost, (*clip, *single)))
    if recipe.method != "scratch" and not model.train_text_encoder and model.text_encoder_placement == "device":
        found.append(
            MemoryOption("model.text_encoder_placement", "offload", "the same result; captions are encoded more slowly")
        )
    if not model.vae_tiling and recipe.data.resolution > TILE:
        found.append(MemoryOption("model.vae_tiling", True, "barely visible seams between tiles"))
    return found


def apply_options(recipe: Recipe, edits: tuple[MemoryOption, ...]) -> Recipe:
    """Apply memory options to a recipe. Accumulation makes up for a smaller batch."""
    for option in edits:
        if option.key == "train.batch_size":
            train = recipe.train
            recipe = _set(recipe, "train.accumulation", train.accumulation * train.batch_size // option.value)
        for key, value in ((option.key, option.value), *option.also):
            recipe = _set(recipe, key, value)
    return recipe


def _set(recipe: Recipe, key: str, value: Any) -> Recipe:
    section, _, name = key.partition(".")
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **{name: value})})


def fitting(first: Forecast) -> list[Forecast]:
    """Forecasts that fit, fastest first: with one more memory option, else with two, else with three.

    Empty if none fits, or if the forecast comes from a trace.
    """
    known = covered_options(first) if len(first.profile.variants) > 1 else []
    for count in range(1, MOST_OPTIONS + 1):
        tried = [edits for edits in combinations(known, count) if len({option.key for option in edits}) == count]
        if fit := [edits for edits in tried if (peak := _peak_with(first, edits)) is not None and peak <= first.limit]:
            found = [
                forecast(
                    apply_options(first.recipe, edits),
                    first.name,
                    first.gpu,
                    first.images,
                    (*first.edits, *edits),
                    first.group,
                )
                for edits in fit
            ]
            return sorted(
                found, key=lambda one: (any(option.key == "data.resolution" for option in one.edits), one.hours)
            )
    return []


def covered_options(first: Forecast) -> list[MemoryOption]:
    """The memory options of a run that its cost profile covers."""
    return [option for option in memory_options(first.recipe) if _peak_with(first, (option,)) is not None]


def exhausted(first: Forecast) -> bool:
    """Whether a run exceeds its GPU's memory even with every memory option, all of which its cost profile covers."""
    recipe, options = first.recipe, memory_options(first.recipe)
    while options:  # one option may make another possible: 8-bit AdamW can be paged
        recipe = apply_options(recipe, tuple({option.key: option for option in options}.values()))
        options = [option for option in memory_options(recipe) if option.key != "data.resolution"]
    try:
        variant = profiles.variant_of(first.profile, recipe, first.gpu.device)
    except UserError:
        return False
    peak = memory(first.profile, variant, recipe, first.gpu, first.group).peak
    return len(covered_options(first)) == len(memory_options(first.recipe)) and peak > first.limit


def _peak_with(first: Forecast, edits: tuple[MemoryOption, ...]) -> int | None:
    """Peak bytes with these options; None if the cost profile does not cover them."""
    recipe = apply_options(first.recipe, edits)
    try:
        variant = profiles.variant_of(first.profile, recipe, first.gpu.device)
    except UserError:
        return None
    return memory(first.profile, variant, recipe, first.gpu, first.group).peak
