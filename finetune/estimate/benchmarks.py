"""What the families reach in equal time on the bundled emoji, as `benchmarks/bench_families.py` measured it. Torch-free."""

from __future__ import annotations

import json
import math
from typing import Any

from finetune.paths import ASSETS

MEASURED = ASSETS / "families.json"
# Goal → (field of a row, what it is, its form, whether more is better).
QUOTED = {
    "quality": ("frechet_distance", "emoji-net Fréchet distance", ".2f", False),
    "latent": ("frechet_distance", "emoji-net Fréchet distance", ".2f", False),
    "speed": ("cpu_seconds_per_image", "CPU seconds an image", ".2g", False),
    "likelihood": ("bits_per_dimension", "bits/dim", ".2f", False),
    "diversity": ("coverage", "of the real images have a drawn one near", ".0%", True),
}
DECISIVE = ("speed", "likelihood")  # goals at which the figures order recipes


def measured() -> dict[str, Any]:
    """{minutes, images, rows: {recipe: figures}}, empty where nothing was measured yet."""
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {"rows": {}}
    return found


def quoted(goal: str) -> str:
    """The figures that speak to a goal, the best first; "" where there are none."""
    found = measured()
    if goal not in QUOTED or not found["rows"]:
        return ""
    field, words, form, more = QUOTED[goal]
    known = [(row[field], recipe) for recipe, row in found["rows"].items() if row.get(field) is not None]
    best = ", ".join(f"{recipe} {value:{form}}" for value, recipe in sorted(known, reverse=more))
    return f"{best} ({words}; after {found['minutes']:g} CPU minutes each on emoji of 32 pixels)" if best else ""


def standing(recipe: str, goal: str) -> float:
    """A recipe's figure of a goal that figures decide, the less the better; what was not measured comes last.

    They don't decide quality and diversity: at 32² in pixels they say nothing of recipes that draw in a latent space.
    """
    value = measured()["rows"].get(recipe, {}).get(QUOTED[goal][0]) if goal in DECISIVE else None
    return math.inf if value is None else float(value)
