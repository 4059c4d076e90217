"""What `ft estimate` does with torch: a recipe's step run on fake tensors, and drawn."""

from __future__ import annotations

from pathlib import Path

from finetune.config.loader import error_location
from finetune.config.schema import Precision, Recipe
from finetune.errors import UserError
from finetune.estimate import profiles
from finetune.estimate.constants import GIB
from finetune.estimate.forecast import Forecast
from finetune.estimate.hardware.gpus import Gpu
from finetune.estimate.profiles import Profile
from finetune.estimate.step_time import step
from finetune.estimate.tracing.traced_run import Phase
from finetune.report import svg_charts
from finetune.report.html import render

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)  # that time is drawn for


def traced_profile(recipe: Recipe, gpu: Gpu, denoiser: str | None) -> tuple[Profile, dict[str, Phase]]:
    """A profile of just this configuration.

    Raises:
        UserError: `denoiser` is none, or the recipe's family cannot be traced.
    """
    from finetune.data.audit.audit import scan
    from finetune.estimate.tracing.denoiser import DenoiserModel, load
    from finetune.estimate.tracing.measure import point

    precision: Precision = "float32" if gpu.device == "cpu" else "bfloat16" if gpu.bfloat16 else "float16"
    if denoiser is not None:
        given, size = load(denoiser), (recipe.data.resolution, recipe.data.resolution)
        return point(given.title, recipe, precision, gpu.device, build=lambda plan: DenoiserModel(plan, given, size))
    with error_location(recipe):
        return point(
            recipe.name, recipe, precision, gpu.device, scan(recipe.data) if recipe.method == "scratch" else None
        )


def plotted(one: Forecast, phases: dict[str, Phase], file: Path) -> None:
    """Write a page with memory over the last traced step, and seconds an image against the batch."""
    charts = [_memory(one, phases["train"]), _time(one)]
    text = render("charts.html.j2", title=f"{one.name} on {one.gpu.name}", charts=charts)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror}", where="--plot", remedy="name another file"
        ) from None


def _memory(one: Forecast, phase: Phase) -> str:
    start = next(section.start for section in reversed(phase.sections) if section.name == "batch")
    sizes: dict[int, int] = {}
    total, points = 0, []
    for number, event in enumerate(phase.events):
        if event.size is not None:
            sizes[event.identifier] = event.size
            total += event.size
        else:
            total -= sizes.pop(event.identifier)
        if number >= start:
            points.append((float(number - start), total / GIB))
    parts: dict[str, int] = {}
    for section in phase.sections:
        if section.start > start and section.name != "end":
            parts.setdefault(section.name, section.start - start)
    said = ", ".join(f"{name} from {place:,}" for name, place in parts.items())
    return svg_charts.chart(
        "GiB allocated, over the allocations of one step", [svg_charts.Line(points, "smooth")], said, from_zero=True
    )


def _time(one: Forecast) -> str:
    profile = profiles.load(one.profile.name) if one.profile.name in profiles.known() else one.profile
    points = []
    for batch in BATCHES if len(profile.variants) > 1 else ():
        pace = step(
            one.variant.micro, (), 1, one.gpu, area=(one.recipe.data.resolution / profile.resolution) ** 2, batch=batch
        )
        points.append((float(batch), pace.seconds / batch))
    return svg_charts.chart(
        "seconds an image, forward and backward, against the batch", [svg_charts.Line(points, "dots")], from_zero=True
    )
