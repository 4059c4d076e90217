"""The estimate inside `ft train`: a line or a refusal before the run, and a comparison with measurements at its end."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from finetune.errors import UserError
from finetune.estimate import profiles
from finetune.estimate.advice import advice
from finetune.estimate.architecture import configs_of
from finetune.estimate.constants import GIB
from finetune.estimate.forecast import Forecast, apply_options, covered_options, forecast
from finetune.estimate.hardware.gpus import find, this_cpu
from finetune.estimate.hardware.parallelism import Group
from finetune.planning import Plan
from finetune.terminal import duration, plural

WORTHWHILE = 0.05  # the share of GPU memory that a memory option must save to be suggested when memory spills


@final
@dataclass(frozen=True)
class Expected:
    """The forecast of a plan on its own machine, or None and the reason why there is none."""

    forecast: Forecast | None
    reason: str = ""

    @property
    def line(self) -> str:
        """One line before the first step: memory, seconds per step and duration, or why there is no estimate."""
        one = self.forecast
        if one is None:
            return f"no estimate: {self.reason}"
        fits = "" if one.fits else ", does not fit"
        hours = duration(3600 * one.hours)
        time = f"{seconds_text(one.speed.seconds)} per step, {hours} including encoding and samples"
        return f"estimate: {_memory(one)} of {one.gpu.name}{fits}; {time}"


def expect(plan: Plan) -> Expected:
    """The estimate of `plan` on its device, with the memory that this machine reports."""
    machine, train = plan.machine, plan.recipe.train
    if reason := _out_of_reach(plan):
        return Expected(None, reason)
    counted = dataclasses.replace(plan.recipe, train=dataclasses.replace(train, steps=plan.steps, epochs=None))
    try:
        found = this_cpu() if machine.device == "cpu" else find(machine.name)
        gpu = dataclasses.replace(found, visible_gib=machine.memory_bytes / GIB)
        group = Group(machine.processes, "fsdp" if machine.sharded else "ddp")
        one = forecast(counted, plan.recipe.name, gpu, plan.data.images + plan.data.held_out, group=group)
    except UserError as error:
        return Expected(None, error.problem)
    return Expected(one)


def _out_of_reach(plan: Plan) -> str:
    """Why no cost profile can cover this plan; "" if one can."""
    machine = plan.machine
    if machine.device not in ("cuda", "cpu"):
        return f"estimates cover NVIDIA GPUs and CPUs, and this run uses {machine.device}"
    if machine.device == "cuda" and plan.precision == "float32":
        return "cost profiles of GPUs are for 16-bit precision, and this run computes in float32"
    if machine.device == "cpu" and plan.precision != "float32":
        return f"cost profiles of CPUs are for float32, and this run computes in {plan.precision}"
    if machine.device == "cpu" and machine.processes > 1:
        return "several processes share one CPU"
    return ""


def does_not_fit(one: Forecast) -> UserError:
    """The error for a run that does not fit, with the memory options that `ft estimate` lists."""
    ways = "".join(f"\n         {saved}  {text}" for saved, text in advice(one))
    return UserError(
        f"this run does not fit: it needs {_memory(one)} of {one.gpu.name}",
        where=f"memory peaks in the phase {one.memory.largest} (see `ft estimate`)",
        remedy=f"use one of these memory options, or --force to train anyway{ways}",
    )


def hours_on_cpu(plan: Plan, expected: Expected) -> float:
    """Hours that the run takes on this CPU: the estimate, else at least the arithmetic of its steps; 0 if unknown."""
    recipe = plan.recipe
    if expected.forecast is not None:
        return expected.forecast.hours
    if plan.machine.device != "cpu" or recipe.method == "scratch":
        return 0.0
    with contextlib.suppress(UserError):  # an architecture without a cost profile
        name, calibrated = configs_of(recipe.model)[1], this_cpu().calibration
        if name in profiles.known() and calibrated is not None:
            profile = profiles.load(name)
            images = recipe.train.batch_size * (recipe.data.resolution / profile.resolution) ** 2
            flops = min(
                sum(work.count * (work.flops[0] + work.flops[1] * images) for work in variant.micro)
                for variant in profile.variants
            )
            rate = max(calibrated.matmul.rate, calibrated.conv.rate)
            return plan.steps * recipe.train.accumulation * flops / rate / 3600
    return 0.0


def takes_weeks(plan: Plan, hours: float) -> UserError:
    """The error for a run that a CPU would need weeks for."""
    return UserError(
        f"this run would take {hours / 24:,.0f} days on {plan.machine.name}"
        f" ({seconds_text(3600 * hours / plan.steps)} per step, {plural(plan.steps, 'step')})",
        where="train.steps, model",
        remedy="train on a GPU, train fewer steps or a smaller model (`ft estimate` compares them);"
        " or --force to train anyway",
    )


def cheapest(one: Forecast) -> Forecast | None:
    """The single memory option that saves a worthwhile amount at the least cost in time; a smaller resolution comes
    last.
    """
    made = [
        forecast(apply_options(one.recipe, (option,)), one.name, one.gpu, one.images, (option,), one.group)
        for option in covered_options(one)
    ]
    useful = [edited for edited in made if saved(one, edited) >= WORTHWHILE * one.limit]
    return min(useful, key=lambda edited: (edited.edits[0].key == "data.resolution", edited.hours), default=None)


def saved(one: Forecast, edited: Forecast) -> int:
    """Bytes that the training phase needs less."""
    return one.memory.phases["train"] - edited.memory.phases["train"]


def rows(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (name, estimated, measured, error) of `estimate.json`, for the terminal and the report."""
    table = []
    shown: Callable[[float], str]
    for name, key, shown in (("memory", "memory_bytes", _gibibytes), ("a step", "seconds_per_step", seconds_text)):
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


def seconds_text(seconds: float) -> str:
    return f"{seconds:.3g} s"
