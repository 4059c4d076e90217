"""Measure the cards that `ft estimate` answers from, by running each step on fake tensors: scripts/measure_cards.py [NAME …]

No GPU and no weights are needed; a card takes minutes. It writes finetune/assets/cards/NAME.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.recipe import load_recipe

# card → (title, recipes by method, native side)
CARDS = {
    "base": ("the embedded base", "emoji", 64),
    "sd15": ("Stable Diffusion 1.5", "sd15", 512),
    "sd21": ("Stable Diffusion 2.1", "sd21", 768),
    "sdxl": ("Stable Diffusion XL", "sdxl", 1024),
}
RANK, HIGHER_RANK = 16, 64


@click.command()
@click.argument("names", nargs=-1)
@click.option("--fewer", is_flag=True, help="Only LoRA on attention, and full fine-tuning with checkpointing and a small optimizer.")
def main(names: tuple[str, ...], fewer: bool) -> None:
    """Measure the cards NAMES, or all."""
    for name in names or CARDS:
        start = time.perf_counter()
        card = measure(name, fewer)
        from finetune.estimate.cards import path_of

        path_of(name).parent.mkdir(exist_ok=True)
        path_of(name).write_text(encoded(card), encoding="utf-8")
        print(f"{name}: {len(card['variants'])} variants in {time.perf_counter() - start:.0f} s", flush=True)


def measure(name: str, fewer: bool = False) -> dict[str, Any]:
    """One card as plain values."""
    import diffusers
    import torch

    from finetune.estimate.measure import BATCHES, outside, variant

    title, recipe, side = CARDS[name]
    variants = []
    first: Any = None
    for overrides in wanted(name):
        small = overrides["checkpointing"] and overrides["optimizer"] in ("adamw8bit", "adafactor")
        if fewer and overrides["adapter"] != "attention" and not small:
            continue
        method = "full" if overrides["adapter"] is None else "lora"
        # An adapter's gradients weigh nothing beside the rest.
        accumulations = (1, 2) if method == "full" else (1,)
        low, high = ([traced(recipe, method, side, overrides, batch, not first, times) for times in accumulations] for batch in BATCHES)
        first = first or low[0]
        more = (HIGHER_RANK, traced(recipe, method, side, {**overrides, "rank": HIGHER_RANK}, BATCHES[0], False)) if method == "lora" else None
        variants.append(variant(method, overrides, low, high, more))
        print(f"{name} {method} {overrides}", flush=True)
    return {
        "name": name,
        "title": title,
        "family": load_recipe(f"lora/{recipe}").model.family,
        "resolution": side,
        **outside(first),
        "versions": {"torch": torch.__version__.partition("+")[0], "diffusers": diffusers.__version__},
        "variants": variants,
    }


def wanted(name: str) -> list[dict[str, Any]]:
    """The variants of a card: what its recipes say, with and without checkpointing, and the optimizers of full fine-tuning."""
    own = load_recipe("lora/emoji").adapter if name == "base" else None
    targets = [own.targets] if own else ["attention", "attention+mlp"]
    found: list[dict[str, Any]] = [
        {"adapter": target, "checkpointing": checkpointing, "optimizer": "adamw", "rank": RANK}
        for target in targets
        for checkpointing in (False, True)
    ]
    for optimizer in ("adamw", "adamw8bit", "adafactor"):
        found += [{"adapter": None, "checkpointing": checkpointing, "optimizer": optimizer, "rank": 0} for checkpointing in (False, True)]
    return found


def traced(recipe: str, method: str, side: int, overrides: dict[str, Any], batch: int, whole: bool, times: int = 1) -> dict[str, Any]:
    """The phases of one run on fake tensors."""
    from finetune.estimate.subject import Subject

    sets = [f"train.batch_size={batch}", f"train.accumulation={times}", f"train.gradient_checkpointing={str(overrides['checkpointing']).lower()}"]
    sets += ["train.ema=null", f"optimizer.name={overrides['optimizer']}"]
    if method == "lora":
        sets += [f"adapter.rank={overrides['rank']}", "adapter.targets=" + json.dumps(overrides["adapter"])]
    return Subject(load_recipe(f"{method}/{recipe}", sets), "bfloat16", (side, side)).phases(only_training=not whole)


def encoded(card: dict[str, Any]) -> str:
    """JSON with one line for each key and each variant's key, which a diff can show."""
    head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in card.items() if key != "variants"]
    variants = [
        ",\n".join(f"   {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in entry.items()) for entry in card["variants"]
    ]
    return "{\n" + ",\n".join(head) + ',\n "variants": [\n  {\n' + "\n  },\n  {\n".join(variants) + "\n  }\n ]\n}\n"


if __name__ == "__main__":
    main()
