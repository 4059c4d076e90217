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
from finetune.estimate.hardware.host import host_memory_of
from finetune.estimate.recommend import INFINITE, Answer, Question, license_of
from finetune.paths import ASSETS
from finetune.terminal import plural

BAR = 12  # characters of a memory bar


def answered(found: Answer, asked: Question, notes: list[str] | None = None) -> str:
    """The three choices, the recommended one marked, each with its reason; then how to start.

    Args:
        notes: lines about this machine, such as too little host memory.
    """
    best = found.choice.forecast
    name = max(len(one.forecast.name) for one in found.choices.values())
    lines = [_heading(best, asked, found.limit)]
    for key, choice in found.choices.items():
        one = choice.forecast
        mark = "▸" if key == found.recommended else " "
        figures = f"{_size(one).strip():<14} {one.memory.peak / GIB:>5.1f} GiB"
        if one.gpu.timed:
            figures += f"  {_time(one.hours):>12}  {_cost(one)}".rstrip()
        lines += [f" {mark} {key:<9}{one.name:<{name}}  {figures}".rstrip(), f"   {'':<9}{choice.reason}"]
    lines += ["", f"Recommended: {best.name}: {found.reason}"]
    if best.recipe.net is not None and (figures := quoted(asked.goal)):
        lines.append(f"Measured:    {figures}")
    if license := licensed(best):
        lines.append(f"License:     {license}")
    lines.append(f"Host memory: {host_line(best)}")
    if found.choice.first:
        lines.append(f"First:       ft train {found.choice.first} --set data.path=FOLDER")
    lines.append(f"Start:       {_start(best)}")
    lines.append(f"Accuracy:    {accuracy(best.gpu)}")
    lines += notes or []
    return "\n".join([*lines, "All runs:    add --all"])


def compared(found: Answer, asked: Question) -> str:
    """The table of all forecasts that the rules allow, by use: those that fit within the limits first, best first."""
    best, forecasts = found.choice.forecast, found.forecasts
    lines = [_heading(best, asked, found.limit)]
    width = max(len(one.name) for one in forecasts)
    timed = asked.gpu.timed
    times = f" {'s/step':>7} {'time':>14} {'cost' if asked.gpu.price else '':>13}" if timed else ""
    lines.append(f"   {'recipe':<{width}} {'':<16} {'memory':<{BAR + 12}}{times}  license")
    over = [one for one in forecasts if not one.fits]
    for one in (one for one in forecasts if one.fits):
        mark = "▸" if one is best else " "
        edits = "  with " + ", ".join(option.words for option in one.edits) if one.edits else ""
        head = f" {mark} {one.name:<{width}} {_size(one):<16} {one.memory.peak / GIB:>5.1f} GiB  {_bar(one):<{BAR}}"
        pace = f" {one.speed.seconds:>7.2f} {_time(one.hours):>14} {_cost(one):>13}" if timed else ""
        lines.append(f"{head}{pace}  {licensed(one)}{edits}".rstrip())
    for spent, text in (
        (True, "does not fit in memory even with every memory option"),
        (False, "does not fit with the memory options that the cost profiles cover (try --trace)"),
    ):
        if large := [f"{one.name} ({one.memory.peak / GIB:.1f} GiB)" for one in over if exhausted(one) is spent]:
            lines.append(f"   {text}: {', '.join(large)}")
    lines += [f"   {reason}: {', '.join(names)}" for reason, names in found.excluded.items()]
    return "\n".join([*lines, "", answered(found, asked).partition("\n")[2].rpartition("\n")[0]])


def licensed(one: Forecast) -> str:
    """The license of the base and whether it allows commercial use; "" without a published base."""
    base = license_of(one)
    if base is None:
        return ""
    terms = {"yes": "commercial use allowed", "no": "no commercial use"}.get(base.commercial)
    return f"{base.license} ({terms or f'commercial use {base.commercial}'})"


def host_line(one: Forecast) -> str:
    """Host memory in words, with what other trainers publish."""
    host = host_memory_of(one.profile, one.variant, one.recipe)
    published = f" ({host.published})" if host.published else ""
    return f"about {host.needed / GIB:.0f} GiB of RAM while the model loads{published}"


def host_note(one: Forecast, available: int) -> str:
    """A warning if this machine's memory, bytes, is less than the run needs; else ""."""
    needed = host_memory_of(one.profile, one.variant, one.recipe).needed
    if needed <= available:
        return ""
    return f"Warning:     this machine has {available / GIB:.0f} GiB of RAM: loading may fail or swap"


def _heading(best: Forecast, asked: Question, limit: float) -> str:
    gpu = asked.gpu
    price = f" · ${gpu.price.low:.2f}–{gpu.price.high:.2f}/h ({gpu.price.date or 'undated'})" if gpu.price else ""
    many = f"{asked.group.count} × {gpu.name}" if asked.group.count > 1 else _many(best)
    cap = ""
    if not gpu.timed:
        cap = " · time unknown" + ("" if gpu.platform else " (add --tflops and --bandwidth)")
    elif limit < INFINITE:
        cap = f" · within {limit:g} h" + (" (overnight; --hours changes it)" if asked.hours is None else "")
    usable = " usable" if gpu.device == "cuda" else ""
    return f"{plural(asked.images, 'image')} on {many} · {gpu.visible_gib:.1f} GiB{usable}{price}{cap}"


def details(one: Forecast, only_memory: bool = False) -> str:
    """One run: memory by part and by phase, time by cause, and, if it does not fit, the memory options that make it
    fit.

    Args:
        only_memory: the number of images is not known, so time and cost are left out.
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
    ]
    if only_memory:
        lines.append("Time and cost need the number of images: add --images N")
    elif not one.gpu.timed:
        lines.append(f"Time is unknown{'' if one.gpu.platform else ': add --tflops and --bandwidth'}")
    else:
        lines.append(table("time and cost", time))
    if not one.fits:
        lines.append(table("memory options that make it fit", advice(one)))
    if license := licensed(one):
        lines.append(f"License: {license}")
    lines.append(f"Host memory: {host_line(one)}")
    return "\n".join([*lines, f"Accuracy: {accuracy(one.gpu)}"])


def accuracy(gpu: Gpu) -> str:
    """How far estimates were from measurements: on published runs by benchmarks/check_estimates.py (time with constants
    fit on other models only), on a CPU by benchmarks/check_cpu.py."""
    errors = json.loads((ASSETS / "accuracy.json").read_text(encoding="utf-8"))
    if gpu.calibration:
        text = f"time is right to about ±{errors['s/step on a CPU']['most']:.0%}"
        return text if gpu.calibration.measured else f"{text} once `ft estimate --calibrate` has run (3 seconds)"
    text = f"memory is right to about ±{errors['memory']['90 %']:.0%}"
    if gpu.platform or not gpu.timed:
        return f"{text} on NVIDIA GPUs{'; ft has not been run on this kind of GPU' if gpu.platform else ''}"
    return f"{text}; expect a run to take about a fifth longer than shown, at worst twice as long"


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
    if one.usd is None:
        return ""
    low, high = (f"{amount:.2f}" for amount in one.usd)
    return f"${low}" if low == high else f"${low}–{high}"
