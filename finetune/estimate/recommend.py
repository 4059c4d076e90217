"""Rules that recommend a recipe, as data: by number of images, budget, device and goal, each with its reason.

The rules say what is sensible; the forecasts say which of it fits the GPU, the time limit and the budget.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, final

from finetune.config.loader import bundled_recipes
from finetune.config.schema import Method, Recipe
from finetune.errors import UserError
from finetune.estimate import benchmarks
from finetune.estimate.forecast import Forecast
from finetune.estimate.hardware.gpus import Gpu
from finetune.models.registry import spec_of, variants
from finetune.paths import run_of

Data = Literal["images", "small-images"]
INFINITE = float("inf")
PROMISE = re.compile(r"-(\d+)gb$")
LARGE = 80  # GB
LAST = 10_000  # rank of base models without a preference, such as the bundled one


@final
@dataclass(frozen=True)
class Rule:
    """From `least` (included) to `most` (excluded) images or USD: the usual `methods`, best first, and the reason."""

    least: float
    most: float
    methods: tuple[Method, ...]
    reason: str


@final
@dataclass(frozen=True)
class Goal:
    """The kinds of model (`FamilySpec.kind`) that serve a goal best, and the reason."""

    kinds: tuple[str, ...]
    reason: str


BY_IMAGES = (
    Rule(1, 1_000, ("lora",), "with fewer than 1,000 images full fine-tuning overfits, and a LoRA less so"),
    Rule(1_000, 10_000, ("lora",), "LoRA suits 1,000–10,000 images"),
    Rule(
        10_000,
        1_000_000,
        ("full", "lora"),
        "with 10,000 images or more, full fine-tuning learns more than a LoRA can hold",
    ),
    Rule(
        1_000_000,
        INFINITE,
        ("full", "lora"),
        "even millions of images are best used for fine-tuning: pretraining Stable Diffusion took 150,000 A100 "
        "hours ($600,000)",
    ),
)
BY_BUDGET = (
    Rule(
        0,
        10,
        ("lora", "scratch"),
        "less than $10 pays for a short LoRA run or a small VAE, flow or diffusion model from scratch",
    ),
    Rule(10, 100, ("lora", "scratch"), "tens of dollars pay for a LoRA (10–100 hours on a consumer GPU)"),
    Rule(
        100, INFINITE, ("full", "lora", "scratch"), "hundreds of dollars pay for full fine-tuning (100–1,000 GPU hours)"
    ),
)
SMALL_IMAGES = Rule(
    1,
    INFINITE,
    ("scratch",),
    "small images unlike the base models' training data are best learned from scratch, starting with a VAE",
)
ON_CPU = Rule(0, INFINITE, ("scratch", "lora"), "a CPU can train a small VAE, flow or diffusion model from scratch")
GOALS = {
    "quality": Goal(("diffusion",), "diffusion models give the best quality and train stably"),
    "speed": Goal(("GAN",), "a GAN generates an image in one pass"),
    "latent": Goal(("VAE",), "a VAE has a latent space"),
    "likelihood": Goal(("autoregressive", "flow"), "autoregressive models and flows compute exact likelihoods"),
    "diversity": Goal(("diffusion", "VAE"), "diffusion models and VAEs cover the whole dataset"),
}
# The largest side in pixels for which a kind of model makes sense, and why.
TOO_LARGE = {
    "autoregressive": (96, "autoregressive models generate pixel by pixel, which is too slow for large images")
}


@final
@dataclass(frozen=True)
class Choice:
    """The recommended forecast, the reason, and the bundled recipe that has to run first ("" if none)."""

    forecast: Forecast
    reason: str
    first: str = ""


def rule(rules: tuple[Rule, ...], amount: float) -> Rule:
    """The rule whose range holds `amount`."""
    return next(one for one in rules if one.least <= amount < one.most)


def for_one_base(names: Iterable[str]) -> list[list[str]]:
    """Group recipes that differ only in the GPU they are made for, the largest GPU first.

    A name such as `lora/flux1-12gb` gives the GPU's memory. Names without one rank just below `LARGE`.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        promise = PROMISE.search(name)
        found.setdefault(PROMISE.sub("", name), []).append((int(promise[1]) if promise else LARGE - 1, name))
    return [[name for _, name in sorted(of, reverse=True)] for of in found.values()]


def considered(recipe: Recipe, goal: str, data: Data, gpu: Gpu, budget: float | None) -> bool:
    """Whether a recipe belongs in the table: its method may be recommended, and its kind serves the goal."""
    kind, kinds = spec_of(recipe.model.family).kind, GOALS[goal].kinds
    small = data == "small-images" or "diffusion" not in kinds
    cheap = gpu.device == "cpu" or (budget is not None and budget < BY_BUDGET[0].most)
    if recipe.method == "scratch":
        return (small or cheap) and (kind in kinds or goal == "quality")
    demo = (recipe.model.path or "").startswith("embedded:")  # the bundled base model: emoji of 64 pixels
    return data == "images" and kind in kinds and (gpu.device == "cpu" or not demo)


