"""Which recipe to train: rules as data, and the answer in three choices (best, fastest, cheapest) with their reasons.

The rules say what is sensible for the images, the goal and the device; the forecasts say what of it fits the GPU, the
time limit and the budget. docs/explanation/recommendations.md explains the rules and holds twelve answers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, final

from finetune.config.loader import bundled_recipes, load_recipe
from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.estimate import benchmarks
from finetune.estimate.constants import GIB
from finetune.estimate.forecast import (
    MOST_IMAGES,
    Forecast,
    MemoryOption,
    apply_options,
    covered_options,
    fitting,
    forecast,
)
from finetune.estimate.hardware.gpus import Gpu, known
from finetune.estimate.hardware.host import host_memory_of
from finetune.estimate.hardware.parallelism import ALONE, Group
from finetune.models.registry import spec_of, variants
from finetune.models.spec import Variant
from finetune.paths import run_of
from finetune.terminal import plural

Data = Literal["images", "small-images"]
INFINITE = float("inf")
PROMISE = re.compile(r"-(\d+)gb$")
LARGE = 80  # GB
OVERNIGHT = 12.0  # hours: the longest run that is recommended unless --hours says otherwise
SUPPORTED = 60  # preference: up to here at least five other trainers publish settings for the base
LAST = 1_000  # preference of bases without one, such as the bundled base
# A LoRA holds less and less of a larger set, and full fine-tuning forgets more and more with a smaller one. Both costs
# grow smoothly, so the answer has no step: they are points of `preference` per factor of ten in images.
LORA_HOLDS, FULL_NEEDS = 1_000, 10_000  # images
PER_DECADE = 80
HIGHER_RANK_FROM, HIGHER_RANK = 200, 32  # images; ranks 32-64 are usual above (SimpleTuner, LYCORIS.md)
FULL_FROM = 200  # images; below, public guides fine-tune a LoRA (docs/explanation/recommendations.md)
SCRATCH_FROM = 400  # images, as many as the bundled ones that the recipes from scratch are measured on; more is better
ROUNDED, SMALLER, LOWER_RANK = 5, 40, 20  # points of preference that a base in 4 bits, fewer pixels, rank 4 cost
SLOWER = 1.2  # runs take about a fifth longer than estimated, so overnight leaves room for it
MARGIN, TIGHT = 0.05, 15  # a peak this close to the GPU's memory, within the error of the estimate, costs as much
NOT_RENTED = ("b200", "h100-pcie", "h100-sxm", "h200")  # times on them come out a quarter too low, so costs too
ON_CPU = ("lora", "scratch", "full")  # methods on a CPU, best first


@final
@dataclass(frozen=True)
class Rule:
    """From `least` (included) to `most` (excluded) images: what is usual, and why."""

    least: float
    most: float
    reason: str


@final
@dataclass(frozen=True)
class Goal:
    """The kinds of model (`FamilySpec.kind`) that serve a goal best, and the reason."""

    kinds: tuple[str, ...]
    reason: str


BY_IMAGES = (
    Rule(1, 200, "with {images} full fine-tuning overfits, so train a LoRA"),
    Rule(200, LORA_HOLDS, "{images} suit a LoRA of a higher rank; full fine-tuning would forget more than it learns"),
    Rule(LORA_HOLDS, FULL_NEEDS, "with {images} both a LoRA and full fine-tuning are sensible"),
    Rule(FULL_NEEDS, 1_000_000, "{images} hold more than a LoRA can learn, so fine-tune all weights if they fit"),
    Rule(
        1_000_000,
        INFINITE,
        "even millions of images are best used for fine-tuning: pretraining Stable Diffusion took 150,000 A100 hours",
    ),
)
SMALL_IMAGES = "small images unlike the base models' training data are best learned from scratch, starting with a VAE"
GOALS = {
    "quality": Goal(("diffusion",), "diffusion models give the best quality and train stably"),
    "sampling-speed": Goal(("GAN",), "a GAN generates an image in one pass (sampling speed, not training time)"),
    "latent": Goal(("VAE",), "a VAE has a latent space"),
    "likelihood": Goal(("autoregressive", "flow"), "autoregressive models and flows compute exact likelihoods"),
    "diversity": Goal(("diffusion", "VAE"), "diffusion models and VAEs cover the whole dataset"),
}
RENAMED_GOALS = {"speed": "sampling-speed"}
NOT_ON_MAC = "needs 4-bit weights or 8-bit AdamW, which need CUDA, or more memory than this Mac has"
# The largest side in pixels for which a kind of model makes sense, and why.
TOO_LARGE = {
    "autoregressive": (96, "autoregressive models generate pixel by pixel, which is too slow for large images")
}


@final
@dataclass(frozen=True)
class Question:
    """What is to be trained on what, within which limits.

    Attributes:
        hours: longest run; None: overnight if anything finishes by then.
        budget: highest cost in USD.
        commercial: leave out bases whose license forbids commercial use.
        rent: also look for the rented GPU that trains the recommended base at the lowest cost.
        overrides: `KEY=VALUE` for every recipe.
    """

    images: int
    gpu: Gpu
    group: Group = ALONE
    hours: float | None = None
    budget: float | None = None
    goal: str = "quality"
    data: Data = "images"
    commercial: bool = False
    rent: bool = True
    overrides: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Choice:
    """One forecast, the reason in a sentence, and the bundled recipe that has to run first ("" if none)."""

    forecast: Forecast
    reason: str
    first: str = ""


@final
@dataclass(frozen=True)
class Answer:
    """The three choices and what stands behind them.

    Attributes:
        recommended: the key of the choice that is recommended.
        choices: "best", "fastest" and "cheapest".
        reason: why the recommended recipe trains what it trains.
        forecasts: every recipe that the rules allow, by use: fitting ones first, best first.
        excluded: recipes that no cost profile covers, by the reason.
        limit: hours that the choices finish within; infinite if nothing does.
    """

    recommended: str
    choices: dict[str, Choice]
    reason: str
    forecasts: tuple[Forecast, ...]
    excluded: dict[str, list[str]]
    limit: float

    @property
    def choice(self) -> Choice:
        """The recommended choice."""
        return self.choices[self.recommended]


def answer(asked: Question) -> Answer:
    """The best, the fastest and the cheapest recipe for a question.

    Raises:
        UserError: nothing serves the goal, fits the GPU, or is within the limits; the message names the closest.
    """
    found, excluded = candidates(asked)
    return choose(found, asked, excluded)


def candidates(asked: Question) -> tuple[list[Forecast], dict[str, list[str]]]:
    """Forecasts of the recipes that the rules allow, and the recipes that no cost profile covers, by the reason.

    Of several recipes for one base, the one for the largest GPU that fits. Each has the memory options that make it
    fit; a LoRA has a second row on quantized weights.
    """
    found: list[Forecast] = []
    excluded: dict[str, list[str]] = {}
    for names in for_one_base(name for name in bundled_recipes() if _method_allowed(name.partition("/")[0], asked)):
        recipes = {name: load_recipe(name, asked.overrides) for name in names}
        allowed = {name: one for name, one in recipes.items() if considered(one, asked)}
        if not allowed:
            continue
        try:
            plain = [_sized(one, name, asked) for name, one in allowed.items()]
        except UserError as error:
            if not 1 <= asked.images <= MOST_IMAGES:
                raise
            excluded.setdefault(error.problem, []).append(names[-1])
            continue
        if asked.gpu.platform == "mps":
            plain = [one for one in plain if _runs_on_mac(one)]
            if not plain:
                excluded.setdefault(NOT_ON_MAC, []).append(names[-1])
                continue
        best = next((one for one in plain if one.fits), plain[-1])
        found += list({_edits_of(one): one for one in (_brought_in(best), *_rounded(best))}.values())
    if not found:
        raise _nothing(asked)
    return found, excluded


def considered(recipe: Recipe, asked: Question) -> bool:
    """Whether a recipe is sensible at all: its kind serves the goal, and there are enough images for its method."""
    kinds = GOALS[asked.goal].kinds
    if spec_of(recipe.model.family).kind not in kinds or (asked.commercial and _license(recipe).commercial == "no"):
        return False
    if not _method_allowed(recipe.method, asked):
        return False
    if recipe.method == "scratch":
        return True
    on_cpu = asked.gpu.device == "cpu"
    demo = (recipe.model.path or "").startswith("embedded:")  # the bundled base model: emoji of 64 pixels
    small = asked.data == "small-images" and asked.images >= SCRATCH_FROM
    return demo if on_cpu and not small else not demo and not small


def _method_allowed(method: str, asked: Question) -> bool:
    """Whether there are enough images for a method, and the goal, the images or the device call for it."""
    if method == "scratch":
        wanted = asked.data == "small-images" or "diffusion" not in GOALS[asked.goal].kinds or asked.gpu.device == "cpu"
        return wanted and asked.images >= SCRATCH_FROM
    return method != "full" or asked.images >= FULL_FROM


def choose(found: list[Forecast], asked: Question, excluded: dict[str, list[str]] | None = None) -> Answer:
    """The three choices among forecasts.

    Raises:
        UserError: no forecast is within the limits; the message names the closest one.
    """
    aim = GOALS[asked.goal]
    serving = [one for one in found if spec_of(one.recipe.model.family).kind in aim.kinds and not _too_large(one)]
    if not serving:
        large = next((TOO_LARGE[kind][1] for one in found if (kind := _kind(one)) in TOO_LARGE and _too_large(one)), "")
        raise UserError(
            large or f"no bundled recipe serves --goal {asked.goal}: {aim.reason}",
            where="--goal",
            remedy="use a smaller --resolution" if large else "use --goal quality or --goal diversity",
        )
    timed = asked.gpu.timed
    affordable, limit = _affordable(serving, asked.budget if timed else None, asked.hours if timed else None, timed)
    ranked = sorted(affordable, key=lambda one: cost_in_points(one, asked))
    best = ranked[0]
    alike = [one for one in ranked if _comparable(one, best)]
    fastest = min(alike, key=lambda one: (one is not best and _tight(one), one.hours))
    choices = {
        "best": Choice(best, _why_best(best, limit, timed), _first(best.recipe)),
        "fastest": Choice(fastest, _why_fastest(fastest, best), _first(fastest.recipe)),
        "cheapest": _cheapest(best, asked, limit),
    }
    order = sorted(found, key=lambda one: (not one.fits, one not in affordable, cost_in_points(one, asked)))
    return Answer("best", choices, _why(best, asked), tuple(order), excluded or {}, limit)


def cost_in_points(one: Forecast, asked: Question) -> tuple[float, float, int, float]:
    """Sort key, best first: the rank of the base, plus what the number of images makes of the method, plus what the
    memory options cost; from scratch, the best measured figure, then the most parameters; then the shortest run.
    """
    if one.recipe.method == "scratch" or _preference(one) == LAST:
        method = ON_CPU.index(one.recipe.method) if asked.data == "images" else 0
        standing = benchmarks.standing(one.name.rpartition("/")[2], asked.goal)
        return method, standing, -one.variant.trained, one.hours
    points = _preference(one) + PER_DECADE * _decades(one.recipe.method, asked.images)
    for option in one.edits:
        points += {"model.quantize": ROUNDED, "data.resolution": SMALLER}.get(option.key, 0)
        points += LOWER_RANK if option.key == "adapter.rank" and option.value < HIGHER_RANK else 0
    if _tight(one):
        points += TIGHT
    return points, 0.0, 0, one.hours


def for_one_base(names: Iterable[str]) -> list[list[str]]:
    """Group recipes that differ only in the GPU they are made for, the largest GPU first.

    A name such as `lora/flux1-12gb` gives the GPU's memory. Names without one rank just below `LARGE`.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        promise = PROMISE.search(name)
        found.setdefault(PROMISE.sub("", name), []).append((int(promise[1]) if promise else LARGE - 1, name))
    return [[name for _, name in sorted(of, reverse=True)] for of in found.values()]


