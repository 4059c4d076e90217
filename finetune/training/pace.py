"""`Pace`: compares measured step time and memory with the estimate while training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, final

from finetune.estimate.advice import sets
from finetune.estimate.constants import GIB
from finetune.estimate.forecast import Forecast
from finetune.estimate.hardware.cpu import Calibration
from finetune.estimate.monitor import Expected, cheapest, rows, saved, seconds_text
from finetune.terminal import Row

WARM_UP = 3  # first steps of a process, which choose kernels and fill caches
WINDOW, FEWEST = 20, 5  # steps whose median is the pace of now, and how many there must be
SLOW = 2.0  # times the estimate
FAR = 3.0  # times the estimate, or a third of it: neither the estimate's error nor one more program explains that
WAITING = (
    0.5  # share of launches in a step above which the host sets the pace (hosts differ by 3×, assets/gpu_runs.tsv)
)
FULL = 0.03  # free share of a GPU's memory below which it is nearly full
NO_COUNTER = "PyTorch counts no peak on this device"


@final
class Pace:
    """Step times of this process, compared with the estimate.

    Args:
        expected: of the run.
        memory_left: returns the free share of the device's memory; None where nothing counts it.
    """

    def __init__(self, expected: Expected, memory_left: Callable[[], float | None]) -> None:
        self.expected, self.seconds = expected, list[float]()
        self._memory_left, self._warned = memory_left, False

    def took(self, seconds: float) -> str:
        """Add a step; returns a warning, once, when the run is far slower than estimated, else ""."""
        self.seconds.append(seconds)
        one = self.expected.forecast
        if one is None or self._warned:
            return ""
        live = too_slow(self.seconds, one.speed.seconds)
        if live is None:
            return ""
        self._warned = True
        return warning(one, live, self._memory_left())

    def disproved(self) -> Calibration | None:
        """The CPU calibration, if the steps are so far from the estimate that it must be wrong; else None."""
        one = self.expected.forecast
        if (
            one is None
            or one.gpu.calibration is None
            or not one.gpu.calibration.measured
            or len(self.seconds) < WARM_UP + FEWEST
        ):
            return None
        off = typical(self.seconds, one.variant.cycle) / one.speed.seconds
        return None if 1 / FAR <= off <= FAR else one.gpu.calibration

    def compared(self, memory_bytes: int | None) -> dict[str, Any]:
        """Estimated and measured values, for `estimate.json`.

        Args:
            memory_bytes: the peak that PyTorch reserved, without CUDA's context; on a CPU the process's peak; or None.
        """
        one = self.expected.forecast
        measured = typical(self.seconds, one.variant.cycle if one else 1) if self.seconds else None
        return {
            "gpu": one.gpu.name if one else None,
            "no_estimate": None if one else self.expected.reason,
            "memory_bytes": {
                "estimated": one.memory.peak - int(one.memory.parts.get("CUDA context", 0)) if one else None,
                "measured": memory_bytes,
                "not_measured": NO_COUNTER if memory_bytes is None else None,
            },
            "seconds_per_step": {
                "estimated": one.speed.seconds if one else None,
                "measured": measured,
                "steps": len(self.seconds),
            },
        }


def measured_rows(values: dict[str, Any]) -> list[Row]:
    """The closing lines about `estimate.json`: `step 0.354 s, estimated 0.255 s (39% slower than estimated)`."""
    words = {"memory_bytes": ("more", "less"), "seconds_per_step": ("slower", "faster")}
    known = [key for key in words if any(values[key][side] is not None for side in ("estimated", "measured"))]
    result = []
    for (name, estimated, measured, off), key in zip(rows(values), known, strict=True):
        text = measured
        if off:
            ratio = values[key]["measured"] / values[key]["estimated"]
            share = f"{abs(ratio - 1):.0%} {words[key][ratio < 1]} than estimated"
            text += f", estimated {estimated} ({share if ratio < 2 else f'{ratio:.1f} times the estimate'})"
        result.append((name.removeprefix("a "), text))
    return result


def too_slow(seconds: Sequence[float], estimated: float) -> float | None:
    """The median of the last steps if it exceeds `SLOW` times the estimate; None otherwise, or with too few steps."""
    recent = seconds[max(WARM_UP, len(seconds) - WINDOW) :]
    if len(recent) < FEWEST:
        return None
    live = statistics.median(recent)
    return live if live > SLOW * estimated else None


def warning(one: Forecast, live: float, memory_left: float | None) -> str:
    """The warning: steps take `live` seconds, what was estimated, and what probably helps."""
    text = f"a step takes {seconds_text(live)}, estimated {seconds_text(one.speed.seconds)} on {one.gpu.name}. "
    if one.gpu.device == "cpu":
        return (
            text
            + "Check for other programs or a slow disk; if there are none, `ft estimate --calibrate` measures the CPU"
            " again."
        )
    if memory_left is None or memory_left > FULL:
        if one.speed.launch > WAITING * one.speed.seconds:
            why = f"The GPU waits for the CPU, which launches {one.speed.operators:,} operators a step"
            return f"{text}{why}: a faster or less busy CPU helps; a larger train.batch_size costs hardly any time."
        return text + "Check for another process on the GPU, a power limit or a slow disk."
    edited = cheapest(one)
    fix = (
        f"a new run with {sets(edited)} would save {saved(one, edited) / GIB:.1f} GiB" if edited else "use a larger GPU"
    )
    return text + f"GPU memory is nearly full ({memory_left:.0%} free) and probably spills to the host: {fix}."


def typical(seconds: Sequence[float], cycle: int = 1) -> float:
    """The median step after warm-up (the mean step of a cycle); the last step of a shorter run."""
    warm = seconds[WARM_UP:]
    cycles = [statistics.fmean(warm[start : start + cycle]) for start in range(0, len(warm) - cycle + 1, cycle)]
    return statistics.median(cycles or warm or seconds[-1:])