def choose(
    found: list[Forecast], images: int, budget: float | None, hours: float | None, goal: str, data: Data = "images"
) -> Choice:
    """Recommend one of the forecasts that fit: by the method that the rules name, the best for the goal.

    Raises:
        UserError: no forecast is within the limits; the message names the closest one.
    """
    aim = GOALS[goal]
    serving = [one for one in found if spec_of(one.recipe.model.family).kind in aim.kinds and not _too_large(one)]
    if not serving:
        large = next(
            (
                TOO_LARGE[kind][1]
                for one in found
                if (kind := spec_of(one.recipe.model.family).kind) in TOO_LARGE and _too_large(one)
            ),
            "",
        )
        raise UserError(
            large or f"no bundled recipe serves --goal {goal}: {aim.reason}",
            where="--goal",
            remedy="use a smaller --resolution" if large else "use --goal quality or --goal diversity",
        )
    affordable = _affordable(serving, budget, hours)
    methods, reason = called_for(images, budget, affordable[0].gpu, data, {one.recipe.method for one in serving})
    if goal != "quality":
        reason = f"{aim.reason}; {reason}"
    method = next((one for one in methods if any(each.recipe.method == one for each in affordable)), None)
    among = [one for one in affordable if one.recipe.method == method] or affordable
    if method != methods[0]:
        reason += f", but no {methods[0]} recipe is within the limits"
    best = min(among, key=lambda one: _rank(one, goal))
    return Choice(
        best,
        f"{reason}, and it is the best {'base model' if best.recipe.method != 'scratch' else 'of them'} that fits",
        _first(best.recipe),
    )


def called_for(
    images: int, budget: float | None, gpu: Gpu, data: Data, there: set[Method]
) -> tuple[tuple[Method, ...], str]:
    """The methods that the rules recommend, best first, and the reason.

    Args:
        there: methods of the recipes to choose from.
    """
    by_data = (
        SMALL_IMAGES
        if data == "small-images" or there == {"scratch"}
        else ON_CPU
        if gpu.device == "cpu"
        else rule(BY_IMAGES, images)
    )
    if there == {"scratch"} and data == "images":
        return ("scratch",), "these models are trained from scratch"
    if budget is None:
        return by_data.methods, by_data.reason
    by_money = rule(BY_BUDGET, budget)
    both = tuple(method for method in by_data.methods if method in by_money.methods)
    if both == by_data.methods:
        return both, by_data.reason
    return both or by_money.methods, by_money.reason


def _affordable(found: list[Forecast], budget: float | None, hours: float | None) -> list[Forecast]:
    """The forecasts that fit the GPU, the time limit and the budget.

    Raises:
        UserError: there are none.
    """
    fits = [one for one in found if one.fits]
    if not fits:
        least = min(found, key=lambda one: one.memory.peak)
        raise UserError(
            f"no recipe fits {least.gpu.name}: the smallest, {least.name}, needs {least.memory.peak / 2**30:.1f} GiB",
            where=f"{least.limit / 2**30:.1f} GiB usable",
            remedy="choose a larger GPU; `ft gpus` lists them",
        )
    timely = [one for one in fits if hours is None or one.hours <= hours]
    if not timely:
        least = min(fits, key=lambda one: one.hours)
        raise UserError(
            f"no recipe finishes within {hours:g} hours: the shortest, {least.name}, takes {least.hours:.1f} hours",
            where="--hours",
            remedy="raise --hours, or choose a faster GPU",
        )
    paid = [one for one in timely if budget is None or one.usd is None or one.usd[1] <= budget]
    if not paid:
        least = min(timely, key=lambda one: one.usd[1] if one.usd else 0.0)
        cost = f"${least.usd[1]:.2f}" if least.usd else "nothing"
        raise UserError(
            f"no recipe costs ${budget:g} or less: the cheapest, {least.name}, costs {cost}",
            where="--budget",
            remedy="raise --budget, or train for fewer epochs",
        )
    return paid


def _rank(one: Forecast, goal: str) -> tuple[int, float, int, float]:
    """Sort key: preferred base models first; from scratch, the best measured figure for the goal, then the most
    parameters; then the shortest run."""
    known = variants()[one.profile.name][1].preference if one.profile.name in variants() else LAST
    if one.recipe.method != "scratch":
        return known, 0.0, 0, one.hours
    return known, benchmarks.standing(one.name.rpartition("/")[2], goal), -one.variant.trained, one.hours


def _too_large(one: Forecast) -> bool:
    most, _ = TOO_LARGE.get(spec_of(one.recipe.model.family).kind, (INFINITE, ""))
    return one.recipe.data.resolution > most


def _first(recipe: Recipe) -> str:
    """The bundled recipe whose run `model.vae` or `model.base_run` names."""
    return next((name for name in bundled_recipes() if run_of(name) in (recipe.model.vae, recipe.model.base_run)), "")
