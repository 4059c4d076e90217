"""What `ft train` makes of the estimate: a line and a refusal before the run, a warning while it runs, a comparison at its end."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from finetune.engine.progress import duration
from finetune.errors import UserError
from finetune.estimate.advice import advice, sets
from finetune.estimate.constants import GIB
from finetune.estimate.cpu import Calibration
from finetune.estimate.forecast import Forecast, forecast, pulled, told_levers
from finetune.estimate.gpus import find, this_cpu
from finetune.estimate.group import Group
from finetune.planning import Plan

WARM_UP = 3  # first steps of a process, which choose kernels and fill caches
WINDOW, FEWEST = 20, 5  # steps whose median is the pace of now, and how many there must be
SLOW = 2.0  # times the estimate
FAR = 3.0  # times the estimate, or less than one such part of it: neither the model's error (±25 % at most) nor one more program makes so much
WAITING = 0.5  # of a step, from which on the host sets its pace: hosts differ by a factor of three (assets/gpu_runs.tsv)
FULL = 0.03  # share of a GPU's memory that is left when it is nearly full
WORTHWHILE = 0.05  # share of a GPU's memory that an edit has to save to be named against spilling
NO_COUNTER = "PyTorch counts no peak on this device"


@final
@dataclass(frozen=True)
class Expected:
    """The forecast of a plan on its own machine; or None, and the reason why there is none."""

    forecast: Forecast | None
    reason: str = ""

    @property
    def line(self) -> str:
        """Memory, seconds of a step and length of the run, or why there is no estimate: said before the first step."""
        one = self.forecast
        if one is None:
            return f"no estimate: {self.reason}"
        fits = "" if one.fits else ", which does not fit"
        time = f"{_seconds(one.speed.seconds)} a step, {duration(3600 * one.hours)} with encoding and samples"
        return f"estimate: {_memory(one)} of {one.gpu.name}{fits}; {time}"


def expect(plan: Plan) -> Expected:
    """What `plan` will need of the device that it names, whose memory is the machine's own figure."""
    machine, train = plan.machine, plan.recipe.train
    if reason := _out_of_reach(plan):
        return Expected(None, reason)
    counted = dataclasses.replace(plan.recipe, train=dataclasses.replace(train, steps=plan.steps, epochs=None))
    try:
        found = this_cpu() if machine.device == "cpu" else find(machine.name)
        gpu = dataclasses.replace(found, visible_gib=machine.memory_bytes / GIB)
        group = Group(machine.processes, "fsdp" if machine.sharded else "ddp")
        one = forecast(counted, plan.recipe.name, gpu, plan.data.pictures + plan.data.held_out, group=group)
    except UserError as error:
        return Expected(None, error.problem)
    return Expected(one)


def _out_of_reach(plan: Plan) -> str:
    """Why no card can tell of this plan; "" if one may."""
    machine = plan.machine
    if machine.device not in ("cuda", "cpu"):
        return f"the estimates are for NVIDIA GPUs and CPUs, and this run takes {machine.device}"
    if machine.device == "cuda" and plan.precision == "float32":
        return "the cards of GPUs are of 16-bit arithmetic, and this run computes in float32"
    if machine.device == "cpu" and plan.precision != "float32":
        return f"the cards of CPUs are of float32, and this run computes in {plan.precision}"
    if machine.device == "cpu" and machine.processes > 1:
        return "several processes share one CPU"
    return ""


def does_not_fit(one: Forecast) -> UserError:
    """The refusal of a run, with the edits that `ft estimate` would name."""
    ways = "".join(f"\n         {saved}  {text}" for saved, text in advice(one))
    return UserError(
        f"this run does not fit: it takes {_memory(one)} that {one.gpu.name} has",
        where=f"the peak is in the phase {one.memory.largest} (`ft estimate` takes it apart)",
        remedy=f"with an edit that makes it fit, or --force to train all the same{ways}",
    )


