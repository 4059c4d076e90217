"""How long a step takes on a GPU, from a card: its kernels compute or move bytes, and the host has to launch each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from finetune.estimate.cards import Card, Variant, Work
from finetune.estimate.constants import INTERCONNECT, PACE, Pace
from finetune.estimate.gpus import Gpu
from finetune.recipe import Recipe


@final
@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step.

    Attributes:
        compute, bandwidth: of kernels bound by arithmetic and by memory.
        launch: in which the GPU waits for the host, which launches kernels one after another.
        exchange: of gradients between GPUs.
        operators: of the step.
    """

    compute: float
    bandwidth: float
    launch: float
    operators: int
    exchange: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.bandwidth + self.launch + self.exchange


def speed(card: Card, variant: Variant, recipe: Recipe, gpu: Gpu, gpus: int = 1) -> Speed:
    """The step of `recipe` on `gpu`: as many forward and backward passes as it accumulates, and one update.

    On several, a ring sends each gradient 2 (n − 1) / n times; that part of it runs beside the backward pass is left out.
    """
    area = (recipe.data.resolution / card.resolution) ** 2
    once = bounds(variant.micro, area, recipe.train.batch_size, gpu)
    update = bounds(variant.update, area, recipe.train.batch_size, gpu)
    times = recipe.train.accumulation
    grown = recipe.adapter.rank / variant.rank if recipe.adapter and variant.rank else 1.0
    return Speed(
        times * once.compute + update.compute,
        times * once.bandwidth + update.bandwidth,
        times * once.launch + update.launch,
        times * once.operators + update.operators,
        2 * (gpus - 1) / gpus * 4 * variant.trained * grown / INTERCONNECT,
    )


def bounds(works: Iterable[Work], area: float, batch: int, gpu: Gpu, pace: Pace = PACE) -> Speed:
    """`works` for `batch` pictures of `area` native ones each.

    A kernel takes the longer of computing and of moving its bytes; the host runs ahead of the GPU, so that the whole takes
    the longer of all kernels and of all launches.
    """
    compute = bandwidth = 0.0
    operators = 0
    for work in works:
        # Attention's FLOPs grow with the square of the picture's area, all else with the area.
        flops = work.flops[0] + work.flops[1] * batch * area * (area if work.kind == "attention" else 1.0)
        moved = work.bytes[0] + work.bytes[1] * batch * area
        rate = gpu.tflops * 1e12 * getattr(pace, work.kind, 1.0) * (1.0 if work.width <= 2 else pace.float32)
        computing, moving = flops / rate, moved / (gpu.bandwidth * 1e9 * pace.bandwidth)
        operators += work.count
        if computing >= moving:
            compute += work.count * computing
        else:
            bandwidth += work.count * moving
    return Speed(compute, bandwidth, max(0.0, operators * pace.launch - compute - bandwidth), operators)
