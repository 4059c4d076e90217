"""`ft estimate`: what a run will need before it starts, or which run to start at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from finetune import terminal
from finetune.config.loader import bundled_recipes, load_recipe
from finetune.data.sources.webdataset import images_in, shards_of
from finetune.errors import UserError
from finetune.estimate.benchmarks import quoted
from finetune.estimate.forecast import MOST_IMAGES, Forecast, apply_options, covered_options, fitting, forecast
from finetune.estimate.hardware.cpu import keep, threads
from finetune.estimate.hardware.gpus import DESCRIBED, Gpu, at_price, described, find, this_cpu
from finetune.estimate.hardware.parallelism import Group
from finetune.estimate.recommend import GOALS, Data, choose, considered, for_one_base
from finetune.estimate.text import compared, details
from finetune.paths import embedded

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


@click.command()
@click.argument("recipe", required=False)
@click.option("--images", type=int, help="Number of images in your dataset.")
@click.option(
    "--gpu",
    "gpu_name",
    metavar="NAME",
    help="The GPU, such as rtx3090 (`ft gpus` lists them), or cpu. Default: this machine's GPU, else its CPU.",
)
@click.option("--vram", type=float, help="Memory of an unlisted GPU in GiB; requires --tflops and --bandwidth.")
@click.option("--tflops", type=float, help="Dense 16-bit TFLOP/s of that GPU.")
@click.option("--bandwidth", type=float, help="Memory bandwidth of that GPU in GB/s.")
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
@click.option("--hours", type=float, help="Longest run in hours.")
@click.option("--resolution", type=int, help="Image size in pixels, instead of each recipe's.")
@click.option("--goal", type=click.Choice(list(GOALS)), default="quality", show_default=True, help="What matters most.")
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

    With RECIPE, show that run in detail. Without, compare the recipes that --images images could train on --gpu and
    recommend one.
    """
    if options["calibrate"]:
        terminal.echo(_calibrated())
        if recipe is None and images is None:
            return
    gpu, group = _gpu(gpu_name, options), Group(options["gpus"], options["sharding"])
    if options["resolution"]:
        overrides += (f"data.resolution={options['resolution']}",)
    if recipe is not None or options["denoiser"]:
        one = _one(recipe or "lora/sdxl", gpu, group, images, overrides, options)
        terminal.echo(json.dumps(_values(one), indent=1) if as_json else details(one))
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
    goal, data, budget = options["goal"], options["data"], options["budget"]
    found, left = _rows(overrides, goal, data, budget, gpu, group, images)
    choice = choose(found, images, budget, options["hours"], goal, data)
    if options["write"]:
        _write(choice.forecast, options["write"])
    values = {
        "forecasts": [_values(one) for one in found],
        "recommended": choice.forecast.name,
        "reason": choice.reason,
        "not covered": left,
    }
    values["measured"] = quoted(goal)
    terminal.echo(json.dumps(values, indent=1) if as_json else compared(found, choice, gpu, images, left, goal))


def _rows(
    overrides: tuple[str, ...], goal: str, data: Data, budget: float | None, gpu: Gpu, group: Group, images: int
) -> tuple[list[Forecast], dict[str, list[str]]]:
    """Forecasts of the bundled recipes worth considering, and the recipes that no cost profile covers, by the reason.

    Of several recipes for one base model, the one for the largest GPU that fits. Each has the memory options that make
    it fit; a LoRA has a second row on quantized weights.
    """
    found: list[Forecast] = []
    left: dict[str, list[str]] = {}
    for names in for_one_base(bundled_recipes()):
        recipes = {name: load_recipe(name, overrides) for name in names}
        try:
            plain = [
                forecast(one, name, gpu, images, group=group)
                for name, one in recipes.items()
                if considered(one, goal, data, gpu, budget)
            ]
        except UserError as error:
            if not 1 <= images <= MOST_IMAGES:
                raise
            left.setdefault(error.problem, []).append(names[-1])
            continue
        if plain:
            best = next((one for one in plain if one.fits), plain[-1])
            found += list({_edits_of(one): one for one in (_brought_in(best), *_rounded(best))}.values())
    if not found:
        figures = f" ({said})" if (said := quoted(goal)) else ""
        raise UserError(
            f"no recipe with a cost profile serves --goal {goal}: {GOALS[goal].reason}{figures}",
            where="--goal",
            remedy="use --goal quality or --goal diversity",
        )
    return found, left


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


def _gpu(name: str | None, options: dict[str, Any]) -> Gpu:
    """The GPU that is named or described, else this machine's GPU, else its CPU."""
    given = [options[key] for key in ("vram", "tflops", "bandwidth")]
    if name and any(given):
        raise UserError(
            "--gpu cannot be combined with --vram, --tflops or --bandwidth",
            where="--gpu",
            remedy="use --gpu alone, or --vram, --tflops and --bandwidth",
        )
    if any(given) and not all(given):
        raise UserError(
            "--vram, --tflops and --bandwidth must be given together", remedy=f"use --gpu NAME, or {DESCRIBED}"
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
) -> Forecast:
    """The forecast of one recipe, from its cost profile or, if requested, from a trace."""
    recipe = load_recipe(name, overrides)
    images = images if images is not None else _count(recipe)
    if not (options["trace"] or options["denoiser"] or options["plot"]):
        return forecast(recipe, name, gpu, images, group=group)
    from finetune.cli.estimate_trace import plotted, traced_profile  # torch's side

    profile, phases = traced_profile(recipe, gpu, options["denoiser"])
    one = forecast(recipe, options["denoiser"] or name, gpu, images, group=group, traced=profile)
    if options["plot"]:
        plotted(one, phases, options["plot"])
    return one


def _count(recipe: Any) -> int:
    """Number of images in the recipe's folders, by suffix, with repeats."""
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
    if not count:
        raise UserError(
            "there are no images at data.path to count",
            where=f"data.path: {sources[0][0]}",
            remedy="give the number of images, for example --images 3000",
        )
    return count


def _brought_in(one: Forecast) -> Forecast:
    """The forecast itself if it fits, else with the fastest memory options that make it fit."""
    if one.fits:
        return one
    found = fitting(one)
    return found[0] if found else one


def _rounded(plain: Forecast) -> list[Forecast]:
    """The LoRA on 4-bit weights (QLoRA), if the cost profile covers it and a GPU trains; else nothing."""
    edits = tuple(
        option for option in covered_options(plain) if option.key == "model.quantize" and plain.gpu.device == "cuda"
    )
    if not edits:
        return []
    return [
        _brought_in(
            forecast(apply_options(plain.recipe, edits), plain.name, plain.gpu, plain.images, edits, plain.group)
        )
    ]


def _edits_of(one: Forecast) -> frozenset[str]:
    """The memory options applied, in any order."""
    return frozenset(option.words for option in one.edits)


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


def _values(one: Forecast) -> dict[str, Any]:
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
    }
