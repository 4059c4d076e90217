"""How much of a GPU a run takes, by part and by phase, from a card. All figures are bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from finetune.estimate.cards import Card, Variant
from finetune.estimate.constants import CONTEXT, WORKSPACE, WORKSPACE_HOPPER
from finetune.estimate.gpus import Gpu
from finetune.recipe import Recipe

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
        return max(self.phases.values())

    @property
    def largest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def memory(card: Card, variant: Variant, recipe: Recipe, gpu: Gpu, gpus: int = 1) -> Memory:
    """What `recipe` takes on `gpu`: the peak that PyTorch reserves (what it cached and cannot use is in it), context and workspace.

    On several GPUs, DistributedDataParallel keeps every gradient once more, in buckets (`gradient_as_bucket_view` is off in Accelerate).
    """
    area = (recipe.data.resolution / card.resolution) ** 2
    load = area * recipe.train.batch_size
    higher = (recipe.adapter.rank - variant.rank) if recipe.adapter else 0
    grown = recipe.adapter.rank / variant.rank if recipe.adapter else 1.0
    adapters, trained = variant.adapters * grown, variant.trained * grown
    state = state_bytes(recipe, variant) * grown
    lines = variant.accumulating if recipe.train.accumulation > 1 else (variant.allocated, variant.reserved)
    more = variant.rank_bytes * higher + state - variant.state * grown
    allocated, reserved = (line[0] + line[1] * load + more for line in lines)
    averages = 4 * trained if recipe.train.ema else 0.0
    buckets = 4 * trained if gpus > 1 else 0.0
    kept = variant.weights + adapters + state + averages
    gradients = min(4 * trained, allocated - variant.weights - adapters - state)
    parts = {
        "weights": variant.weights,
        "adapters" if recipe.adapter else "trained weights": adapters,
        "gradients": gradients,
        f"optimizer ({recipe.optimizer.name})": state,
        "averages": averages,
        "gradient buckets": buckets,
        "activations": allocated - variant.weights - adapters - state - gradients,
        "fragmentation": reserved - allocated,
        "cuBLAS workspace": around(gpu) - CONTEXT,
        "CUDA context": CONTEXT,
    }
    # In full fine-tuning what is frozen, the text encoders too, stays in float32 (`models.text_to_image`).
    encoders = 2 * card.parameters["text encoders"] if recipe.method == "full" else 0
    phases = {
        "encode": card.encode[0] + card.encode[1] * area + encoders + around(gpu),
        "train": reserved + averages + buckets + around(gpu),
        "sample": kept + card.sample[0] + card.sample[1] * area + around(gpu),
        "save": kept + around(gpu),
    }
    return Memory({name: round(value) for name, value in parts.items() if value}, {name: round(value) for name, value in phases.items()})


def around(gpu: Gpu) -> int:
    """What is there whatever trains: CUDA's context and cuBLAS's workspace."""
    return CONTEXT + (WORKSPACE_HOPPER if gpu.model in HOPPER else WORKSPACE)


def state_bytes(recipe: Recipe, variant: Variant) -> float:
    """The optimizer's state for what trains at the rank of the measurement.

    AdamW keeps two float32 values a weight; bitsandbytes' 8-bit one two bytes, and two float32 scales for 256 weights;
    Adafactor a sum for each row and column: of an adapter of rank r, about one float32 value for r weights.
    """
    name = recipe.optimizer.name
    if variant.optimizer == name:
        return variant.state
    return variant.trained * {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256), "adafactor": 4 / max(1, variant.rank)}[name]
