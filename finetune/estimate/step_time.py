"""Time of a step on a GPU, from a cost profile: kernels compute or move bytes, and the host launches each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import final

from finetune.config.schema import Recipe
from finetune.estimate.constants import INTERCONNECT, PACE, Pace
from finetune.estimate.hardware.cpu import BY_BYTES, Calibration
from finetune.estimate.hardware.gpus import Gpu
from finetune.estimate.hardware.parallelism import ALONE, Group
from finetune.estimate.profiles import Profile, Variant, Work


@final
@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step, by cause.

    Attributes:
        compute, bandwidth: kernels bound by arithmetic and by memory bandwidth.
        launch: the GPU waits for the host, which launches kernels one by one.
        exchange: gradients between GPUs.
        transfer: offloaded blocks, copied from host memory twice: for the forward pass and for its recomputation.
        operators: number of operators in the step.
    """

    compute: float
    bandwidth: float
    launch: float
    operators: int
    exchange: float = 0.0
    transfer: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.bandwidth + self.launch + self.exchange + self.transfer


def speed(profile: Profile, variant: Variant, recipe: Recipe, gpu: Gpu, group: Group = ALONE) -> Speed:
    """The step of `recipe` on one GPU of `group`: one forward and backward pass per accumulated batch, and one update.

    The overlap of gradient exchange and computation is ignored.
    """
    load = (recipe.data.resolution / profile.resolution) ** 2, recipe.train.batch_size
    found = step(variant.micro, variant.update, recipe.train.accumulation, gpu, PACE, *load)
    grown = recipe.adapter.rank / variant.rank if recipe.adapter and variant.rank else 1.0
    exchanged, brought = (
        group.exchanged(profile, recipe, variant.trained * grown),
        2 * recipe.train.accumulation * variant.waiting,
    )
    return replace(found, exchange=exchanged / INTERCONNECT, transfer=brought / INTERCONNECT)


def step(
    micro: Iterable[Work],
    update: Iterable[Work],
    times: int,
    gpu: Gpu,
    pace: Pace = PACE,
    area: float = 1.0,
    batch: int = 1,
) -> Speed:
    """A step of `times` passes and an update, for `batch` images of `area` times the native area each.

    A kernel takes the longer of its arithmetic and its memory traffic. The host runs ahead of the GPU until the end of
    the step, so the step takes the longer of all kernels and all launches; a CPU does both itself.
    """
    host: Pace | Calibration = gpu.calibration or pace
    compute = bandwidth = launch = 0.0
    operators = 0.0
    for works, repeated in ((micro, times), (update, 1)):
        for work in works:
            count = repeated * work.count
            computing, moving = seconds(work, gpu, pace, area, batch)
            operators += count
            launch += count * (host.launch if work.eager else host.launch_engine)
            if computing >= moving:
                compute += count * computing
            else:
                bandwidth += count * moving
    waited = launch if gpu.calibration else max(0.0, launch - compute - bandwidth)
    return Speed(compute, bandwidth, waited, round(operators))


def seconds(work: Work, gpu: Gpu, pace: Pace, area: float, batch: int) -> tuple[float, float]:
    """Seconds of one operator's arithmetic, and of its memory traffic."""
    # Attention's FLOPs grow with the square of the image's area, all else with the area.
    flops = work.flops[0] + work.flops[1] * batch * area * (area if work.kind == "attention" else 1.0)
    moved = work.bytes[0] + work.bytes[1] * batch * area
    if gpu.calibration and work.kind in BY_BYTES:
        return 0.0, getattr(gpu.calibration, work.kind).seconds(moved)
    if gpu.calibration:
        return getattr(gpu.calibration, work.kind).seconds(flops), gpu.calibration.other.seconds(moved)
    rate = gpu.tflops * 1e12 * getattr(pace, work.kind, 1.0) * (1.0 if work.width <= 2 else pace.float32)
    return flops / rate, moved / (gpu.bandwidth * 1e9 * pace.bandwidth)
