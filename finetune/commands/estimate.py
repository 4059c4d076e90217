"""`ft estimate`: what a run will need before it starts, or which run to start at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from finetune.errors import UserError
from finetune.estimate.advice import advice, sets
from finetune.estimate.choose import GOALS, RECIPES, Choice, choose
from finetune.estimate.constants import GIB
from finetune.estimate.forecast import Forecast, fitting, forecast
from finetune.estimate.gpus import DESCRIBED, Gpu, at_price, described, find
from finetune.recipe import ASSETS, embedded, load_recipe

BAR = 12  # characters of a memory bar
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


@click.command()
@click.argument("recipe", required=False)
@click.option("--images", type=int, help="How many pictures you have.")
@click.option("--gpu", "gpu_name", metavar="NAME", help="The GPU, such as rtx3090; `ft gpus` lists them.")
@click.option("--vram", type=float, help="A GPU that is not listed: its memory in GiB, with --tflops and --bandwidth.")
@click.option("--tflops", type=float, help="Its dense 16-bit TFLOP/s.")
@click.option("--bandwidth", type=float, help="Its memory's GB/s.")
@click.option("--gpus", type=click.IntRange(1, 1024), default=1, show_default=True, help="How many of them train together.")
@click.option("--price", type=float, help="USD per hour, instead of the listed price.")
@click.option("--budget", type=float, help="The most USD that the run may cost.")
@click.option("--hours", type=float, help="The most hours that it may take.")
@click.option("--resolution", type=int, help="Side of the pictures, instead of each recipe's.")
@click.option("--goal", type=click.Choice(list(GOALS)), default="quality", show_default=True, help="What matters most.")
@click.option("overrides", "--set", multiple=True, metavar="KEY=VALUE", help="Override one value of RECIPE.")
@click.option("--trace", is_flag=True, help="Run the step on fake tensors: any configuration, in a minute instead of at once.")
@click.option("--denoiser", metavar="CONFIG.json", help="Trace this denoiser of diffusers with RECIPE's settings (lora/sdxl's if none is named).")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.html", help="Draw memory over one step, and time against batch.")
@click.option("--write", type=click.Path(path_type=Path), metavar="FILE", help="Write the recommended recipe, ready to edit.")
@click.option("as_json", "--json", is_flag=True, help="Print everything as JSON.")
def command(recipe: str | None, images: int | None, gpu_name: str | None, overrides: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Say what a run will need: GPU memory, hours, money.

    With RECIPE, that run taken apart. Without, a table of what --images pictures could train on --gpu, and a recommendation.
    """
    gpu, gpus = _gpu(gpu_name, options), options["gpus"]
    if options["resolution"]:
        overrides += (f"data.resolution={options['resolution']}",)
    if recipe is not None or options["denoiser"]:
        one = _one(recipe or "lora/sdxl", gpu, images, overrides, options)
        click.echo(json.dumps(_values(one), indent=1) if as_json else apart(one))
        return
    if options["trace"] or options["plot"]:
        raise UserError("which run?", where="--trace" if options["trace"] else "--plot", remedy="name a recipe: ft estimate lora/sdxl --trace")
    if images is None:
        raise UserError("how many pictures are there?", where="--images", remedy="for example: ft estimate --images 3000 --gpu rtx3090")
    if GOALS[options["goal"]].startswith(("a latent", "exact")):
        raise UserError(GOALS[options["goal"]], where="--goal", remedy="quality, speed and diversity choose between the fine-tuning recipes")
    found = [_brought_in(forecast(load_recipe(name, overrides), name, gpu, images, gpus=gpus)) for name in RECIPES]
    choice = choose(found, images, options["budget"], options["hours"], options["goal"])
    if options["write"]:
        _write(choice.forecast, options["write"])
    values = {"forecasts": [_values(one) for one in found], "recommended": choice.forecast.name, "reason": choice.reason}
    click.echo(json.dumps(values, indent=1) if as_json else compared(found, choice, gpu, images))


def _gpu(name: str | None, options: dict[str, Any]) -> Gpu:
    given = [options[key] for key in ("vram", "tflops", "bandwidth")]
    if name and any(given):
        raise UserError("the GPU is named and described", where="--gpu", remedy="give --gpu alone, or --vram, --tflops and --bandwidth")
    if not name and not any(given):
        name = local_gpu()
    if not name and not all(given):
        raise UserError(
            "a GPU is described by three figures" if any(given) else "no GPU was named, and none is here", remedy=f"--gpu NAME, or {DESCRIBED}"
        )
    gpu = find(name) if name else described(*given)
    return at_price(gpu, options["price"]) if options["price"] is not None else gpu


def local_gpu() -> str | None:
    """The name of this machine's first NVIDIA GPU, as its driver says it."""
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None


def _one(name: str, gpu: Gpu, images: int | None, overrides: tuple[str, ...], options: dict[str, Any]) -> Forecast:
    """The forecast of one recipe, from its card or, where that is asked for, from a trace."""
    recipe, gpus = load_recipe(name, overrides), options["gpus"]
    images = images if images is not None else _count(recipe)
    if not (options["trace"] or options["denoiser"] or options["plot"]):
        return forecast(recipe, name, gpu, images, gpus=gpus)
    from finetune.commands.traced import plotted, traced_card  # torch's side

    card, phases = traced_card(recipe, gpu, options["denoiser"])
    one = forecast(recipe, options["denoiser"] or name, gpu, images, gpus=gpus, traced=card)
    if options["plot"]:
        plotted(one, phases, options["plot"])
    return one


