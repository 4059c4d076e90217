"""The field's rules of choice as data one can read and change: by images, money, device and goal, each with its reason.

The rules say what is sensible; the estimate then says which of it fits, in the time, for the money.
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
LAST = 10_000  # rank of bases without a preference, such as the bundled one


@final
@dataclass(frozen=True)
class Rule:
    """From `least` images, USD or pixels up to under `most`, `methods` are what the field does, the first first, because of `reason`."""

    least: float
    most: float
    methods: tuple[Method, ...]
    reason: str


@final
@dataclass(frozen=True)
class Goal:
    """What matters most, and the kinds of model that are best at it (`FamilySpec.kind`), because of `reason`."""

    kinds: tuple[str, ...]
    reason: str


BY_IMAGES = (
    Rule(1, 1_000, ("lora",), "under 1,000 images full fine-tuning learns by heart: LoRA"),
    Rule(1_000, 10_000, ("lora",), "1,000–10,000 images call for LoRA"),
    Rule(
        10_000,
        1_000_000,
        ("full", "lora"),
        "from 10,000 images on, full fine-tuning learns more than a LoRA can hold",
    ),
    Rule(
        1_000_000,
        INFINITE,
        ("full", "lora"),
        "even millions of images fine-tune: pretraining took Stable Diffusion 150,000 A100 hours, $600,000",
    ),
)
BY_BUDGET = (
    Rule(
        0,
        10,
        ("lora", "scratch"),
        "under $10 pay for a short LoRA, or for a small VAE, flow or diffusion model from scratch",
    ),
    Rule(10, 100, ("lora", "scratch"), "tens of dollars pay for LoRA (10–100 hours of a consumer GPU)"),
    Rule(
        100, INFINITE, ("full", "lora", "scratch"), "hundreds of dollars pay for full fine-tuning (100–1,000 GPU hours)"
    ),
)
SMALL_IMAGES = Rule(
    1,
    INFINITE,
    ("scratch",),
    "small images far from what bases were trained on are learned from scratch, a VAE first",
)
ON_CPU = Rule(0, INFINITE, ("scratch", "lora"), "a CPU is enough for a small VAE, flow or diffusion model from scratch")
GOALS = {
    "quality": Goal(("diffusion",), "quality and steady training: diffusion"),
    "speed": Goal(("GAN",), "speed: a GAN draws in one pass"),
    "latent": Goal(("VAE",), "a latent space: a VAE"),
    "likelihood": Goal(("autoregressive", "flow"), "exact likelihood: an autoregressive model or a flow"),
    "diversity": Goal(("diffusion", "VAE"), "diversity: diffusion or a VAE, which leave no kind of image out"),
}
# Pixels of a side from which a kind is out of the question, and why.
TOO_LARGE = {"autoregressive": (96, "pixel after pixel, an autoregressive model never draws large images")}


@final
@dataclass(frozen=True)
class Choice:
    """The recommended one of several forecasts, why, and the bundled recipe whose run it starts from ("" if none)."""

    forecast: Forecast
    reason: str
    first: str = ""


def rule(rules: tuple[Rule, ...], amount: float) -> Rule:
    """The one whose range holds `amount`, its lower end included."""
    return next(one for one in rules if one.least <= amount < one.most)


def for_one_base(names: Iterable[str]) -> list[list[str]]:
    """Recipes that differ only in the GPU that they are for stand together, the one for the largest first.

    A name such as `lora/flux1-12gb` promises that GPU. Plain ones promise none, and stand below those for `LARGE` ones.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        promise = PROMISE.search(name)
        found.setdefault(PROMISE.sub("", name), []).append((int(promise[1]) if promise else LARGE - 1, name))
    return [[name for _, name in sorted(of, reverse=True)] for of in found.values()]