def license_of(one: Forecast) -> Variant | None:
    """The published checkpoint that a forecast trains; None from scratch and for the bundled base."""
    return variants()[one.profile.name][1] if one.profile.name in variants() else None


def _license(recipe: Recipe) -> Variant:
    found = spec_of(recipe.model.family).variants
    return next(
        (one for one in found.values() if recipe.model.path in one.hub), next(iter(found.values()), Variant((), 0))
    )


def _preference(one: Forecast) -> int:
    found = license_of(one)
    return found.preference if found else LAST


def _tight(one: Forecast) -> bool:
    return one.memory.peak > (1 - MARGIN) * one.limit


def _decades(method: str, images: int) -> float:
    """How many factors of ten the number of images is above what a LoRA holds, or below what full fine-tuning needs."""
    ratio = images / LORA_HOLDS if method == "lora" else FULL_NEEDS / images
    return max(0.0, math.log10(ratio))


def _sized(recipe: Recipe, name: str, asked: Question) -> Forecast:
    """The forecast of a recipe as it comes; a LoRA for many images at a higher rank, with alpha in proportion, and for
    the length of a mixed set: the recipe is made for one subject."""
    edits: tuple[MemoryOption, ...] = ()
    adapter = recipe.adapter
    embedded = (recipe.model.path or "").startswith("embedded:")
    if adapter and asked.images >= HIGHER_RANK_FROM and adapter.rank < HIGHER_RANK and not embedded:
        also: tuple[tuple[str, Any], ...] = (("train.purpose", "general"),)
        if adapter.alpha is not None:
            also += (("adapter.alpha", float(f"{adapter.alpha * HIGHER_RANK / adapter.rank:g}")),)
        edits = (MemoryOption("adapter.rank", HIGHER_RANK, "more capacity for more images", also),)
    return forecast(apply_options(recipe, edits), name, asked.gpu, asked.images, edits, asked.group)


