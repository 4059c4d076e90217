"""GPU memory of a run by part and by phase, from a cost profile. All figures are bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from finetune.config.memory_options import QUANTIZED, TILE
from finetune.config.schema import Recipe
from finetune.estimate.constants import CONTEXT, WORKSPACE, WORKSPACE_HOPPER
from finetune.estimate.hardware.gpus import Gpu
from finetune.estimate.hardware.parallelism import ALONE, Group
from finetune.estimate.profiles import Outside, Profile, Variant
from finetune.models.registry import has_unet

HOPPER = ("h100", "h200", "gh200")


@final
@dataclass(frozen=True)
class Memory:
    """Peak memory of one process.

    Attributes:
        parts: the training phase by kind of memory; they add up to its peak.
        phases: the peak of each phase, each with the CUDA context and cuBLAS's workspace.
    """

    parts: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Peak bytes over all phases."""
        return max(self.phases.values())

    @property
    def largest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def memory(profile: Profile, variant: Variant, recipe: Recipe, gpu: Gpu, group: Group = ALONE) -> Memory:
    """Peak memory of `recipe` on one GPU of `group`: what PyTorch reserves (fragmentation included), context and
    workspace.

    DistributedDataParallel keeps a second copy of every gradient in buckets (`gradient_as_bucket_view` is off in
    Accelerate). A CPU has no caching allocator, so there it is what is allocated, and the VAE stays in memory.
    """
    on_cpu, out = gpu.device == "cpu", profile.outside[gpu.device]
    area = (recipe.data.resolution / profile.resolution) ** 2
    load = area * recipe.train.batch_size
    higher = (recipe.adapter.rank - variant.rank) if recipe.adapter else 0
    grown = recipe.adapter.rank / variant.rank if recipe.adapter else 1.0
    adapters, trained = variant.adapters * grown, variant.trained * grown
    state = state_bytes(profile, recipe, variant) * grown
    lines = variant.accumulating if recipe.train.accumulation > 1 else (variant.allocated, variant.reserved)
    more = variant.rank_bytes * higher + state - variant.state * grown
    allocated, reserved = (line[0] + line[1] * load + more for line in lines)
    width = 2 if recipe.train.weights == "bfloat16" else 4
    # A fused step holds one gradient at a time, which counts as an activation here.
    gradients = (
        0.0 if recipe.train.fused_backward else min(width * trained, allocated - variant.weights - adapters - state)
    )
    share = group.share
    parts = {
        "weights": variant.weights * share,
        "adapters" if recipe.adapter else "trained weights": adapters * share,
        "gradients": gradients * share,
        f"optimizer ({recipe.optimizer.name})": state * share,
        "averages": 4 * trained * share if recipe.train.ema else 0.0,
        "gradient buckets": 4 * trained if group.count > 1 and not group.sharded else 0.0,
        "gathered weights": group.gathered(profile),
        "activations": allocated - variant.weights - adapters - state - gradients - group.spared(recipe, trained),
        "fragmentation": 0.0 if on_cpu else reserved - allocated,
        "VAE": out.sample[0] if on_cpu else 0.0,
        **around(gpu),
    }
    there = sum(around(gpu).values())
    kept = sum(parts[name] for name in (*list(parts)[:2], f"optimizer ({recipe.optimizer.name})", "averages"))
    encoding, vae = out.encode[0] - spared_by_encoders(profile, recipe, on_cpu), tiled(area, profile, recipe, out)
    phases = {
        "encode": encoding + out.encode[1] * vae + there,
        "train": sum(parts.values()),
        "sample": kept + out.sample[0] + out.sample[1] * vae + there,
        "save": kept + there,
    }
    return Memory(
        {name: round(value) for name, value in parts.items() if value},
        {name: round(value) for name, value in phases.items()},
    )


def spared_by_encoders(profile: Profile, recipe: Recipe, on_cpu: bool) -> float:
    """Bytes that the text encoders need less than in the measurement, which had them whole in 16 bits (32 on a CPU).

    In full fine-tuning, CLIP text encoders have the dtype of the trained weights, trained or not.
    """
    kind, of = recipe.model.text_encoder_placement, profile.parameters
    there, measured = float(of.get("text encoders", 0)), 4 if on_cpu else 2
    width = (
        4
        if on_cpu or (recipe.method == "full" and has_unet(profile.family) and recipe.train.weights == "float32")
        else 2
    )
    held = width * there
    if profile.outside["cpu" if on_cpu else "cuda"].encoders == kind:
        return measured * there - held if kind == "device" else 0.0
    if kind == "offload":
        held -= width * (of.get("text encoders' blocks", 0) - of.get("text encoders' largest block", 0))
    elif kind != "device":
        held -= (width - QUANTIZED[kind]) * of.get("text encoders' quantizable", 0)
    return measured * there - held


def tiled(area: float, profile: Profile, recipe: Recipe, out: Outside) -> float:
    """The area that the VAE processes at once, in native images."""
    return min(area, (TILE / profile.resolution) ** 2) if recipe.model.vae_tiling and not out.tiled else area


def around(gpu: Gpu) -> dict[str, float]:
    """Memory independent of the model: the CUDA context and cuBLAS's workspace; on a CPU, Python and its libraries."""
    if gpu.calibration:
        return {"Python, PyTorch": gpu.calibration.held}
    return {"cuBLAS workspace": WORKSPACE_HOPPER if gpu.model in HOPPER else WORKSPACE, "CUDA context": CONTEXT}


def state_bytes(profile: Profile, recipe: Recipe, variant: Variant) -> float:
    """Bytes of optimizer state, at the rank of the measurement."""
    name = recipe.optimizer.name
    paged = 2.0 * variant.trained  # the two moments of 8-bit AdamW; their scales are not paged
    if variant.settings["optimizer.name"] == name:
        return float(variant.state - paged * (recipe.optimizer.paged - variant.settings.get("optimizer.paged", False)))
    factored = next(
        (
            one
            for one in profile.variants
            if (one.device, one.settings["method"], one.settings["optimizer.name"])
            == (variant.device, recipe.method, "adafactor")
        ),
        None,
    )
    # Matrices of an adapter of rank r have about one row or column per r weights; for full networks, use Adafactor's
    # measurement.
    sums = 1 / variant.rank if variant.rank else factored.state / 4 / factored.trained if factored else 0.0
    return variant.trained * bytes_a_weight(name, sums) - paged * recipe.optimizer.paged


def bytes_a_weight(name: str, sums: float = 0.0) -> float:
    """Bytes of optimizer state per trained weight.

    State is float32, except for bitsandbytes' two moments of one byte each with a scale per 256 values. Prodigy keeps
    both moments, the initial weights and the sum for its learning rate; schedule-free AdamW the second moment and the
    averaged point; Lion one moment. Adafactor keeps row and column sums, CAME those of two quantities and a moment.

    Args:
        sums: rows and columns per weight.
    """
    return {
        "adamw": 8.0,
        "adamw8bit": 2 * (1 + 4 / 256),
        "adafactor": 4 * sums,
        "prodigy": 16.0,
        "schedulefree": 8.0,
        "lion": 4.0,
        "came": 4 + 8 * sums,
    }[name]
