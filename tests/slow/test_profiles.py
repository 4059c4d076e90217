"""Cost profiles, which estimates are computed from, against traces, and the savings of memory options."""

from __future__ import annotations

import functools
import json

import pytest

from finetune.config.loader import load_recipe
from finetune.estimate import profiles
from finetune.estimate.allocator.caching import replay
from finetune.estimate.constants import GIB
from finetune.estimate.hardware.gpus import find
from finetune.estimate.memory import memory
from finetune.estimate.tracing.measure import BATCHES, MICRO, UPDATE, operators, variant
from tests.helpers.estimates import forecast_of, traced
from tools import measure_profiles


def test_every_profile_covers_the_bundled_recipes() -> None:
    """If a recipe, an option or a key was added, update the profiles with tools/measure_profiles.py."""
    lacking = set()
    for profile_name, recipes in measure_profiles.recipes_by_profile().items():
        profile = profiles.load(profile_name) if profile_name in profiles.known() else None
        for name in recipes:
            asked = list(measure_profiles.wanted(profile_name, load_recipe(name)))
            held = [(one.device, one.settings) for one in profile.variants] if profile else []
            if any((device, profiles.settings_of(recipe)) not in held for device, recipe in asked):
                lacking.add(name)
            assert profile is None or not profile.build or profile.build == profiles.build_key(asked[0][1]), name
    assert not lacking


@pytest.mark.parametrize(("name", "device"), [("lora/emoji", "cuda"), ("full/emoji", "cuda"), ("scratch/vae", "cpu")])
def test_profile_matches_a_new_measurement(name: str, device: profiles.Device) -> None:
    """If not, update it with tools/measure_profiles.py."""
    recipe = measure_profiles.varied(load_recipe(name), {"train.gradient_checkpointing": "false"})
    times = (1,) if recipe.method == "lora" else (1, 2)
    low, high = (
        [measure_profiles.traced(recipe, device, batch, accumulation) for accumulation in times] for batch in BATCHES
    )
    found = variant(recipe, device, low, high, None)
    profile = next(one for one, recipes in measure_profiles.recipes_by_profile().items() if name in recipes)
    held = json.loads(profiles.path_of(profile).read_text())
    entry = next(one for one in held["variants"] if all(one[key] == found[key] for key in ("device", "settings")))
    assert {key: entry[key] for key in found if key != "rank_bytes"} == {
        key: found[key] for key in found if key != "rank_bytes"
    }


def test_profile_between_its_points_matches_the_trace() -> None:
    """Reserved memory is within 6% at a batch, resolution and rank that were not measured (it is a few MiB)."""
    overrides = ("train.batch_size=6", "data.resolution=96", "adapter.rank=32")
    reserved = replay(traced("lora/emoji", *overrides)["train"].events).peak_reserved
    recipe = load_recipe("lora/emoji", overrides)
    profile = profiles.load("base")
    said = memory(profile, profiles.variant_of(profile, recipe), recipe, find("rtx3090"))
    around = said.parts["cuBLAS workspace"] + said.parts["CUDA context"]
    assert said.phases["train"] - around == pytest.approx(reserved, rel=0.06)


# Edits, and the batch size at which each matters: weights and gradients at small ones, activations at large ones.
MEMORY_OPTIONS = {
    "checkpointing": (16, "train.gradient_checkpointing=true"),
    "every second block": (8, "train.gradient_checkpointing=2"),
    "a smaller batch": (16, "train.batch_size=2"),
    "8-bit AdamW": (16, "optimizer.name=adamw8bit"),
    "paged": (16, "optimizer.name=adamw8bit", "optimizer.paged=true"),
    "no averages": (16, "train.ema=null"),
    "bfloat16 weights": (4, "train.weights=bfloat16"),
    "fused backward": (4, "train.fused_backward=true", "optimizer.clip=tensor"),
}


@functools.cache
def reserved(*overrides: str) -> int:
    return replay(traced("full/emoji", *overrides)["train"].events).peak_reserved


@pytest.mark.parametrize("name", MEMORY_OPTIONS)
def test_memory_option_saves_what_the_estimate_says(name: str) -> None:
    """The estimate decreases as much as the traced step does."""
    batch, *edits = MEMORY_OPTIONS[name]
    without = ("train.ema=null",) if batch == 4 else ()  # the profile's own batch: without EMA it is as measured
    settings = [(f"train.batch_size={batch}", *without, *more) for more in ((), edits)]
    before, after = (forecast_of("full/emoji", *setting) for setting in settings)
    real = [reserved(*setting) for setting in settings]
    promised, seen = before.memory.phases["train"] - after.memory.phases["train"], real[0] - real[1]
    assert seen > 0
    assert promised == pytest.approx(seen, rel=0.15, abs=6 << 20)


@pytest.mark.parametrize("name", profiles.known())
def test_profile_has_the_published_parameter_count(name: str) -> None:
    """Denoisers: 860 M, 866 M and 2.6 B (arXiv:2307.01952, table 1: 860 M, 865 M and 2.6 B)."""
    published = {"sd15": 859.5e6, "sd21": 865.9e6, "sdxl": 2567.5e6}
    if name in published:
        assert profiles.load(name).parameters["denoiser"] == pytest.approx(published[name], rel=1e-3)


def test_sd15_memory_estimate_matches_published_measurements() -> None:
    """SimpleTuner on an L40S: 2.83 GiB without checkpointing, 1.93 with it (bfloat16 adapters; ours are float32)."""
    for checkpointing, published in (("false", 2.83), ("true", 1.93)):
        found = forecast_of(
            "lora/sd15", "train.batch_size=1", f"train.gradient_checkpointing={checkpointing}", gpu=find("l40s")
        )
        reserved = found.memory.phases["train"] - found.memory.parts["CUDA context"]
        assert reserved / GIB == pytest.approx(published, rel=0.05)


def test_trace_with_fused_backward_counts_the_optimizers_operators() -> None:
    """The optimizer steps inside the backward pass, but its operators are counted as the update; FLOPs are equal."""
    fused = ("train.fused_backward=true", "optimizer.clip=tensor", "train.ema=null")
    phases = {name: traced("full/emoji", *edits)["train"] for name, edits in (("fused", fused), ("plain", fused[1:]))}
    counts = {
        name: {part: len(operators(phase, sections)) for part, sections in (("micro", MICRO), ("update", UPDATE))}
        for name, phase in phases.items()
    }
    flops = {name: sum(one.flops for one in operators(phase, MICRO)) for name, phase in phases.items()}

    assert flops["fused"] == flops["plain"] > 0
    assert counts["fused"]["micro"] == pytest.approx(counts["plain"]["micro"], rel=0.01)
    assert counts["fused"]["update"] > counts["plain"]["update"] > 0  # one update per tensor instead of one for all