def _brought_in(one: Forecast) -> Forecast:
    """The forecast itself if it fits, else with the fastest memory options that make it fit."""
    if one.fits:
        return one
    found = fitting(one)
    return found[0] if found else one


def _rounded(plain: Forecast) -> list[Forecast]:
    """The LoRA on 4-bit weights (QLoRA), if the cost profile covers it and a GPU trains; else nothing."""
    edits = tuple(
        option
        for option in covered_options(plain)
        if option.key == "model.quantize" and plain.gpu.device == "cuda" and plain.gpu.platform != "mps"
    )
    if not edits:
        return []
    both = (*plain.edits, *edits)
    return [
        _brought_in(
            forecast(apply_options(plain.recipe, edits), plain.name, plain.gpu, plain.images, both, plain.group)
        )
    ]


def _runs_on_mac(one: Forecast) -> bool:
    """Whether nothing of a run needs CUDA, and its weights load into the unified memory."""
    needs = host_memory_of(one.profile, one.variant, one.recipe).needed
    eight_bit = one.recipe.optimizer.name == "adamw8bit"
    return not (one.recipe.model.quantize or eight_bit or needs > one.gpu.sold_gb * GIB)


def _edits_of(one: Forecast) -> frozenset[str]:
    """The edits applied, in any order."""
    return frozenset(option.words for option in one.edits)