def _count(recipe: Any) -> int:
    """Pictures in the recipe's folders, by their endings; each as often as it is repeated."""
    sources = [(recipe.data.path, 1)] if recipe.data.path else [(source.path, source.repeats) for source in recipe.data.sources]
    count = 0
    for path, repeats in sources:
        folder = Path(embedded(path)).expanduser()
        if folder.is_dir():
            count += repeats * sum(file.suffix.lower() in PICTURES for file in folder.rglob("*"))
    if not count:
        raise UserError(
            "there are no pictures at data.path to be counted",
            where=f"data.path: {sources[0][0]}",
            remedy="say how many there will be: --images 3000",
        )
    return count


def _brought_in(one: Forecast) -> Forecast:
    """As it is if it fits, else with the cheapest edits that make it fit."""
    if one.fits:
        return one
    found = fitting(one)
    return found[0] if found else one


def compared(found: list[Forecast], choice: Choice, gpu: Gpu, images: int) -> str:
    """The table of what could be trained, and the recommendation."""
    price = f" · ${gpu.price.low:.2f}–{gpu.price.high:.2f}/h ({gpu.price.date or 'undated'})" if gpu.price else ""
    lines = [f"{images:,} pictures on {_many(choice.forecast)} · {gpu.visible_gib:.1f} GiB usable{price}"]
    lines.append(f"   {'recipe':<11} {'':<16} {'memory':<{BAR + 13}} {'s/step':>7} {'time':>10} {'cost':>13}")
    for one in found:
        mark = "▸" if one is choice.forecast else " "
        peak = one.memory.peak / GIB
        head = f" {mark} {one.name:<11} {_size(one):<16} {peak:>5.1f} GiB"
        if one.fits:
            edits = "  with " + ", ".join(lever.words for lever in one.edits) if one.edits else ""
            lines.append(f"{head}  {_bar(one):<{BAR}} {one.speed.seconds:>7.2f} {_time(one.hours):>10} {_cost(one):>13}{edits}")
        else:
            lines.append(f"{head}  does not fit: nothing in the recipe brings it under {one.limit / GIB:.1f}")
    best = choice.forecast
    lines += ["", f"Recommended: {best.name}, because {choice.reason}", f"Start:       {_start(best)}", f"How sure:    {how_sure()}"]
    return "\n".join(lines)


def apart(one: Forecast) -> str:
    """One run: memory by part and by phase, time by bound, and the edits that make it fit if it does not."""
    from finetune.report.tables import table

    peak = max(one.memory.parts.values())
    memory = [(name, f"{value / GIB:>7.2f} GiB  {'█' * round(24 * value / peak)}") for name, value in one.memory.parts.items()]
    phases = [(name, f"{value / GIB:>7.2f} GiB{'  ← the peak' if name == one.memory.largest else ''}") for name, value in one.memory.phases.items()]
    pace = one.speed
    bounds = [(name, getattr(pace, name)) for name in ("compute", "bandwidth", "launch", "exchange") if getattr(pace, name)]
    time = [
        ("steps", one.arithmetic),
        (
            "step",
            f"{pace.seconds:.3f} s: "
            + ", ".join(f"{value / pace.seconds:.0%} {name}" for name, value in bounds)
            + f" ({pace.operators:,} operators)",
        ),
        ("time", _time(one.hours) + ", with encoding and samples"),
        ("cost", _cost(one) or "no price is known"),
    ]
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
    return "\n".join([*lines, f"How sure: {how_sure()}"])


def how_sure() -> str:
    """The errors that scripts/check_estimates.py found on published runs; of time with the constants fit on other models than a run's own."""
    found = json.loads((ASSETS / "accuracy.json").read_text(encoding="utf-8"))
    said = [
        f"{name} ±{of['90 %']:.0%} in 90 % of {of['rows']} {runs} (median ±{of['median']:.0%})"
        for name, runs, of in (
            ("memory", "published runs", found["memory"]),
            ("time", "that run torch's own operators", found["s/step, its model left out"]),
        )
    ]
    return "; ".join(said) + "; no run of ours on a GPU was measured yet"


def _start(one: Forecast) -> str:
    return f"ft train {one.name} --set data.path=FOLDER {sets(one)}".rstrip()


def _write(one: Forecast, file: Path) -> None:
    from finetune.recipe import find_recipe

    text = find_recipe(one.name).read_text(encoding="utf-8")
    edits = "".join(f"# ft estimate: {lever.words} makes it fit {one.gpu.name}\n" for lever in one.edits)
    try:
        with open(file, "x", encoding="utf-8") as opened:
            opened.write(edits + text)
    except FileExistsError:
        raise UserError(f"{file} exists already", where="--write", remedy="name another file") from None
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}", where="--write", remedy="name another file") from None


def _values(one: Forecast) -> dict[str, Any]:
    return {
        "recipe": one.name,
        "gpu": one.gpu.id,
        "fits": one.fits,
        "edits": {lever.key: lever.value for lever in one.edits},
        "peak_bytes": one.memory.peak,
        "usable_bytes": one.limit,
        "parts": one.memory.parts,
        "phases": one.memory.phases,
        "steps": one.steps,
        "seconds_per_step": one.speed.seconds,
        "operators": one.speed.operators,
        "hours": one.hours,
        "usd": one.usd,
    }


def _many(one: Forecast) -> str:
    return f"one {one.gpu.name}" if one.gpus == 1 else f"{one.gpus} × {one.gpu.name}"


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
