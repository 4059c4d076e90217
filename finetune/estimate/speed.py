"""How long a step takes on a GPU, from a card: each operator takes the longest of computing, moving its bytes and being launched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from finetune.estimate.cards import Card, Variant, Work
from finetune.estimate.constants import BANDWIDTH, EFFICIENCY, FLOAT32_SHARE, LAUNCH
from finetune.estimate.gpus import Gpu
from finetune.recipe import Recipe


@final
@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step, by what they are bound by, and its operators."""

    compute: float
    bandwidth: float
    launch: float
    operators: int

    @property
    def seconds(self) -> float:
        return self.compute + self.bandwidth + self.launch


def speed(card: Card, variant: Variant, recipe: Recipe, gpu: Gpu) -> Speed:
    """The step of `recipe` on `gpu`: as many forward and backward passes as it accumulates, and one update."""
    area = (recipe.data.resolution / card.resolution) ** 2
    pass_ = bounds(variant.micro, area, recipe.train.batch_size, gpu)
    update = bounds(variant.update, area, recipe.train.batch_size, gpu)
    times = recipe.train.accumulation
    return Speed(*(times * one + other for one, other in zip(pass_, update, strict=True)))  # type: ignore[arg-type]


def bounds(works: Iterable[Work], area: float, batch: int, gpu: Gpu) -> tuple[float, float, float, int]:
    """Seconds by bound, and operators, of `works` for `batch` pictures of `area` native ones each."""
    compute = bandwidth = launch = 0.0
    operators = 0
    for work in works:
        # Attention's FLOPs grow with the square of the picture's area, all else with the area.
        flops = work.flops[0] + work.flops[1] * batch * area * (area if work.kind == "attention" else 1.0)
        moved = work.bytes[0] + work.bytes[1] * batch * area
        rate = gpu.tflops * 1e12 * EFFICIENCY[work.kind] * (1.0 if work.width == 2 else FLOAT32_SHARE)
        computing, moving = flops / rate, moved / (gpu.bandwidth * 1e9 * BANDWIDTH)
        operators += work.count
        if max(computing, moving) <= LAUNCH:
            launch += work.count * LAUNCH
        elif computing >= moving:
            compute += work.count * computing
        else:
            bandwidth += work.count * moving
    return compute, bandwidth, launch, operators
