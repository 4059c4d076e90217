"""How much of a GPU a run takes, by part and by phase, from a profile. All figures are bytes."""

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
    """Peaks of one process.

    Attributes:
        parts: of the training phase, by what they are; they add up to its peak.
        phases: the peak of each phase. All hold CUDA's context and cuBLAS's workspace.
    """

    parts: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes, of all phases."""
        return max(self.phases.values())

    @property
    def largest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def memory(profile: Profile, variant: Variant, recipe: Recipe, gpu: Gpu, group: Group = ALONE) -> Memory:
    """What `recipe` takes on one of `group`: the peak that PyTorch reserves (what it cached and cannot use is in it), context and workspace.

    DistributedDataParallel keeps every gradient once more, in buckets (`gradient_as_bucket_view` is off in Accelerate). A CPU caches
    nothing, so there it is what is allocated; and the VAE stays where it is.
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
    # Of a fused step's gradients there is one at a time, which counts as an activation here.
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
    """How much less the text encoders take while they encode than they were measured to: whole, in 16 bits (on a CPU in 32).

    In full fine-tuning CLIP text encoders have the width of what trains, trained or not (`models.text_to_image`).
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
    """The area, in native images, that the VAE sees at once."""
    return min(area, (TILE / profile.resolution) ** 2) if recipe.model.vae_tiling and not out.tiled else area


def around(gpu: Gpu) -> dict[str, float]:
    """What is there whatever trains: CUDA's context and cuBLAS's workspace; on a CPU, Python and its libraries."""
    if gpu.calibration:
        return {"Python, PyTorch": gpu.calibration.held}
    return {"cuBLAS workspace": WORKSPACE_HOPPER if gpu.model in HOPPER else WORKSPACE, "CUDA context": CONTEXT}


def state_bytes(profile: Profile, recipe: Recipe, variant: Variant) -> float:
    """The optimizer's state for what trains at the rank of the measurement."""
    name = recipe.optimizer.name
    paged = 2.0 * variant.trained  # of 8-bit AdamW, its two moments; their scales stay
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
    # Matrices of an adapter of rank r have about one row or column for r weights; of whole nets, Adafactor's measurement tells.
    sums = 1 / variant.rank if variant.rank else factored.state / 4 / factored.trained if factored else 0.0
    return variant.trained * bytes_a_weight(name, sums) - paged * recipe.optimizer.paged


def bytes_a_weight(name: str, sums: float = 0.0) -> float:
    """What an optimizer keeps for each weight that trains.

    All is float32 but bitsandbytes' two moments of a byte each, with a scale for 256 of them. Prodigy keeps both moments, where it
    started from and the sum that its rate is judged by; schedule-free AdamW the second moment and the point that it averages; Lion
    one moment. Adafactor keeps sums over rows and columns, CAME those of two quantities, and a moment.

    Args:
        sums: rows and columns for each weight.
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
