"""A card, or a variant of one, from traced phases: what `scripts/measure_cards.py` writes down, and what `ft estimate --trace` answers from."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from finetune.estimate.allocator import replay
from finetune.estimate.cards import Card, parsed
from finetune.estimate.subject import DENOISING_STEPS, Phase, Subject
from finetune.models.turn import Model
from finetune.planning import Plan
from finetune.recipe import Precision, Recipe

BATCHES = (2, 4)  # two points of a line; at 1 some operators differ (what is contiguous anyhow needs no copy)


def point(title: str, recipe: Recipe, precision: Precision, build: Callable[[Plan], Model] | None = None) -> tuple[Card, dict[str, Phase]]:
    """A card of this one configuration, and the traced phases that it is made of: a line through one point has no slope."""
    side = recipe.data.resolution
    without = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, ema=None))  # averages are added to what a card says
    phases = Subject(without, precision, (side, side), build=build).phases()
    overrides = {
        "adapter": recipe.adapter.targets if recipe.adapter else None,
        "checkpointing": recipe.train.checkpointed,
        "optimizer": recipe.optimizer.name,
        "rank": recipe.adapter.rank if recipe.adapter else 0,
    }
    facts = {"name": "traced", "title": title, "family": recipe.model.family, "resolution": side, "versions": {}, **outside(phases)}
    return parsed({**facts, "variants": [variant(recipe.method, overrides, [phases], [phases], None)]}), phases


def variant(
    method: str, overrides: dict[str, Any], first: list[dict[str, Phase]], second: list[dict[str, Phase]], higher: tuple[int, dict[str, Phase]] | None
) -> dict[str, Any]:
    """A variant of a card.

    Args:
        first, second: runs at the two `BATCHES`: without accumulation and, where gradients weigh, with it.
        higher: a higher rank, and a run at it, as the first of `first`.
    """
    pairs = [[replay(run["train"].events) for run in runs] for runs in zip(first, second, strict=True)]
    peaks = [[line(low.peak_allocated, high.peak_allocated), line(low.peak_reserved, high.peak_reserved)] for low, high in pairs]
    held = first[0]["train"].held
    found = {
        "method": method,
        "targets": overrides["adapter"] or "",
        "checkpointing": overrides["checkpointing"],
        "optimizer": overrides["optimizer"],
        "rank": overrides["rank"],
        "trained": held["trained"] // 4,
        "weights": held["weights"],
        "adapters": held["trained"],
        "state": held["optimizer"],
        "allocated": peaks[0][0],
        "reserved": peaks[0][1],
        "accumulating": peaks[-1],
        "rank_bytes": 0.0,
    }
    if higher:
        rank, run = higher
        found["rank_bytes"] = (replay(run["train"].events).peak_allocated - pairs[0][0].peak_allocated) / (rank - overrides["rank"])
    parts = {"micro": ("forward", "backward"), "update": ("optimizer",)}
    return found | {key: works(*(operators(runs[0]["train"], names) for runs in (first, second))) for key, names in parts.items()}


def line(low: float, high: float) -> list[float]:
    """(at batch 0, more for each picture) through the figures at BATCHES."""
    slope = (high - low) / (BATCHES[1] - BATCHES[0])
    return [low - BATCHES[0] * slope, slope]


def operators(phase: Any, names: tuple[str, ...]) -> list[Any]:
    """Operators of the last step, of the sections with these names; of what it accumulates, the last."""
    last = max(number for number, section in enumerate(phase.sections) if section.name == "forward")
    return [operator for section in phase.sections[last:] if section.name in names for operator in section.operators]


def works(low: list[Any], high: list[Any]) -> list[list[Any]]:
    """Operators that cost the same, with their number; the two lists are of the same step at BATCHES, so they go side by side."""
    counted: Counter[tuple[Any, ...]] = Counter()
    for one, other in zip(low, high, strict=True):
        if (one.kind, one.width, one.eager) != (other.kind, other.width, other.eager):
            raise RuntimeError(f"the step at batch {BATCHES[0]} and the one at batch {BATCHES[1]} run other operators: {one}, {other}")
        counted[(one.kind, one.width, int(one.eager), *line(one.flops, other.flops), *line(one.bytes, other.bytes))] += 1
    return [[*key, count] for key, count in sorted(counted.items(), key=lambda item: -item[0][4])]


def outside(first: dict[str, Phase]) -> dict[str, Any]:
    """What happens outside the loop: encoding and sampling, at batch 1. A denoiser alone does neither."""
    train = first["train"]
    found: dict[str, Any] = {"parameters": {"denoiser": train.held["weights"] // 2 or train.held["trained"] // 4}, "encode": [0, 0], "sample": [0, 0]}
    found |= {"encode_flops": 0, "sample_flops": 0}
    if encode := first.get("encode"):
        held = sum(encode.held.values())
        found["parameters"] |= {"vae": encode.held["vae"] // 4, "text encoders": encode.held.get("text encoders", 0) // 2}
        found["encode"] = [held, replay(encode.events).peak_reserved - held]
        found["encode_flops"] = sum(operator.flops for section in encode.sections for operator in section.operators)
    if sample := first.get("sample"):
        nets = train.held["weights"] + train.held["trained"] + sample.held["vae"]
        found["sample"] = [sample.held["vae"], replay(sample.events).peak_reserved - nets]
        found["sample_flops"] = sum(operator.flops for section in sample.sections for operator in section.operators) / DENOISING_STEPS
    return found
