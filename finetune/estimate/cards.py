"""Cards: what one architecture's step needs, measured once by running it on fake tensors (`scripts/measure_cards.py`).

A card answers without torch. It holds *variants* (method, what carries the adapter, checkpointing, optimizer), each measured at
two batches; what a step allocates and each operator's FLOPs and bytes are linear in batch × area, but for attention,
whose FLOPs grow with the square of the area.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from finetune.errors import UserError
from finetune.recipe import ASSETS, Adapter, Recipe

CARDS = ASSETS / "cards"


@final
@dataclass(frozen=True)
class Work:
    """Operators of one kind that cost the same.

    Attributes:
        kind: matmul, conv, attention or other.
        width: bytes of a factor: 2 is what tensor cores are fast at.
        eager: whether Python runs them and autograd records them; the host takes longer then.
        flops, bytes: each operator's, as (what does not grow, what one native picture more adds).
        count: how many of them a step runs.
    """

    kind: str
    width: int
    eager: bool
    flops: tuple[float, float]
    bytes: tuple[float, float]
    count: int


@final
@dataclass(frozen=True)
class Variant:
    """One way to train an architecture.

    Attributes:
        method, targets, checkpointing, optimizer: as in a recipe; `targets` is "" where weights themselves train.
        rank: at which it was measured; 0 without an adapter.
        trained: parameters that train, at that rank.
        weights, adapters, state: bytes of what stays frozen, of what trains, and of the optimizer's state.
        allocated, reserved: peaks of a step, bytes, as (at batch 0, more for each native picture): without averages.
        accumulating: (allocated, reserved) likewise, from the second accumulated batch on: the gradients of the first are there.
        rank_bytes: allocated bytes that one rank more adds (what is reserved jumps in segments).
        micro: operators of a forward and a backward pass; `update`: of what comes once a step.
    """

    method: str
    targets: str
    checkpointing: int
    optimizer: str
    rank: int
    trained: int
    weights: int
    adapters: int
    state: int
    allocated: tuple[float, float]
    reserved: tuple[float, float]
    accumulating: tuple[tuple[float, float], tuple[float, float]]
    rank_bytes: float
    micro: tuple[Work, ...]
    update: tuple[Work, ...]


@final
@dataclass(frozen=True)
class Card:
    """One architecture.

    Attributes:
        name, title: `sdxl`, `Stable Diffusion XL`.
        family: the recipe's `model.family`.
        resolution: what it was made for: the side of the native picture, pixels.
        parameters: of each net.
        encode, sample: reserved peaks while encoding one picture and while drawing one, bytes, as (held throughout, more at the native size).
        encode_flops, sample_flops: of one picture, and of one denoising step of one picture with guidance.
        versions: of the libraries that it was measured with.
    """

    name: str
    title: str
    family: str
    resolution: int
    parameters: dict[str, int]
    encode: tuple[float, float]
    sample: tuple[float, float]
    encode_flops: float
    sample_flops: float
    versions: dict[str, str]
    variants: tuple[Variant, ...]


def known() -> tuple[str, ...]:
    """Names of all cards."""
    return tuple(sorted(path.stem for path in CARDS.glob("*.json")))


@functools.cache
def load(name: str) -> Card:
    """The card of this name."""
    return parsed(json.loads((CARDS / f"{name}.json").read_text(encoding="utf-8")))


def parsed(found: dict[str, Any]) -> Card:
    """A card from plain values, as its file holds them."""
    pairs = {key: tuple(found[key]) for key in ("encode", "sample")}
    return Card(**{**found, **pairs, "variants": tuple(_variant(entry) for entry in found["variants"])})


def _variant(entry: dict[str, Any]) -> Variant:
    works = {
        key: tuple(Work(kind, width, bool(eager), (f0, f1), (b0, b1), count) for kind, width, eager, f0, f1, b0, b1, count in entry[key])
        for key in ("micro", "update")
    }
    lines = {"allocated": tuple(entry["allocated"]), "reserved": tuple(entry["reserved"])}
    return Variant(**{**entry, **works, **lines, "accumulating": tuple(tuple(line) for line in entry["accumulating"])})


def variant_of(card: Card, recipe: Recipe) -> Variant:
    """The variant that a recipe trains.

    Raises:
        UserError: the card does not hold it.
    """
    adapter = recipe.adapter
    wanted = (recipe.method, adapter.targets if adapter else "", recipe.train.checkpointed)
    alike = [v for v in card.variants if (v.method, v.targets, v.checkpointing) == wanted]
    text = recipe.model.train_text_encoder or recipe.tokens
    special = "a trained text encoder" if text else _special(adapter) if adapter else ""
    if special or not alike:
        sparse = f"train.gradient_checkpointing: {recipe.train.checkpointed}" if recipe.train.checkpointed > 1 else ""
        what = special or sparse or (f'targets "{wanted[1]}"' if adapter else f"method {recipe.method}")
        raise UserError(f"the card of {card.title} does not cover {what}", where="adapter.targets" if adapter else "method", remedy="add --trace")
    # An adapter's state is small and adds up with the rest, so one optimizer's measurement serves all (`memory.state_bytes`).
    return next((v for v in alike if v.optimizer == recipe.optimizer.name), alike[0])


def _special(adapter: Adapter) -> str:
    """What is peculiar to an adapter, and takes other memory and time than a LoRA of its rank."""
    if adapter.kind != "lora":
        return f"adapters of kind {adapter.kind}"
    higher = any(rank > adapter.rank for rank in adapter.rank_pattern.values())  # lower ones take no more than is said
    return "DoRA" if adapter.dora else "higher ranks by pattern" if higher else ""


def path_of(name: str) -> Path:
    return CARDS / f"{name}.json"
