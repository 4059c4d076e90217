"""What `ft estimate` prints: the table of what could be trained, one run taken apart, and how sure it is."""

from __future__ import annotations

import json

from finetune.estimate.advice import advice, sets
from finetune.estimate.benchmarks import quoted
from finetune.estimate.constants import GIB
from finetune.estimate.forecast import Forecast
from finetune.estimate.hardware.gpus import Gpu
from finetune.estimate.recommend import Choice
from finetune.paths import ASSETS

BAR = 12  # characters of a memory bar


def compared(
    found: list[Forecast], choice: Choice, gpu: Gpu, images: int, left: dict[str, list[str]], goal: str = "quality"
) -> str:
    """The table of what could be trained, the recommended run first, and the recommendation.

    Args:
        left: recipes that no profile tells of, by the reason.
        goal: whose measured figures are quoted beside a recommended family in pixel space.
    """
    price = f" · ${gpu.price.low:.2f}–{gpu.price.high:.2f}/h ({gpu.price.date or 'undated'})" if gpu.price else ""
    lines = [
        f"{images:,} images on {_many(choice.forecast)} · {gpu.visible_gib:.1f} GiB{' usable' if gpu.device == 'cuda' else ''}{price}"
    ]
    width = max(len(one.name) for one in found)
    lines.append(
        f"   {'recipe':<{width}} {'':<16} {'memory':<{BAR + 13}} {'s/step':>7} {'time':>10} {'cost' if gpu.price else '':>13}"
    )
    best = choice.forecast
    for one in sorted((one for one in found if one.fits), key=lambda one: one is not best):
        mark = "▸" if one is best else " "
        edits = "  with " + ", ".join(option.words for option in one.edits) if one.edits else ""
        head = f" {mark} {one.name:<{width}} {_size(one):<16} {one.memory.peak / GIB:>5.1f} GiB"
        lines.append(
            f"{head}  {_bar(one):<{BAR}} {one.speed.seconds:>7.2f} {_time(one.hours):>10} {_cost(one):>13}{edits}".rstrip()
        )
    if large := [f"{one.name} ({one.memory.peak / GIB:.1f})" for one in found if not one.fits]:
        lines.append(f"   does not fit, whatever is edited: {', '.join(large)}")
    lines += [f"   {reason}: {', '.join(names)}" for reason, names in left.items()]
    lines += ["", f"Recommended: {best.name}, because {choice.reason}"]
    if best.recipe.net is not None and (figures := quoted(goal)):
        lines.append(f"Measured:    {figures}")
    if choice.first:
        lines.append(f"First:       ft train {choice.first} --set data.path=FOLDER")
    return "\n".join([*lines, f"Start:       {_start(best)}", f"How sure:    {how_sure(gpu)}"])


def apart(one: Forecast) -> str:
    """One run: memory by part and by phase, time by bound, and the edits that make it fit if it does not."""
    from finetune.terminal import table

    peak = max(one.memory.parts.values())
    memory = [
        (name, f"{value / GIB:>7.2f} GiB  {'█' * round(24 * value / peak)}") for name, value in one.memory.parts.items()
    ]
    phases = [
        (name, f"{value / GIB:>7.2f} GiB{'  ← the peak' if name == one.memory.largest else ''}")
        for name, value in one.memory.phases.items()
    ]
    pace = one.speed
    bounds = [
        (name, getattr(pace, name))
        for name in ("compute", "bandwidth", "launch", "exchange", "transfer")
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
        ("time", _time(one.hours) + ", with encoding and samples"),
    ]
    if one.gpu.device == "cuda":
        time.append(("cost", _cost(one) or "no price is known"))
    fits = (
        f"fits: {one.memory.peak / GIB:.1f} of {one.limit / GIB:.1f} GiB"
        if one.fits
        else f"does not fit: {one.memory.peak / GIB:.1f} of {one.limit / GIB:.1f} GiB"
    )
    lines = [
        f"{one.name} on {_many(one)}: {fits}",
        table("memory while training", memory),
        table("memory by phase", phases),
        table("time and money", time),
    ]
    if not one.fits:
        lines.append(table("edits that make it fit", advice(one)))
    return "\n".join([*lines, f"How sure: {how_sure(one.gpu)}"])


def how_sure(gpu: Gpu) -> str:
    """The errors that benchmarks/check_estimates.py found on published runs, time with the constants fit on other models than a run's own;
    on a CPU, those that benchmarks/check_cpu.py found here."""
    found = json.loads((ASSETS / "accuracy.json").read_text(encoding="utf-8"))
    if gpu.calibration:
        of = found["s/step on a CPU"]
        said = f"time ±{of['most']:.0%} in {of['rows']} recipes after a calibration in the same run (median ±{of['median']:.0%})"
        return (
            said
            if gpu.calibration.measured
            else f"{said}, and this CPU is not measured: `ft estimate --calibrate` takes three seconds"
        )
    said = "; ".join(
        f"{name} ±{of['90 %']:.0%} in 90 % of {of['rows']} {runs} (median ±{of['median']:.0%})"
        for name, runs, of in (
            ("memory", "published runs", found["memory"]),
            ("time", "that run torch's own operators", found["s/step, its model left out"]),
        )
    )
    memory, time = found["our runs, memory"], found["our runs, s/step"]
    ours = f"{memory['rows']} runs of ours on an H200: memory ±{memory['median']:.0%} (median)"
    return f"{said}; {ours}, time {time['least']:+.0%} to {time['most']:+.0%}: its slow host kept most of them waiting"


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
    return f"{minutes} m" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02}"


def _cost(one: Forecast) -> str:
    return f"${one.usd[0]:.2f}–{one.usd[1]:.2f}" if one.usd else ""
