"""Measure the profiles that `ft estimate` answers from, by running each step on fake tensors:
tools/measure_profiles.py [NAME …]

No GPU and no weights are needed; a profile takes minutes. It writes finetune/assets/profiles/NAME.json. What there is
to measure is read off the
bundled recipes: one profile for each architecture that they fine-tune, and for each net that they make from scratch.
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
# What is varied of a recipe, by method, each with all others: what the advice may name, and what people turn off.
CHECKPOINTING = ("false", "true")
VARIED: dict[str, dict[str, tuple[str, ...]]] = {
    "lora": {"adapter.targets": ("attention", "attention+mlp"), "train.gradient_checkpointing": CHECKPOINTING},
    "full": {"train.gradient_checkpointing": CHECKPOINTING, "optimizer.name": ("adamw", "adamw8bit", "adafactor")},
    "scratch": {},
}
FUSED = {"train.fused_backward": "true", "optimizer.clip": "tensor", "train.accumulation": "1"}
# Further edits of each recipe: LoRA on whole weights, and QLoRA.
BESIDE: dict[str, tuple[dict[str, str], ...]] = {
    "lora": ({"model.quantize": "null"}, {"model.quantize": "nf4"}),
    "full": (),
    "scratch": (),
}
# On small nets also the rest of what the advice may name and a recipe can say.
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
PRESERVING = ({"adapter.distill_every": "null"}, {"adapter.distill_every": "5"})  # of LoRA
WHOLE = (
    "base",
    "sd15",
    "sd21",
    "sdxl",
)  # profiles with all of this; of other architectures, as large as they are, what their recipes say
ON_CPU = ("base",)  # that a CPU may train, besides nets from scratch
SMALL = (
    "base",
)  # on which what stands in OF_SMALL, and a higher rank, are measured: larger nets take minutes for each
DEVICES: tuple[Device, ...] = ("cuda", "cpu")
EXAMPLES: dict[tuple[str, str, Device], Any] = {}  # of each recipe's batches: its encoders run once


def profiles() -> dict[str, list[str]]:
    """The recipes of each profile, by its name."""
    found: dict[str, list[str]] = {}
    for name in bundled_recipes():
        recipe = load_recipe(name)
        found.setdefault(
            f"scratch-{recipe.name}" if recipe.method == "scratch" else configs_of(recipe.model)[1], []
        ).append(name)
    return found


@click.command()
@click.argument("names", nargs=-1)
@click.option(
    "--missing", is_flag=True, help="Keep what the profiles hold, and measure only variants and devices that they lack."
)
@click.option("--method", help="Measure only the variants of this method; of others, keep what the profiles hold.")
def main(names: tuple[str, ...], missing: bool, method: str | None) -> None:
    """Measure the profiles NAMES, or all. Each variant is written down when it is measured."""
    for name in names or profiles():
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
    """One profile as plain values, again after each variant that was measured; `held`: as it was."""
    import diffusers
    import torch

    from finetune.estimate.tracing.measure import BATCHES, outside, parameters

    recipes = [
        load_recipe(one) for one in sorted(profiles()[name], key=lambda one: (one.startswith("full/"), one))
    ]  # of LoRA's, the base is whole
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
    """What tells a variant from others."""
    return f"{device} {json.dumps(settings, sort_keys=True)}"


def wanted(name: str, recipe: Recipe) -> Iterator[tuple[Device, Recipe]]:
    """The variants of a recipe on the profile `name`: devices, and the recipe with all that is varied; on a CPU only
    whether a base is preserved.
    """
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
    """A bundled recipe with other values, at the rank that is measured, its text encoders whole, without averages.

    (Averages are added to what a profile says, and what text encoders spare is taken off.)
    """
    sets = [f"{key}={json.dumps(value) if key == 'adapter.targets' else value}" for key, value in chosen.items()]
    sets += ["model.text_encoder_placement=device"] if recipe.model.text_encoder_placement != "device" else []
    return load_recipe(
        f"{recipe.method}/{recipe.name}",
        [*sets, "train.ema=null", *([f"adapter.rank={RANK}"] if recipe.adapter else [])],
    )


def variant_of(name: str, recipe: Recipe, device: Device, first: dict[str, Any] | None = None) -> dict[str, Any]:
    """One variant of a profile.

    Args:
        first: the run of it at the first of `BATCHES`, if that was traced already.
    """
    from finetune.estimate.tracing.measure import BATCHES, variant

    # An adapter's gradients weigh nothing beside the rest, and fused ones do not stay.
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
    """The phases of one run on fake tensors."""
    from finetune.data.audit.audit import scan
    from finetune.estimate.tracing.measure import BATCHES
    from finetune.estimate.tracing.traced_run import TracedRun

    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch_size=batch, accumulation=times))
    if hasattr(
        recipe.net, "group"
    ):  # of images that a critic compares: it has to divide both batches, and its size costs nothing
        recipe = dataclasses.replace(recipe, net=dataclasses.replace(recipe.net, group=BATCHES[0]))
    audit = scan(recipe.data) if recipe.method == "scratch" else None
    side = recipe.data.resolution
    subject = TracedRun(recipe, "float32" if device == "cpu" else "bfloat16", (side, side), audit, device=device)
    key = recipe.method, recipe.name, device
    found = subject.phases(only_training, EXAMPLES.get(key) if only_training else None)
    EXAMPLES[key] = subject.example
    return found


def encoded(profile: dict[str, Any]) -> str:
    """JSON with one line for each key and each variant's key, which a diff can show."""
    head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in profile.items() if key != "variants"]
    variants = [
        ",\n".join(f"   {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in entry.items())
        for entry in profile["variants"]
    ]
    return "{\n" + ",\n".join(head) + ',\n "variants": [\n  {\n' + "\n  },\n  {\n".join(variants) + "\n  }\n ]\n}\n"


if __name__ == "__main__":
    main()
