"""From purpose and number of images to the length of a run, and every interval that follows from it. Torch-free.

`planning.make_plan` and `estimate.forecast` call `resolve`: what `ft estimate` prints is what `ft train` takes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import final

from finetune.config.schema import Recipe
from finetune.config.training_table import (
    ANY_BASE,
    BASES,
    FEW,
    LEAST_UPDATES,
    LENGTHS,
    MOST_PASSES,
    NOUNS,
    RANGES,
    SUBJECT_UP_TO,
    Base,
    Purpose,
)
from finetune.models.registry import spec_of
from finetune.terminal import plural

TABLE = "docs/how-to/choose-settings.md"
PARTS = 8  # samples, checkpoints and validations of a run whose recipe gives no interval
LEAST_INTERVAL = 20  # steps
MOST_BETWEEN_CHECKPOINTS = 1_000  # steps: more would be lost by a crash
MOST_WARMUP = 0.1  # share of the run
MANY_OF_A_SUBJECT = 200  # images
PROMPTS = 4  # samples whose prompts are taken from the captions


@final
@dataclass(frozen=True)
class Facts:
    """What the length depends on besides the recipe.

    Attributes:
        images: that train, without generated class images.
        share: of the examples that are theirs; the rest are class images.
        batch: examples of one update, of all processes together.
    """

    images: int
    batch: int
    share: float = 1.0


def resolve(recipe: Recipe, facts: Facts, steps_per_epoch: float) -> tuple[Recipe, int, tuple[str, ...]]:
    """The recipe with every number that depends on the length of the run, the length in steps, and how it comes about.

    An explicit `train.steps` or `train.epochs` is kept as it is.
    """
    train, words = recipe.train, tuple[str, ...]()
    if train.steps is not None:
        steps = train.steps
    elif train.epochs is not None:
        steps = max(1, math.ceil(steps_per_epoch * train.epochs - 1e-9))
    else:
        steps = updates(recipe, facts)
        train = dataclasses.replace(train, steps=steps)
        words = (_explained(recipe, facts, steps),)
    interval = max(min(LEAST_INTERVAL, steps), math.ceil(steps / PARTS))
    optimizer, sample = recipe.optimizer, recipe.sample
    train = dataclasses.replace(
        train,
        checkpoint_every=train.checkpoint_every or min(interval, MOST_BETWEEN_CHECKPOINTS),
        validate_every=train.validate_every or interval,
    )
    if optimizer.warmup:
        optimizer = dataclasses.replace(optimizer, warmup=0.0, warmup_steps=int(optimizer.warmup * steps))
    if sample.every is None:
        sample = dataclasses.replace(sample, every=interval)
    return dataclasses.replace(recipe, train=train, optimizer=optimizer, sample=sample), steps, words


def share(recipe: Recipe, examples: int) -> float:
    """The share of a run's examples that are no class images. DreamBooth uses equal numbers: at least a half counts."""
    return max(0.5, examples / (examples + recipe.prior.images)) if recipe.prior is not None else 1.0


def purpose_of(recipe: Recipe, images: int) -> Purpose:
    """`train.purpose`, or what the number of images suggests."""
    return recipe.train.purpose or ("subject" if images <= SUBJECT_UP_TO else "general")


def base_of(recipe: Recipe) -> Base:
    """The row of the recipe's base; other checkpoints have their family's first."""
    variants = spec_of(recipe.model.family).variants
    name = next((name for name, one in variants.items() if recipe.model.path in one.hub), None)
    return next((BASES[one] for one in (name, *variants) if one in BASES), ANY_BASE)


def passes(method: str, purpose: Purpose, images: int, factor: float = 1.0) -> int:
    """Image passes that the table recommends."""
    row = LENGTHS[method, purpose]
    few = min(row.per_image * images, row.few)
    total = max(few, row.per_image_later * images if images > FEW else 0)
    return round(max(min(total, row.most) * factor, row.least, min(images, MOST_PASSES)))


def updates(recipe: Recipe, facts: Facts) -> int:
    """Steps of the optimizer for a recipe that gives no length."""
    own = passes(recipe.method, purpose_of(recipe, facts.images), facts.images, base_of(recipe).factor)
    return max(LEAST_UPDATES[recipe.method], math.ceil(own / facts.share / facts.batch - 1e-9))


def published(purpose: Purpose, images: int, factor: float = 1.0) -> tuple[float, float]:
    """The least and most image passes that public sources use."""
    found = next((bounds for most, bounds in RANGES[purpose].items() if images <= most), None)
    least, most = found or (min(images, MOST_PASSES), 10 * images)
    return least * min(1.0, factor), most * max(1.0, factor)


def remark(recipe: Recipe, facts: Facts, steps: int) -> str:
    """What is wrong with the number of times each image is seen; "" if nothing is, or if the table does not apply."""
    inferred_general = recipe.train.purpose is None and facts.images > SUBJECT_UP_TO
    if recipe.method == "scratch" or (recipe.model.path or "").startswith("embedded:") or inferred_general:
        return ""
    purpose = purpose_of(recipe, facts.images)
    if purpose == "subject" and facts.images > MANY_OF_A_SUBJECT:
        return (
            f"{facts.images:,} images are many for one subject: set train.purpose to style, concept or general, which "
            f"decides the length ({TABLE})"
        )
    total, factor = steps * facts.batch * facts.share, base_of(recipe).factor
    least, most = published(purpose, facts.images, factor)
    if least <= total <= 2 * most:
        return ""
    usual = passes(recipe.method, purpose, facts.images, factor)
    seen = _times(total / facts.images)
    wrong = f"too few for {NOUNS[purpose]}" if total < least else "more than public recipes use and usually overfits"
    fix = f"{_times(usual / facts.images)} is usual ({TABLE})"
    auto = recipe.train.steps is None and recipe.train.epochs is None
    lower = "lower train.batch_size or train.accumulation" if auto else "remove train.steps and train.epochs"
    return f"each image is seen {seen}, which is {wrong}; {fix}: {lower}"


def _explained(recipe: Recipe, facts: Facts, steps: int) -> str:
    noun = {
        "subject": "one subject",
        "style": "one style",
        "concept": "one concept",
        "general": "a large or mixed set",
    }[purpose_of(recipe, facts.images)]
    each = steps * facts.batch * facts.share / facts.images
    count = f"{each:.0f}" if each >= 10 else f"{each:.2g}"
    return (
        f"{plural(steps, 'step')}: {plural(facts.images, 'image')} of {noun}, {count} "
        f"pass{'' if count == '1' else 'es'} each (table in {TABLE})"
    )


def _times(number: float) -> str:
    shown = f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
    return f"{shown} time{'' if shown == '1' else 's'}"
