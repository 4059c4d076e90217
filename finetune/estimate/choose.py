"""The field's rules of choice as data one can read and change: by how many pictures there are, by money, by goal.

The rules say what is sensible; the estimate then says which of it fits, in the time, for the money.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from finetune.errors import UserError
from finetune.estimate.forecast import Forecast


@final
@dataclass(frozen=True)
class Rule:
    """From `least` pictures or USD up to under `most`, `method` is what the field does, because of `reason`."""

    least: float
    most: float
    method: str
    reason: str


BY_IMAGES = (
    Rule(1, 1_000, "lora", "under 1,000 pictures full fine-tuning learns by heart: LoRA"),
    Rule(1_000, 10_000, "lora", "1,000–10,000 pictures call for LoRA"),
    Rule(10_000, float("inf"), "full", "from 10,000 pictures on, full fine-tuning learns more than a LoRA can hold"),
)
BY_BUDGET = (
    Rule(0, 100, "lora", "tens of dollars pay for LoRA (10–100 hours of a consumer GPU)"),
    Rule(100, float("inf"), "full", "hundreds of dollars pay for full fine-tuning (100–1,000 GPU hours)"),
)
# Where all fits, the later base draws better; each was trained at the resolution that its card names.
BY_QUALITY = ("sdxl", "sd21", "sd15", "base")
RECIPES = ("lora/sdxl", "lora/sd21", "lora/sd15", "full/sdxl", "full/sd21", "full/sd15")
GOALS = {
    "quality": "quality and steady training: diffusion, the best base that fits",
    "speed": "fast training: the smallest base that fits",
    "latent": "a latent space: a VAE (recipes/scratch/emoji-vae.yaml)",
    "likelihood": "exact likelihood: an autoregressive model or a flow, which are not here yet",
    "diversity": "diversity: diffusion",
}


@final
@dataclass(frozen=True)
class Choice:
    """The recommended one of several forecasts, and why."""

    forecast: Forecast
    reason: str


def rule(rules: tuple[Rule, ...], amount: float) -> Rule:
    return next(one for one in rules if one.least <= amount < one.most)


def choose(found: list[Forecast], images: int, budget: float | None, hours: float | None, goal: str) -> Choice:
    """Of what fits, in the time, for the money: the method that the pictures call for, of the best base.

    Raises:
        UserError: nothing does; says what the least would be.
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
            f"nothing ends within {hours:g} hours: the least is {least.name} with {least.hours:.1f}", remedy="allow more hours, or a faster GPU"
        )
    paid = [one for one in timely if budget is None or one.usd is None or one.usd[1] <= budget]
    if not paid:
        least = min(timely, key=lambda one: one.usd[1] if one.usd else 0.0)
        cost = f"${least.usd[1]:.2f}" if least.usd else "nothing"
        raise UserError(f"${budget:g} pay for nothing here: the least is {least.name} with {cost}", remedy="allow more, or fewer epochs")
    data = rule(BY_IMAGES, images)
    called = [one for one in paid if one.recipe.method == data.method]
    reason = data.reason if called else f"{data.reason}, but none fits what was given"
    if called and data.method == "full" and budget is not None and rule(BY_BUDGET, budget).method == "lora":
        called, reason = [one for one in paid if one.recipe.method == "lora"] or called, rule(BY_BUDGET, budget).reason
    among = called or paid
    if goal == "speed":
        return Choice(min(among, key=lambda one: one.hours), f"{reason}, and it is the fastest that fits")
    best = min(among, key=lambda one: (BY_QUALITY.index(one.card.name), one.hours))
    return Choice(best, f"{reason}, and it is the best base that fits")
