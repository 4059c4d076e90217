"""Results of the from-scratch families after equal time on the bundled emoji (`benchmarks/bench_families.py`)."""

from __future__ import annotations

import json
import math
from typing import Any

from finetune.paths import ASSETS

MEASURED = ASSETS / "families.json"
# Goal → (field of a row, label, number format, whether higher is better).
QUOTED = {
    "quality": ("frechet_distance", "emoji-net Fréchet distance", ".2f", False),
    "latent": ("frechet_distance", "emoji-net Fréchet distance", ".2f", False),
    "sampling-speed": ("cpu_seconds_per_image", "CPU seconds an image", ".2g", False),
    "likelihood": ("bits_per_dimension", "bits/dim", ".2f", False),
    "diversity": ("coverage", "of the real images have a generated one nearby", ".0%", True),
}
DECISIVE = ("sampling-speed", "likelihood")  # goals for which these figures rank recipes


def measured() -> dict[str, Any]:
    """The results: {minutes, images, rows: {recipe: figures}}; no rows if nothing was measured."""
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {"rows": {}}
    return found


def quoted(goal: str) -> str:
    """The figures for a goal, best first; "" if there are none."""
    found = measured()
    if goal not in QUOTED or not found["rows"]:
        return ""
    field, words, form, more = QUOTED[goal]
    known = [(row[field], recipe) for recipe, row in found["rows"].items() if row.get(field) is not None]
    best = ", ".join(f"{recipe} {value:{form}}" for value, recipe in sorted(known, reverse=more))
    return f"{best} ({words}; after {found['minutes']:g} CPU minutes each on 32-pixel emoji)" if best else ""


def standing(recipe: str, goal: str) -> float:
    """A recipe's figure for a goal in `DECISIVE`, lower is better; infinite if it was not measured.

    They do not rank quality and diversity: at 32² pixels they say nothing about models of latents.
    """
    value = measured()["rows"].get(recipe, {}).get(QUOTED[goal][0]) if goal in DECISIVE else None
    return math.inf if value is None else float(value)
