"""Measure the cards that `ft estimate` answers from, by running each step on fake tensors: scripts/measure_cards.py [NAME …]

No GPU and no weights are needed; a card takes minutes. It writes finetune/assets/cards/NAME.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
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
BATCHES = (2, 4)  # two points of a line; at 1 some operators differ (what is contiguous anyhow needs no copy)
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

    title, recipe, side = CARDS[name]
    variants = []
    first: Any = None
    for overrides in wanted(name):
        small = overrides["checkpointing"] and overrides["optimizer"] in ("adamw8bit", "adafactor")
        if fewer and overrides["adapter"] != "attention" and not small:
            continue
        method = "full" if overrides["adapter"] is None else "lora"
        runs = {}
        for batch in BATCHES:
            runs[batch] = traced(recipe, method, side, overrides, batch, not first)
            first = first or runs[batch]
        higher = traced(recipe, method, side, {**overrides, "rank": HIGHER_RANK}, BATCHES[0], False) if method == "lora" else None
        variants.append(variant(method, overrides, runs, higher))
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


def traced(recipe: str, method: str, side: int, overrides: dict[str, Any], batch: int, whole: bool) -> dict[str, Any]:
    """The phases of one run on fake tensors."""
    from finetune.estimate.subject import Subject

    sets = [f"train.batch_size={batch}", "train.accumulation=1", f"train.gradient_checkpointing={str(overrides['checkpointing']).lower()}"]
    sets += ["train.ema=null", f"optimizer.name={overrides['optimizer']}"]
    if method == "lora":
        sets += [f"adapter.rank={overrides['rank']}", "adapter.targets=" + json.dumps(overrides["adapter"])]
    return Subject(load_recipe(f"{method}/{recipe}", sets), "bfloat16", (side, side)).phases(only_training=not whole)


def variant(method: str, overrides: dict[str, Any], runs: dict[int, Any], higher: Any) -> dict[str, Any]:
    """A variant of a card from its runs at two batches, and at a higher rank."""
    from finetune.estimate.allocator import replay

    low, high = (replay(runs[batch]["train"].events) for batch in BATCHES)
    held = runs[BATCHES[0]]["train"].held
    parts = {"micro": ("batch", "forward", "backward"), "update": ("optimizer",)}
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
        "allocated": line(low.peak_allocated, high.peak_allocated),
        "reserved": line(low.peak_reserved, high.peak_reserved),
        "rank_bytes": (replay(higher["train"].events).peak_allocated - low.peak_allocated) / (HIGHER_RANK - RANK) if higher else 0.0,
    }
    return found | {key: works(*(operators(runs[batch]["train"], names) for batch in BATCHES)) for key, names in parts.items()}


def line(low: float, high: float) -> list[float]:
    """(at batch 0, more for each picture) through the figures at BATCHES."""
    slope = (high - low) / (BATCHES[1] - BATCHES[0])
    return [low - BATCHES[0] * slope, slope]


def operators(phase: Any, names: tuple[str, ...]) -> list[Any]:
    """Operators of the last step, of the sections with these names."""
    last = max(number for number, section in enumerate(phase.sections) if section.name == "batch")
    return [operator for section in phase.sections[last:] if section.name in names for operator in section.operators]


def works(low: list[Any], high: list[Any]) -> list[list[Any]]:
    """Operators that cost the same, with their number; the two lists are of the same step at BATCHES, so they go side by side."""
    counted: Counter[tuple[Any, ...]] = Counter()
    for one, other in zip(low, high, strict=True):
        if (one.kind, one.width) != (other.kind, other.width):
            raise RuntimeError(f"the step at batch {BATCHES[0]} and the one at batch {BATCHES[1]} run other operators: {one}, {other}")
        counted[(one.kind, one.width, *line(one.flops, other.flops), *line(one.bytes, other.bytes))] += 1
    return [[*key, count] for key, count in sorted(counted.items(), key=lambda item: -item[0][3])]


def outside(first: Any) -> dict[str, Any]:
    """What happens outside the loop: encoding and sampling, at batch 1."""
    from finetune.estimate.allocator import replay

    encode, sample, train = first["encode"], first["sample"], first["train"]
    encoded, drawn = replay(encode.events).peak_reserved, replay(sample.events).peak_reserved
    held = sum(encode.held.values())
    nets = train.held["weights"] + train.held["trained"] + sample.held["vae"]
    flops = {section.name: sum(operator.flops for operator in section.operators) for section in (*encode.sections, *sample.sections)}
    from finetune.estimate.subject import DENOISING_STEPS

    return {
        "parameters": {
            "denoiser": train.held["weights"] // 2,
            "vae": encode.held["vae"] // 4,
            "text encoders": encode.held.get("text encoders", 0) // 2,
        },
        "encode": [held, encoded - held],
        "sample": [sample.held["vae"], drawn - nets],
        "encode_flops": flops["encode pictures"] + flops["encode text"],
        "sample_flops": flops["sample"] / DENOISING_STEPS,
    }


def encoded(card: dict[str, Any]) -> str:
    """JSON with one line for each key and each variant's key, which a diff can show."""
    head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in card.items() if key != "variants"]
    variants = [
        ",\n".join(f"   {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in entry.items()) for entry in card["variants"]
    ]
    return "{\n" + ",\n".join(head) + ',\n "variants": [\n  {\n' + "\n  },\n  {\n".join(variants) + "\n  }\n ]\n}\n"


if __name__ == "__main__":
    main()