def considered(recipe: Recipe, goal: str, data: Data, gpu: Gpu, budget: float | None) -> bool:
    """Whether a recipe is worth a row: its method may be called for, and its kind is one of the goal's."""
    kind, kinds = spec_of(recipe.model.family).kind, GOALS[goal].kinds
    small = data == "small-images" or "diffusion" not in kinds
    cheap = gpu.device == "cpu" or (budget is not None and budget < BY_BUDGET[0].most)
    if recipe.method == "scratch":
        return (small or cheap) and (kind in kinds or goal == "quality")
    tries = (recipe.model.path or "").startswith(
        "embedded:"
    )  # the bundled base shows how things go; it draws emoji of 64 pixels
    return data == "images" and kind in kinds and (gpu.device == "cpu" or not tries)


def choose(
    found: list[Forecast], images: int, budget: float | None, hours: float | None, goal: str, data: Data = "images"
) -> Choice:
    """Of what fits, in the time, for the money: the method that the rules call for, and of it the best that serves the goal.

    Raises:
        UserError: nothing does; says what the least would be.
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
            large or f"{aim.reason}; no recipe here is one yet",
            where="--goal",
            remedy="a smaller --resolution" if large else "quality or diversity",
        )
    affordable = _affordable(serving, budget, hours)
    methods, reason = called_for(images, budget, affordable[0].gpu, data, {one.recipe.method for one in serving})
    if goal != "quality":
        reason = f"{aim.reason}; {reason}"
    method = next((one for one in methods if any(each.recipe.method == one for each in affordable)), None)
    among = [one for one in affordable if one.recipe.method == method] or affordable
    if method != methods[0]:
        reason += f", but no {methods[0]} fits what was given"
    best = min(among, key=lambda one: _rank(one, goal))
    return Choice(
        best,
        f"{reason}, and it is the best {'base' if best.recipe.method != 'scratch' else 'of them'} that fits",
        _first(best.recipe),
    )


def called_for(
    images: int, budget: float | None, gpu: Gpu, data: Data, there: set[Method]
) -> tuple[tuple[Method, ...], str]:
    """The methods that the rules call for, the first first, and the reason; of those that are there at all."""
    by_data = (
        SMALL_IMAGES
        if data == "small-images" or there == {"scratch"}
        else ON_CPU
        if gpu.device == "cpu"
        else rule(BY_IMAGES, images)
    )
    if there == {"scratch"} and data == "images":
        return ("scratch",), "such models are trained from scratch"
    if budget is None:
        return by_data.methods, by_data.reason
    by_money = rule(BY_BUDGET, budget)
    both = tuple(method for method in by_data.methods if method in by_money.methods)
    if both == by_data.methods:
        return both, by_data.reason
    return both or by_money.methods, by_money.reason


def _affordable(found: list[Forecast], budget: float | None, hours: float | None) -> list[Forecast]:
    """Those that fit, in the time, for the money.

    Raises:
        UserError: none does.
    """
    fits = [one for one in found if one.fits]
    if not fits:
        least = min(found, key=lambda one: one.memory.peak)
        raise UserError(
            f"nothing here fits {least.gpu.name}: the least is {least.name} with {least.memory.peak / 2**30:.1f} GiB",
            where=f"{least.limit / 2**30:.1f} GiB usable",
            remedy="name a larger GPU; `ft gpus` lists them",
        )
    timely = [one for one in fits if hours is None or one.hours <= hours]
    if not timely:
        least = min(fits, key=lambda one: one.hours)
        raise UserError(
            f"nothing ends within {hours:g} hours: the least is {least.name} with {least.hours:.1f}",
            remedy="allow more hours, or a faster GPU",
        )
    paid = [one for one in timely if budget is None or one.usd is None or one.usd[1] <= budget]
    if not paid:
        least = min(timely, key=lambda one: one.usd[1] if one.usd else 0.0)
        cost = f"${least.usd[1]:.2f}" if least.usd else "nothing"
        raise UserError(
            f"${budget:g} pay for nothing here: the least is {least.name} with {cost}",
            remedy="allow more, or fewer epochs",
        )
    return paid


def _rank(one: Forecast, goal: str) -> tuple[int, float, int, float]:
    """The best base first; of what is from scratch, what was measured to do best at the goal, then what holds most; then what takes least time."""
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
