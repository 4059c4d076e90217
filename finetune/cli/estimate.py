"""`ft estimate`: what a run will need before it starts, or which run to start at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from finetune import terminal
from finetune.config.loader import load_recipe
from finetune.data.sources.webdataset import images_in, shards_of
from finetune.errors import UserError
from finetune.estimate.benchmarks import quoted
from finetune.estimate.forecast import Forecast, forecast
from finetune.estimate.hardware.cpu import keep, threads
from finetune.estimate.hardware.gpus import DESCRIBED, Gpu, at_price, described, find, this_cpu, with_memory
from finetune.estimate.hardware.host import host_memory_of
from finetune.estimate.hardware.parallelism import Group
from finetune.estimate.recommend import GOALS, OVERNIGHT, RENAMED_GOALS, Answer, Question, answer, license_of
from finetune.estimate.text import answered, compared, details, host_note
from finetune.paths import embedded
from finetune.system.cpu_info import host_memory

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


class GoalChoice(click.Choice[str]):
    """The goals; earlier names are accepted."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(RENAMED_GOALS.get(value, value), param, ctx)


@click.command()
@click.argument("recipe", required=False)
@click.option("--images", type=int, help="Number of images in your dataset.")
@click.option(
    "--gpu",
    "gpu_name",
    metavar="NAME",
    help="The GPU, such as rtx3090 (`ft gpus` lists them), or cpu. Default: this machine's GPU, else its CPU.",
)
@click.option("--vram", type=float, help="Memory of an unlisted GPU, or of a Mac, in GiB.")
@click.option("--tflops", type=float, help="Dense 16-bit TFLOP/s of that GPU; without it, time is unknown.")
@click.option("--bandwidth", type=float, help="Memory bandwidth of that GPU in GB/s; without it, time is unknown.")
@click.option(
    "--gpus", type=click.IntRange(1, 1024), default=1, show_default=True, help="Number of GPUs that train together."
)
@click.option(
    "--sharding",
    type=click.Choice(["ddp", "fsdp"]),
    default="ddp",
    show_default=True,
    help="ddp: every GPU holds the whole model; fsdp: the model is sharded.",
)
@click.option("--price", type=float, help="USD per GPU hour, instead of the listed price.")
@click.option("--budget", type=float, help="Highest cost in USD.")
@click.option("--hours", type=float, help=f"Longest run in hours.  [default: {OVERNIGHT:g}, overnight]")
@click.option("--commercial", is_flag=True, help="Leave out base models whose license forbids commercial use.")
@click.option("--all", "all_runs", is_flag=True, help="Show every possible run, not only three.")
@click.option("--resolution", type=int, help="Image size in pixels, instead of each recipe's.")
@click.option(
    "--goal",
    type=GoalChoice(list(GOALS)),
    default="quality",
    show_default=True,
    help="What matters most; sampling-speed: images generated per second, not a short training.",
)
@click.option(
    "--data",
    type=click.Choice(["images", "small-images"]),
    default="images",
    show_default=True,
    help="small-images: small images unlike those that base models were trained on.",
)
@click.option("overrides", "--set", multiple=True, metavar="KEY=VALUE", help="Override one value of RECIPE.")
@click.option(
    "--trace", is_flag=True, help="Run the training step on fake tensors: for any configuration, takes about a minute."
)
@click.option(
    "--denoiser",
    metavar="CONFIG.json",
    help="Trace this diffusers denoiser with the settings of RECIPE (default: lora/sdxl).",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Plot memory over one step, and time against batch size.",
)
@click.option(
    "--write", type=click.Path(path_type=Path), metavar="FILE", help="Write the recommended recipe, ready to edit."
)
@click.option("--calibrate", is_flag=True, help="Measure this machine's CPU first (3 seconds) and save the result.")
@click.option("as_json", "--json", is_flag=True, help="Print everything as JSON.")
def command(
    recipe: str | None,
    images: int | None,
    gpu_name: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Estimate memory, time and cost of a run before it starts.

    With RECIPE, show that run in detail. Without, recommend what to train on --images images: the best, the fastest and
    the cheapest run that --gpu finishes overnight.
    """
    if options["calibrate"]:
        terminal.echo(_calibrated())
        if recipe is None and images is None:
            return
    gpu, group = choose_gpu(gpu_name, options), Group(options["gpus"], options["sharding"])
    described_gpu = gpu_name is not None or options["vram"] is not None
    if options["resolution"]:
        overrides += (f"data.resolution={options['resolution']}",)
    if recipe is not None or options["denoiser"]:
        one, counted = _one(recipe or "lora/sdxl", gpu, group, images, overrides, options)
        notes = [] if described_gpu or not (note := host_note(one, host_memory())) else [note]
        values = _values(one)
        if not counted:
            values |= dict.fromkeys(("steps", "hours", "usd"))
        terminal.echo(json.dumps(values, indent=1) if as_json else "\n".join([details(one, not counted), *notes]))
        return
    if options["trace"] or options["plot"]:
        raise UserError(
            "--trace needs a recipe" if options["trace"] else "--plot needs a recipe",
            where="--trace" if options["trace"] else "--plot",
            remedy="for example: ft estimate lora/sdxl --trace",
        )
    if images is None:
        raise UserError(
            "ft estimate needs a recipe or --images",
            where="--images",
            remedy="for example: ft estimate lora/sdxl, or ft estimate --images 3000 --gpu rtx3090",
        )
    limits = {key: options[key] for key in ("hours", "budget", "goal", "data", "commercial")}
    asked = Question(images, gpu, group, overrides=overrides, **limits)
    found = answer(asked)
    if options["write"]:
        _write(found.choice.forecast, options["write"])
    if as_json:
        terminal.echo(json.dumps(_all_values(found, asked), indent=1))
    elif options["all_runs"]:
        terminal.echo(compared(found, asked))
    else:
        note = "" if described_gpu else host_note(found.choice.forecast, host_memory())
        terminal.echo(answered(found, asked, [note] if note else []))


def _calibrated() -> str:
    """Measure this machine's CPU and save the result; returns the line to print."""
    import diffusers  # so that the process has the memory of a training process
    import torch

    from finetune.estimate.hardware.calibrate import calibrate

    torch.set_num_threads(threads())
    found = calibrate()
    rates = ", ".join(
        f"{kind} {getattr(found, kind).rate / 1e9:.0f} GFLOP/s" for kind in ("matmul", "conv", "attention")
    )
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return (
        f"{found.name}, {found.threads} threads: {rates}, memory {found.other.rate / 1e9:.1f} GB/s "
        f"({versions})\nsaved to {keep(found)}"
    )


def choose_gpu(name: str | None, options: dict[str, Any]) -> Gpu:
    """The GPU that is named or described, else this machine's GPU, else its CPU."""
    given = [options[key] for key in ("vram", "tflops", "bandwidth")]
    if name and given[0] and not any(given[1:]) and (mac := find(name)).platform == "mps":
        return with_memory(mac, given[0])
    if name and any(given):
        raise UserError(
            "--gpu cannot be combined with --vram, --tflops or --bandwidth",
            where="--gpu",
            remedy="use --gpu alone, or --vram, --tflops and --bandwidth",
        )
    if any(given) and (given[0] is None or (given[1] is None) != (given[2] is None)):
        raise UserError(
            "--tflops and --bandwidth must be given together, with --vram",
            remedy=f"use --gpu NAME, or {DESCRIBED}, or --vram alone for memory without time",
        )
    name = name or (None if any(given) else local_gpu() or "cpu")
    if name and name.lower() == "cpu":
        if options["gpus"] > 1 or options["price"] is not None:
            raise UserError(
                "--gpus and --price do not apply to a CPU", where="--gpu cpu", remedy="name a GPU: --gpu rtx3090"
            )
        return this_cpu()
    gpu = find(name) if name else described(*given)
    return at_price(gpu, options["price"]) if options["price"] is not None else gpu


def local_gpu() -> str | None:
    """The name of this machine's first NVIDIA GPU, as its driver reports it."""
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None


def _one(
    name: str, gpu: Gpu, group: Group, images: int | None, overrides: tuple[str, ...], options: dict[str, Any]
) -> tuple[Forecast, bool]:
    """The forecast of one recipe, from its cost profile or, if requested, from a trace, and whether images are known."""
    recipe = load_recipe(name, overrides)
    counted = images if images is not None else _count(recipe)
    images = counted if counted is not None else 1
    if not (options["trace"] or options["denoiser"] or options["plot"]):
        return forecast(recipe, name, gpu, images, group=group), counted is not None
    from finetune.cli.estimate_trace import plotted, traced_profile  # torch's side

    profile, phases = traced_profile(recipe, gpu, options["denoiser"])
    one = forecast(recipe, options["denoiser"] or name, gpu, images, group=group, traced=profile)
    if options["plot"]:
        plotted(one, phases, options["plot"])
    return one, counted is not None


def _count(recipe: Any) -> int | None:
    """Number of images in the recipe's folders, by suffix, with repeats; None if there are none."""
    sources = (
        [(recipe.data.path, 1)]
        if recipe.data.path
        else [(source.path, source.repeats) for source in recipe.data.sources]
    )
    count = 0
    for path, repeats in sources:
        folder = Path(embedded(path)).expanduser()
        count += repeats * sum(images_in(shard, IMAGES) for shard in shards_of(folder))
        if folder.is_dir():
            count += repeats * sum(file.suffix.lower() in IMAGES for file in folder.rglob("*"))
    return count or None


def _write(one: Forecast, file: Path) -> None:
    from finetune.config.loader import find_recipe

    text = find_recipe(one.name).read_text(encoding="utf-8")
    edits = "".join(f"# ft estimate: {option.words} makes it fit {one.gpu.name}\n" for option in one.edits)
    try:
        with open(file, "x", encoding="utf-8") as opened:
            opened.write(edits + text)
    except FileExistsError:
        raise UserError(f"{file} already exists", where="--write", remedy="choose another file") from None
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror}", where="--write", remedy="choose another file"
        ) from None


