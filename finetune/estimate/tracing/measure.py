"""Build cost profiles and their variants from traced phases.

Used by `tools/measure_profiles.py` and `ft estimate --trace`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from finetune.config.schema import Precision, Recipe
from finetune.data.audit.audit import Audit
from finetune.estimate.allocator.caching import replay
from finetune.estimate.hardware.cpu import BY_BYTES
from finetune.estimate.profiles import Device, Profile, build_key, parsed, settings_of
from finetune.estimate.tracing.traced_run import DENOISING_STEPS, OF_TEXT_ENCODERS, Phase, TracedRun
from finetune.models.base import Model
from finetune.planning import Plan

BATCHES = (2, 4)  # two points of a line; at 1 some operators differ (contiguous tensors need no copy)
ALIKE = math.log(1.5)  # operators within this factor of each other are merged, by their means
# A float32 weight, its gradient and AdamW's two moments; for rank 16 on SDXL's attention within 2 % of the measured
# slope.
BYTES_A_TRAINED = 16
DIGITS = 5  # significant digits of operator figures
UPDATE = ("optimizer",)  # sections that run once per step; those of `MICRO` run once per accumulated batch
MICRO = ("forward", "backward")


def point(
    title: str,
    recipe: Recipe,
    precision: Precision,
    device: Device = "cuda",
    audit: Audit | None = None,
    build: Callable[[Plan], Model] | None = None,
) -> tuple[Profile, dict[str, Phase]]:
    """A profile of exactly this configuration, and its traced phases. With a single batch size, lines have no slope."""
    side = recipe.data.resolution
    # Averaged weights are not part of a profile: they are added to its figures.
    without = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, ema=None))
    phases = TracedRun(without, precision, (side, side), audit=audit, build=build, device=device).phases()
    profile = {
        "name": "traced",
        "title": title,
        "family": recipe.model.family,
        "build": build_key(recipe),
        "resolution": side,
        "parameters": parameters(phases),
        "outside": {
            device: outside(phases)
            | {"encoders": recipe.model.text_encoder_placement, "tiled": recipe.model.vae_tiling}
        },
        "versions": {},
        "variants": [variant(recipe, device, [phases], [phases], None)],
    }
    return parsed(profile), phases


def variant(
    recipe: Recipe,
    device: Device,
    first: list[dict[str, Phase]],
    second: list[dict[str, Phase]],
    higher: tuple[int, dict[str, Phase]] | None,
) -> dict[str, Any]:
    """A variant of a profile.

    Args:
        recipe: the traced recipe.
        first, second: runs at the two `BATCHES`, without accumulation and, if gradients are large, with it.
        higher: a higher rank and its run; None: assume weights, gradients and state for each additional rank.
    """
    pairs = [[replay(run["train"].events) for run in runs] for runs in zip(first, second, strict=True)]
    peaks = [
        [line(low.peak_allocated, high.peak_allocated), line(low.peak_reserved, high.peak_reserved)]
        for low, high in pairs
    ]
    held, cycle = first[0]["train"].held, first[0]["train"].cycle
    rank = recipe.adapter.rank if recipe.adapter else 0
    found = {
        "device": device,
        "settings": settings_of(recipe),
        "rank": rank,
        "trained": held["trained parameters"],
        "weights": held["weights"],
        "adapters": held["trained"],
        "state": held["optimizer"],
        "allocated": peaks[0][0],
        "reserved": peaks[0][1],
        "accumulating": peaks[-1],
        "rank_bytes": BYTES_A_TRAINED * held["trained parameters"] / rank if rank else 0.0,
    }
    found |= {
        key: value for key, value, usual in (("waiting", held["waiting"], 0), ("cycle", cycle, 1)) if value != usual
    }
    if higher:
        more, run = higher
        found["rank_bytes"] = (replay(run["train"].events).peak_allocated - pairs[0][0].peak_allocated) / (more - rank)
    parts = {"micro": MICRO, "update": UPDATE}
    low, high = first[0]["train"], second[0]["train"]
    return found | {
        key: works(device, operators(low, names), operators(high, names), cycle) for key, names in parts.items()
    }


def line(low: float, high: float) -> list[float]:
    """The line (value at batch 0, slope per image) through the values at BATCHES."""
    slope = (high - low) / (BATCHES[1] - BATCHES[0])
    return [low - BATCHES[0] * slope, slope]


def operators(phase: Phase, names: tuple[str, ...]) -> list[Any]:
    """The operators of the last cycle's steps in the sections with these names.

    Of the batches that a train step accumulates, only the last counts. With `train.fused_backward`, each tensor has an
    "optimizer" section inside the backward pass, which continues after it.
    """
    steps = [number for number, section in enumerate(phase.sections) if section.name == "batch"]
    counted: list[Any] = []
    pending: list[Any] = []
    updated = False
    for section in phase.sections[steps[-phase.cycle] :]:
        if section.name == "forward":
            counted += pending if updated else []
            pending, updated = [], False
        if section.name in names:
            pending += section.operators
        if section.name == "optimizer":
            counted += pending
            pending, updated = [], True
    return counted + (pending if updated else [])


def works(device: Device, low: list[Any], high: list[Any], cycle: int = 1) -> list[list[Any]]:
    """Merge operators of about the same cost: their mean costs, and their number per step.

    The lists are from the same `cycle` steps at the two BATCHES, so they correspond.
    """
    alike: dict[tuple[Any, ...], list[list[float]]] = defaultdict(list)
    first, second = _streams(low), _streams(high)
    for key, ones in first.items():
        others = second.pop(key, [])
        if len(ones) != len(others):
            if key[0] not in BY_BYTES:
                raise RuntimeError(
                    f"the step at batch {BATCHES[0]} runs {len(ones)} operators {key}, and the one at batch "
                    f"{BATCHES[1]} {len(others)}"
                )
            # A network that processes its images one by one, or in groups: such operators cost their bytes, so the
            # means of the smaller batch are used.
            mean = [
                0.0,
                0.0,
                *(
                    total / len(ones)
                    for total in line(*(sum(one.bytes for one in stream) for stream in (ones, others)))
                ),
            ]
            alike[*key, *_ratios(*mean)] += [mean] * len(ones)
            continue
        for one, other in zip(ones, others, strict=True):
            figures = [*line(one.flops, other.flops), *line(one.bytes, other.bytes)]
            alike[*key, *(_ratios if device == "cuda" else _sizes)(*figures)].append(figures)
    if second:
        raise RuntimeError(f"the step at batch {BATCHES[1]} also runs {list(second)}")
    means = {
        key: [_rounded(sum(column) / len(rows)) for column in zip(*rows, strict=True)] for key, rows in alike.items()
    }
    found = [[*key[:3], *means[key], _rounded(len(rows) / cycle)] for key, rows in alike.items()]
    return sorted(found, key=lambda work: (-work[4], -work[6], work))


def _streams(operators: list[Any]) -> dict[tuple[str, int, int], list[Any]]:
    """Operators by kind, width and whether they run eagerly, in their order."""
    streams = defaultdict(list)
    for operator in operators:
        streams[operator.kind, operator.width, int(operator.eager)].append(operator)
    return streams


def _ratios(f0: float, f1: float, b0: float, b1: float) -> tuple[int, ...]:
    """A key of operators with similar ratios of FLOPs to bytes, which decide which of the two bounds them on a GPU."""
    return (
        (_magnitude(f0 / f1 if f1 else 0), _magnitude(b1 / f1 if f1 else 0), _magnitude(b0 / f1 if f1 else 0))
        if f0 or f1
        else ()
    )


def _sizes(f0: float, f1: float, b0: float, b1: float) -> tuple[int, ...]:
    """A key of operators with similar FLOPs and bytes, which affect a CPU's speed.

    It includes the shares of both that do not grow with the batch, in quarters.
    """
    flops, moved = (constant + BATCHES[0] * slope for constant, slope in ((f0, f1), (b0, b1)))
    return (
        _magnitude(flops),
        _magnitude(moved),
        round(4 * f0 / flops) if flops else 0,
        round(4 * b0 / moved) if moved else 0,
    )


def _magnitude(figure: float) -> int:
    return round(math.log(figure) / ALIKE) if figure > 0 else -1_000_000


def _rounded(figure: float) -> float:
    rounded = float(f"{figure:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() else rounded


def parameters(first: dict[str, Phase]) -> dict[str, int]:
    """The parameters of each network. For a denoiser alone, there are no other networks."""
    train = first["train"]
    counts = {
        "denoiser": train.held["parameters"],
        **{name: train.held[name] for name in ("largest unit", "outside units")},
    }
    if encode := first.get("encode"):
        counts |= {name: encode.held[f"{name} parameters"] for name in ("vae", "text encoders")}
        counts |= {name: encode.held[name] for name in OF_TEXT_ENCODERS}
    return counts


def outside(first: dict[str, Phase]) -> dict[str, Any]:
    """The cost of encoding and sampling at batch 1, outside the training loop; zeros for a denoiser alone."""
    costs: dict[str, Any] = {"encode": [0, 0], "sample": [0, 0], "encode_flops": 0, "sample_flops": 0}
    if encode := first.get("encode"):
        held = encode.held["vae"] + encode.held["text encoders"]
        costs["encode"] = [held, replay(encode.events).peak_reserved - held]
        costs["encode_flops"] = sum(operator.flops for section in encode.sections for operator in section.operators)
    if sample := first.get("sample"):
        weights = first["train"].held["weights"] + first["train"].held["trained"] + sample.held["vae"]
        costs["sample"] = [sample.held["vae"], replay(sample.events).peak_reserved - weights]
        costs["sample_flops"] = (
            sum(operator.flops for section in sample.sections for operator in section.operators) / DENOISING_STEPS
        )
    return costs
