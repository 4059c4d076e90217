"""What `ft estimate` prints: the table of recipes to choose from, the details of one run, and the accuracy of the
estimate.
"""

from __future__ import annotations

import json

from finetune.estimate.advice import advice, sets
from finetune.estimate.benchmarks import quoted
from finetune.estimate.constants import GIB
from finetune.estimate.forecast import Forecast, exhausted
from finetune.estimate.hardware.gpus import Gpu
from finetune.estimate.recommend import Choice
from finetune.paths import ASSETS

BAR = 12  # characters of a memory bar


def compared(
    found: list[Forecast], choice: Choice, gpu: Gpu, images: int, left: dict[str, list[str]], goal: str = "quality"
) -> str:
    """The table of forecasts, the recommended one first, and the recommendation.

    Args:
        left: recipes that no cost profile covers, by the reason.
        goal: its measured figures are quoted next to a model trained from scratch.
    """
    price = f" · ${gpu.price.low:.2f}–{gpu.price.high:.2f}/h ({gpu.price.date or 'undated'})" if gpu.price else ""
    lines = [
        f"{images:,} images on {_many(choice.forecast)} · {gpu.visible_gib:.1f} "
        f"GiB{' usable' if gpu.device == 'cuda' else ''}{price}"
    ]
    width = max(len(one.name) for one in found)
    lines.append(
        f"   {'recipe':<{width}} {'':<16} {'memory':<{BAR + 13}} {'s/step':>7} {'time':>14} "
        f"{'cost' if gpu.price else '':>13}"
    )
    best, over = choice.forecast, [one for one in found if not one.fits]
    for one in sorted((one for one in found if one.fits), key=lambda one: one is not best):
        mark = "▸" if one is best else " "
        edits = "  with " + ", ".join(option.words for option in one.edits) if one.edits else ""
        head = f" {mark} {one.name:<{width}} {_size(one):<16} {one.memory.peak / GIB:>5.1f} GiB"
        lines.append(
            f"{head}  {_bar(one):<{BAR}} {one.speed.seconds:>7.2f} {_time(one.hours):>14} {_cost(one):>13}{edits}".rstrip()
        )
    for spent, text in (
        (True, "does not fit in memory even with every memory option"),
        (False, "does not fit with the memory options that the cost profiles cover (try --trace)"),
    ):
        if large := [f"{one.name} ({one.memory.peak / GIB:.1f} GiB)" for one in over if exhausted(one) is spent]:
            lines.append(f"   {text}: {', '.join(large)}")
    lines += [f"   {reason}: {', '.join(names)}" for reason, names in left.items()]
    lines += ["", f"Recommended: {best.name}, because {choice.reason}"]
    if best.recipe.net is not None and (figures := quoted(goal)):
        lines.append(f"Measured:    {figures}")
    if choice.first:
        lines.append(f"First:       ft train {choice.first} --set data.path=FOLDER")
    return "\n".join([*lines, f"Start:       {_start(best)}", f"Accuracy:    {accuracy(gpu)}"])


def details(one: Forecast) -> str:
    """One run: memory by part and by phase, time by cause, and, if it does not fit, the memory options that make it
    fit.
    """
    from finetune.terminal import table

    peak = max(one.memory.parts.values())
    memory = [
        (name, f"{value / GIB:>7.2f} GiB  {'█' * round(24 * value / peak)}") for name, value in one.memory.parts.items()
    ]
    phases = [
        (name, f"{value / GIB:>7.2f} GiB{'  ← peak' if name == one.memory.largest else ''}")
        for name, value in one.memory.phases.items()
    ]
    pace = one.speed
    bounds = [
        (text, getattr(pace, name))
        for name, text in (
            ("compute", "compute"),
            ("bandwidth", "memory bandwidth"),
            ("launch", "kernel launches"),
            ("exchange", "gradient exchange"),
            ("transfer", "host transfers"),
        )
        if getattr(pace, name)
    ]
    time = [
        ("steps", one.arithmetic),
        (
            "step",
            f"{pace.seconds:.3f} s: "
            + ", ".join(f"{value / pace.seconds:.0%} {name}" for name, value in bounds)
            + f" ({pace.operators:,} operators)",
        ),
        ("time", _time(one.hours) + ", including encoding and samples"),
    ]
    if one.gpu.device == "cuda":
        time.append(("cost", _cost(one) or "unknown: no price listed (--price sets one)"))
    fits = (
        f"fits: {one.memory.peak / GIB:.1f} of {one.limit / GIB:.1f} GiB"
        if one.fits
        else f"does not fit: {one.memory.peak / GIB:.1f} of {one.limit / GIB:.1f} GiB"
    )
    lines = [
        f"{one.name} on {_many(one)}: {fits}",
        table("memory during training", memory),
        table("memory by phase", phases),
        table("time and cost", time),
    ]
    if not one.fits:
        lines.append(table("memory options that make it fit", advice(one)))
    return "\n".join([*lines, f"Accuracy: {accuracy(one.gpu)}"])


def accuracy(gpu: Gpu) -> str:
    """How far estimates were from measurements: on published runs by benchmarks/check_estimates.py (time with constants
    fit on other models only), on a CPU by benchmarks/check_cpu.py."""
    errors = json.loads((ASSETS / "accuracy.json").read_text(encoding="utf-8"))
    if gpu.calibration:
        cpu = errors["s/step on a CPU"]
        text = (
            f"time within ±{cpu['most']:.0%} for {cpu['rows']} recipes on a calibrated CPU (median "
            f"±{cpu['median']:.0%})"
        )
        measured = gpu.calibration.measured
        return text if measured else f"{text}; this CPU is not calibrated: run `ft estimate --calibrate` (3 seconds)"
    memory, time = errors["memory"], errors["s/step, its model left out"]
    slowest = 1 / (1 + errors["our runs, s/step"]["least"])
    return (
        f"memory ±{memory['median']:.0%}, time ±{time['median']:.0%} (median of {memory['rows']} and {time['rows']} "
        f"published runs; 90% are within ±{memory['90 %']:.0%} and ±{time['90 %']:.0%}). "
        f"A slow CPU makes steps longer: up to {slowest:.1f}× in our runs on an H200"
    )


def _start(one: Forecast) -> str:
    return f"ft train {one.name} --set data.path=FOLDER {sets(one)}".rstrip()


def _many(one: Forecast) -> str:
    if one.group.count > 1:
        return f"{one.group.count} × {one.gpu.name}{', sharded' if one.group.sharded else ''}"
    return f"{'one' if one.gpu.device == 'cuda' else 'this'} {one.gpu.name}"


def _size(one: Forecast) -> str:
    rank = f"rank {one.recipe.adapter.rank}, " if one.recipe.adapter else ""
    return f"{rank:<9}{one.recipe.data.resolution:>4}²"


def _bar(one: Forecast) -> str:
    filled = min(BAR, round(BAR * one.memory.peak / one.limit))
    return "█" * filled + "░" * (BAR - filled)


def _time(hours: float) -> str:
    minutes = round(hours * 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"


def _cost(one: Forecast) -> str:
    return f"${one.usd[0]:.2f}–{one.usd[1]:.2f}" if one.usd else ""