def _affordable(
    found: list[Forecast], budget: float | None, hours: float | None, timed: bool
) -> tuple[list[Forecast], float]:
    """The forecasts that fit the GPU, the time limit and the budget, and the hours that they finish within.

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
    limit = hours if hours is not None else OVERNIGHT if timed else INFINITE
    timely = [one for one in fits if one.hours <= (limit if hours is not None or limit == INFINITE else limit / SLOWER)]
    if not timely and hours is None:
        timely, limit = fits, INFINITE  # nothing finishes overnight
    if not timely:
        least = min(fits, key=lambda one: one.hours)
        raise UserError(
            f"no recipe finishes within {limit:g} hours: the shortest, {least.name}, takes {least.hours:.1f} hours",
            where="--hours",
            remedy="raise --hours, or choose a faster GPU",
        )
    paid = [one for one in timely if budget is None or one.usd is None or one.usd[1] <= budget]
    if not paid:
        least = min(timely, key=lambda one: one.usd[1] if one.usd else 0.0)
        price = f"${least.usd[1]:.2f}" if least.usd else "nothing"
        raise UserError(
            f"no recipe costs ${budget:g} or less: the cheapest, {least.name}, costs {price}",
            where="--budget",
            remedy="raise --budget, or choose a cheaper GPU (`ft gpus`)",
        )
    return paid, limit


def _comparable(one: Forecast, best: Forecast) -> bool:
    """Whether a forecast is worth naming as the fastest: on a widely supported base, or like the best one."""
    if one is best or best.recipe.method == "scratch":
        return one.recipe.data.resolution == best.recipe.data.resolution
    return _preference(one) <= max(SUPPORTED, _preference(best))


def _cheapest(best: Forecast, asked: Question, limit: float) -> Choice:
    """The recommended base where it costs least: here, or on a rented GPU.

    On a CPU, whose bundled base knows emoji only, it is a LoRA on a base for photographs on a rented GPU.
    """
    rented = _rented(best, asked, limit) if asked.rent and asked.group.count == 1 else None
    if rented and rented.usd and (best.usd is None or rented.usd[1] < best.usd[1]):
        photographs = best.gpu.device == "cpu"
        reason = "for photographs, rent a GPU: " if photographs else "the same base at the lowest listed price: "
        return Choice(rented, f"{reason}one rented {rented.gpu.name}")
    if best.usd is None:
        return Choice(best, "the same: your own machine costs electricity only")
    return Choice(best, "the same: no listed GPU trains it for less within the limits")


def _rented(best: Forecast, asked: Question, limit: float) -> Forecast | None:
    """The base of `best` on the GPU with the lowest cost within the limits; on a CPU, Stable Diffusion XL."""
    name = PROMISE.sub("", best.name)
    if best.gpu.device == "cpu":
        if best.recipe.method != "lora" or asked.data != "images":
            return None
        name = "lora/sdxl"
    names = next((names for names in for_one_base(bundled_recipes()) if PROMISE.sub("", names[0]) == name), [])
    recipes = {one: load_recipe(one, asked.overrides) for one in names}
    found = []
    for gpu in known():
        if gpu.price is None or not gpu.timed or gpu.platform or gpu.id in NOT_RENTED:
            continue
        here = dataclasses.replace(asked, gpu=gpu, group=ALONE)
        one = next((one for name, recipe in recipes.items() if (one := _sized(recipe, name, here)).fits), None)
        if one and one.usd and one.hours <= limit and (asked.budget is None or one.usd[1] <= asked.budget):
            found.append(one)
    return min(found, key=lambda one: one.usd[1] if one.usd else INFINITE, default=None)


def _why(best: Forecast, asked: Question) -> str:
    """Why this method for these images and this goal, in a clause."""
    aim = f"{GOALS[asked.goal].reason}; " if asked.goal != "quality" else ""
    if best.recipe.method == "scratch":
        return aim + (SMALL_IMAGES if asked.data == "small-images" else "these models are trained from scratch")
    if best.gpu.device == "cpu":
        return f"{aim}the bundled base is the one that a CPU fine-tunes; it is trained on emoji at 64×64 pixels"
    rule = next(one for one in BY_IMAGES if one.least <= asked.images < one.most)
    return aim + rule.reason.format(images=plural(asked.images, "image"))


def _why_best(best: Forecast, limit: float, timed: bool) -> str:
    what = "the best of them" if best.recipe.method == "scratch" else "the highest-ranked base"
    if best.gpu.device == "cpu" and best.recipe.method != "scratch":
        return "a LoRA on the bundled base, in minutes; to learn how training goes, not for photographs"
    if not timed:
        return f"{what} that fits"
    if limit == INFINITE:
        return f"{what} that fits; nothing finishes overnight ({OVERNIGHT:g} h)"
    return f"{what} that fits and finishes {'overnight' if limit == OVERNIGHT else f'within {limit:g} h'}"


def _why_fastest(fastest: Forecast, best: Forecast) -> str:
    if not fastest.gpu.timed:
        return "the least work of the widely supported bases that fit"
    if fastest is best:
        return "the same: nothing comparable that fits is quicker"
    ratio = best.hours / fastest.hours
    what = "a lighter model"
    if best.recipe.method != "scratch":
        lower = "a lower-ranked base" if _preference(fastest) > _preference(best) else "another base or method"
        what = f"a LoRA on {lower}" if best.recipe.method == "full" and fastest.recipe.method == "lora" else lower
    return f"{f'{ratio:.0f} times as fast' if ratio >= 1.5 else 'quicker'}: {what}"


def _nothing(asked: Question) -> UserError:
    aim = GOALS[asked.goal]
    fewest = "diffusion" not in aim.kinds and asked.images < SCRATCH_FROM
    if fewest:
        return UserError(
            f"--goal {asked.goal} means training from scratch, which needs about {SCRATCH_FROM:,} images: {aim.reason}",
            where="--images",
            remedy="use --goal quality; its `fastest` line is the shortest training",
        )
    figures = f" ({quoted})" if (quoted := benchmarks.quoted(asked.goal)) else ""
    return UserError(
        f"no recipe with a cost profile serves --goal {asked.goal}: {aim.reason}{figures}",
        where="--goal",
        remedy="use --goal quality or --goal diversity",
    )


def _kind(one: Forecast) -> str:
    return spec_of(one.recipe.model.family).kind


def _too_large(one: Forecast) -> bool:
    most, _ = TOO_LARGE.get(_kind(one), (INFINITE, ""))
    return one.recipe.data.resolution > most


def _first(recipe: Recipe) -> str:
    """The bundled recipe whose run `model.vae` or `model.base_run` names."""
    return next((name for name in bundled_recipes() if run_of(name) in (recipe.model.vae, recipe.model.base_run)), "")