@final
class Pace:
    """Seconds of the steps that this process took, held against the estimate.

    Args:
        expected: of the run.
        memory_left: the share of the device's memory that is free; None where nothing counts it.
    """

    def __init__(self, expected: Expected, memory_left: Callable[[], float | None]) -> None:
        self.expected, self.seconds = expected, list[float]()
        self._memory_left, self._warned = memory_left, False

    def took(self, seconds: float) -> str:
        """Book a step; returns a warning, once, when the run is far slower than was estimated, else ""."""
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
        """What this machine's CPU was measured to do, if the steps were so far from the estimate that it cannot be true."""
        one = self.expected.forecast
        if one is None or one.gpu.calibration is None or not one.gpu.calibration.measured or len(self.seconds) < WARM_UP + FEWEST:
            return None
        off = typical(self.seconds, one.variant.cycle) / one.speed.seconds
        return None if 1 / FAR <= off <= FAR else one.gpu.calibration

    def compared(self, memory_bytes: int | None) -> dict[str, Any]:
        """Estimated beside measured, as plain values for `estimate.json`.

        Args:
            memory_bytes: the peak that PyTorch reserved, in which CUDA's context is not; on a CPU that of the process; None where it is not counted.
        """
        one = self.expected.forecast
        measured = typical(self.seconds, one.variant.cycle if one else 1)
        return {
            "gpu": one.gpu.name if one else None,
            "no_estimate": None if one else self.expected.reason,
            "memory_bytes": {
                "estimated": one.memory.peak - int(one.memory.parts.get("CUDA context", 0)) if one else None,
                "measured": memory_bytes,
                "not_measured": NO_COUNTER if memory_bytes is None else None,
            },
            "seconds_per_step": {"estimated": one.speed.seconds if one else None, "measured": measured, "steps": len(self.seconds)},
        }


def too_slow(seconds: Sequence[float], estimated: float) -> float | None:
    """The median of the last steps if it is more than `SLOW` times the estimate; None while there are too few to say."""
    recent = seconds[max(WARM_UP, len(seconds) - WINDOW) :]
    if len(recent) < FEWEST:
        return None
    live = statistics.median(recent)
    return live if live > SLOW * estimated else None


def warning(one: Forecast, live: float, memory_left: float | None) -> str:
    """That steps take `live` seconds, what was estimated, and what is likely to help."""
    said = f"warning: a step takes {_seconds(live)}, and {_seconds(one.speed.seconds)} was estimated for {one.gpu.name}. "
    if one.gpu.device == "cpu":
        return said + "Look for other programs on it or a slow disk; if there are none, `ft estimate --calibrate` measures it anew."
    if memory_left is None or memory_left > FULL:
        if one.speed.launch > WAITING * one.speed.seconds:
            why = f"The GPU waits for the processor, which launches {one.speed.operators:,} operators a step: one that is faster or less busy helps"
            return f"{said}{why}, and a larger train.batch_size takes hardly longer."
        return said + "Look for another process on the GPU, a power limit or a slow disk."
    edited = cheapest(one)
    mend = f"a new run with {sets(edited)} would save {saved(one, edited) / GIB:.1f} GiB" if edited else "take a larger GPU"
    return said + f"Its memory is nearly full ({memory_left:.0%} is free) and likely spills: {mend}."


def cheapest(one: Forecast) -> Forecast | None:
    """The single edit that saves steps memory worth naming at the least hours; a smaller resolution only if nothing else does."""
    made = [forecast(pulled(one.recipe, (lever,)), one.name, one.gpu, one.images, (lever,), one.group) for lever in told_levers(one)]
    useful = [edited for edited in made if saved(one, edited) >= WORTHWHILE * one.limit]
    return min(useful, key=lambda edited: (edited.edits[0].key == "data.resolution", edited.hours), default=None)


def saved(one: Forecast, edited: Forecast) -> int:
    """Bytes that a step takes less, whatever else the run does."""
    return one.memory.phases["train"] - edited.memory.phases["train"]


def typical(seconds: Sequence[float], cycle: int = 1) -> float:
    """The median step once all is warm, the steps of a cycle by their mean; of a run shorter than that, its last."""
    warm = seconds[WARM_UP:]
    cycles = [statistics.fmean(warm[start : start + cycle]) for start in range(0, len(warm) - cycle + 1, cycle)]
    return statistics.median(cycles or warm or seconds[-1:])


def rows(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, estimated, measured and how far the estimate is off, of `estimate.json`: for the terminal and the report."""
    table = []
    shown: Callable[[float], str]
    for name, key, shown in (("memory", "memory_bytes", _gibibytes), ("a step", "seconds_per_step", _seconds)):
        estimated, measured = found[key]["estimated"], found[key]["measured"]
        if estimated is None and measured is None:
            continue
        off = f"{estimated / measured - 1:+.0%}" if estimated and measured else ""
        table.append((name, shown(estimated) if estimated else "—", shown(measured) if measured else "—", off))
    return table


def _memory(one: Forecast) -> str:
    return f"{one.memory.peak / GIB:.1f} of the {one.limit / GIB:.1f} GiB"


def _gibibytes(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"
