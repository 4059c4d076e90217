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
    state = state_bytes(card, recipe, variant) * grown
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
    # In full fine-tuning CLIP text encoders stay in float32, trained or not (`models.text_to_image`).
    encoders = 2 * card.parameters["text encoders"] if recipe.method == "full" and card.family in ("sd", "sdxl") else 0
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


def state_bytes(card: Card, recipe: Recipe, variant: Variant) -> float:
    """The optimizer's state for what trains at the rank of the measurement."""
    name = recipe.optimizer.name
    if variant.optimizer == name:
        return variant.state
    factored = next((one for one in card.variants if one.method == variant.method and one.optimizer == "adafactor"), None)
    # Matrices of an adapter of rank r have about one row or column for r weights; of whole nets, Adafactor's measurement tells.
    sums = 1 / variant.rank if variant.rank else factored.state / 4 / factored.trained if factored else 0.0
    return variant.trained * bytes_a_weight(name, sums)


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