def _all_values(found: Answer, asked: Question) -> dict[str, Any]:
    return {
        "forecasts": [_values(one) for one in found.forecasts],
        "choices": {
            key: {"recipe": one.forecast.name, "gpu": one.forecast.gpu.id, "reason": one.reason, "first": one.first}
            | {"hours": one.forecast.hours, "usd": one.forecast.usd, "peak_bytes": one.forecast.memory.peak}
            for key, one in found.choices.items()
        },
        "recommended": found.choice.forecast.name,
        "reason": found.reason,
        "not covered": found.excluded,
        "measured": quoted(asked.goal),
    }


def _values(one: Forecast) -> dict[str, Any]:
    base = license_of(one)
    return {
        "recipe": one.name,
        "gpu": one.gpu.id,
        "fits": one.fits,
        "edits": {option.key: option.value for option in one.edits},
        "peak_bytes": one.memory.peak,
        "usable_bytes": one.limit,
        "parts": one.memory.parts,
        "phases": one.memory.phases,
        "steps": one.steps,
        "seconds_per_step": one.speed.seconds,
        "operators": one.speed.operators,
        "hours": one.hours,
        "usd": one.usd,
        "host_bytes": host_memory_of(one.profile, one.variant, one.recipe).needed,
        "license": base.license if base else None,
        "commercial": base.commercial if base else None,
    }
