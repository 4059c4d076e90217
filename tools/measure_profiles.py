"""Measure cost profiles by running training steps on fake tensors: python tools/measure_profiles.py [NAME …]

Needs no GPU and no weights; a profile takes minutes. Writes finetune/assets/profiles/NAME.json. There is one profile
for each architecture that the bundled recipes fine-tune, and for each network that they train from scratch.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.config.loader import bundled_recipes, load_recipe
from finetune.config.schema import Recipe
from finetune.estimate.architecture import configs_of
from finetune.estimate.profiles import Device, build_key, path_of, settings_of

RANK, HIGHER_RANK = 16, 64
# Settings varied by method, in all combinations: what the advice suggests, and what people turn off.
CHECKPOINTING = ("false", "true")
VARIED: dict[str, dict[str, tuple[str, ...]]] = {
    "lora": {"adapter.targets": ("attention", "attention+mlp"), "train.gradient_checkpointing": CHECKPOINTING},
    "full": {"train.gradient_checkpointing": CHECKPOINTING, "optimizer.name": ("adamw", "adamw8bit", "adafactor")},
    "scratch": {},
}
FUSED = {"train.fused_backward": "true", "optimizer.clip": "tensor", "train.accumulation": "1"}
# Further variants of each recipe: LoRA on full weights, and QLoRA.
BESIDE: dict[str, tuple[dict[str, str], ...]] = {
    "lora": ({"model.quantize": "null"}, {"model.quantize": "nf4"}),
    "full": (),
    "scratch": (),
}
# Further variants for small networks.
OF_SMALL: dict[str, tuple[dict[str, str], ...]] = {
    "lora": ({"model.quantize": "int8"}, {"train.gradient_checkpointing": "2"}),
    "full": (
        {"train.weights": "bfloat16"},
        FUSED,
        {"train.weights": "bfloat16"} | FUSED,
        {"train.gradient_checkpointing": "2"},
    ),
    "scratch": (),
}
PRESERVING = ({"adapter.distill_every": "null"}, {"adapter.distill_every": "5"})  # for LoRA
# Profiles with all of these variants; other architectures are large, and only what their recipes say is measured.
WHOLE = ("base", "sd15", "sd21", "sdxl")
ON_CPU = ("base",)  # profiles for CPUs, besides networks from scratch
SMALL = ("base",)  # profiles with the variants of OF_SMALL and a higher rank: larger networks take minutes for each
DEVICES: tuple[Device, ...] = ("cuda", "cpu")
EXAMPLES: dict[tuple[str, str, Device], Any] = {}  # encoded examples by recipe, so that encoders run once


def recipes_by_profile() -> dict[str, list[str]]:
    """Profile name → the recipes that it covers."""
    found: dict[str, list[str]] = {}
    for name in bundled_recipes():
        recipe = load_recipe(name)
        found.setdefault(
            f"scratch-{recipe.name}" if recipe.method == "scratch" else configs_of(recipe.model)[1], []
        ).append(name)
    return found


@click.command()
@click.argument("names", nargs=-1)
@click.option("--missing", is_flag=True, help="Measure only variants and devices that the profiles lack.")
@click.option("--method", help="Measure only the variants of this method, and keep the others.")
def main(names: tuple[str, ...], missing: bool, method: str | None) -> None:
    """Measure the profiles NAMES, or all. Saves after each variant."""
    for name in names or recipes_by_profile():
        start = time.perf_counter()
        held = (
            json.loads(path_of(name).read_text(encoding="utf-8"))
            if (missing or method) and path_of(name).is_file()
            else None
        )
        path_of(name).parent.mkdir(exist_ok=True)
        for profile in measured(name, held, missing, method):
            path_of(name).write_text(encoded(profile), encoding="utf-8")
        print(f"{name}: {len(profile['variants'])} variants in {time.perf_counter() - start:.0f} s", flush=True)


def measured(name: str, held: dict[str, Any] | None, missing: bool, method: str | None) -> Iterator[dict[str, Any]]:
    """Yield one profile as plain values after each measured variant; `held` is its previous content."""
    import diffusers
    import torch

    from finetune.estimate.tracing.measure import BATCHES, outside, parameters

    recipes = [
        load_recipe(one) for one in sorted(recipes_by_profile()[name], key=lambda one: (one.startswith("full/"), one))
    ]  # LoRA recipes have the full base model
    counts: dict[str, int] = held["parameters"] if held else {}
    around: dict[str, Any] = held["outside"] if held else {}
    first: dict[Device, dict[str, Any]] = {}
    for device in DEVICES:
        if device not in around and device in {one for one, _ in wanted(name, recipes[0])}:
            first[device] = traced(varied(recipes[0], {}), device, BATCHES[0], 1, only_training=False)
            around, counts = around | {device: outside(first[device])}, counts or parameters(first[device])
    profile = {
        "name": name,
        "title": (recipes[0].model.path or recipes[0].name).rpartition("/")[2],
        "family": recipes[0].model.family,
        "build": build_key(recipes[0]) if recipes[0].method == "scratch" else "",
        "resolution": recipes[0].data.resolution,
        "parameters": counts,
        "outside": around,
        "versions": {"torch": torch.__version__.partition("+")[0], "diffusers": diffusers.__version__},
    }
    known = {key_of(one["device"], one["settings"]): one for one in (held["variants"] if held else ())}
    asked: dict[str, tuple[Device, Recipe]] = {}
    for device, recipe in (pair for one in recipes for pair in wanted(name, one)):
        asked.setdefault(key_of(device, settings_of(recipe)), (device, recipe))
    whole = settings_of(varied(recipes[0], {}))
    for key, (device, recipe) in asked.items():
        if (missing and key in known) or (method and recipe.method != method):
            continue
        known[key] = variant_of(name, recipe, device, first.get(device) if settings_of(recipe) == whole else None)
        yield profile | {"variants": [known[one] for one in asked if one in known]}
    yield profile | {"variants": [known[one] for one in asked if one in known]}


def key_of(device: Device, settings: dict[str, Any]) -> str:
    """A key that identifies a variant."""
    return f"{device} {json.dumps(settings, sort_keys=True)}"


def wanted(name: str, recipe: Recipe) -> Iterator[tuple[Device, Recipe]]:
    """The variants of a recipe in the profile `name`, as (device, recipe); on a CPU, only distillation varies."""
    axes = dict(VARIED[recipe.method]) if name in WHOLE else {}
    if settings_of(recipe).get("adapter.targets") not in axes.get("adapter.targets", ()):
        axes.pop("adapter.targets", None)
    edits = [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]
    preserving = PRESERVING if recipe.method == "lora" and name in WHOLE else ()
    edits += [*BESIDE[recipe.method], *preserving, *(OF_SMALL[recipe.method] if name in SMALL else ())]
    seen: list[dict[str, Any]] = []
    for edited in (varied(recipe, edit) for edit in edits):
        if (settings := settings_of(edited)) not in seen:
            seen.append(settings)
            yield "cuda", edited
    if name in ON_CPU or recipe.method == "scratch":
        for edit in preserving or ({},):
            yield "cpu", varied(recipe, edit)


def varied(recipe: Recipe, chosen: dict[str, str]) -> Recipe:
    """A bundled recipe with other values, at the measured rank, with full text encoders and without EMA.

    (EMA is added to a profile's figures, and savings of text encoders are subtracted.)
    """
    sets = [f"{key}={json.dumps(value) if key == 'adapter.targets' else value}" for key, value in chosen.items()]
    sets += ["model.text_encoder_placement=device"] if recipe.model.text_encoder_placement != "device" else []
    return load_recipe(
        f"{recipe.method}/{recipe.name}",
        [*sets, "train.ema=null", *([f"adapter.rank={RANK}"] if recipe.adapter else [])],
    )


def variant_of(name: str, recipe: Recipe, device: Device, first: dict[str, Any] | None = None) -> dict[str, Any]:
    """Measure one variant of a profile.

    Args:
        first: its run at the first of `BATCHES`, if traced already.
    """
    from finetune.estimate.tracing.measure import BATCHES, variant

    # Gradients of adapters are negligible, and fused ones are freed at once.
    accumulations = (1,) if recipe.method == "lora" or recipe.train.fused_backward else (1, 2)
    low, high = (
        [
            first if first and (batch, times) == (BATCHES[0], 1) else traced(recipe, device, batch, times)
            for times in accumulations
        ]
        for batch in BATCHES
    )
    higher = None
    if recipe.adapter is not None and name in SMALL:
        adapter = dataclasses.replace(recipe.adapter, rank=HIGHER_RANK)
        higher = HIGHER_RANK, traced(dataclasses.replace(recipe, adapter=adapter), device, BATCHES[0], 1)
    print(f"{recipe.method}/{recipe.name} on {device}: {settings_of(recipe)}", flush=True)
    return variant(recipe, device, low, high, higher)


def traced(recipe: Recipe, device: Device, batch: int, times: int, only_training: bool = True) -> dict[str, Any]:
    """Trace one run; returns its phases."""
    from finetune.data.audit.audit import scan
    from finetune.estimate.tracing.measure import BATCHES
    from finetune.estimate.tracing.traced_run import TracedRun

    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch_size=batch, accumulation=times))
    if hasattr(
        recipe.net, "group"
    ):  # the group size of a minibatch discriminator must divide both batches, and costs nothing
        recipe = dataclasses.replace(recipe, net=dataclasses.replace(recipe.net, group=BATCHES[0]))
    audit = scan(recipe.data) if recipe.method == "scratch" else None
    side = recipe.data.resolution
    subject = TracedRun(recipe, "float32" if device == "cpu" else "bfloat16", (side, side), audit, device=device)
    key = recipe.method, recipe.name, device
    found = subject.phases(only_training, EXAMPLES.get(key) if only_training else None)
    EXAMPLES[key] = subject.example
    return found


def encoded(profile: dict[str, Any]) -> str:
    """JSON with one line per key, so that diffs are readable."""
    head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in profile.items() if key != "variants"]
    variants = [
        ",\n".join(f"   {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in entry.items())
        for entry in profile["variants"]
    ]
    return "{\n" + ",\n".join(head) + ',\n "variants": [\n  {\n' + "\n  },\n  {\n".join(variants) + "\n  }\n ]\n}\n"


if __name__ == "__main__":
    main()
