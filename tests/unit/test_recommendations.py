"""Twelve situations with the run that `ft estimate` recommends. docs/explanation/recommendations.md shows them."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from finetune.cli.estimate import choose_gpu
from finetune.cli.estimate import command as estimate
from finetune.config.loader import load_recipe
from finetune.estimate.forecast import forecast
from finetune.estimate.hardware.gpus import PRICES
from finetune.estimate.hardware.parallelism import Group
from finetune.estimate.recommend import OVERNIGHT, Question, answer, license_of
from finetune.models.registry import specs

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "recommendations.md"
# Situation → (arguments of `ft estimate`, the recommended recipe).
SITUATIONS = {
    "8 GB laptop, 20 photos": ("--images 20 --gpu rtx4060", "lora/flux2-klein-4b-12gb"),
    "12 GB, 20 photos": ("--images 20 --gpu rtx3060", "lora/flux2-klein-4b-12gb"),
    "24 GB, 3,000 images": ("--images 3000 --gpu rtx3090", "lora/flux2-klein-4b"),
    "A100, 5,000 images": ("--images 5000 --gpu a100-80gb", "full/flux2-klein-4b"),
    "8 × A100, 100,000 images": ("--images 100000 --gpu a100-80gb --gpus 8 --hours 24", "full/flux2-klein-4b"),
    "CPU, 50 images": ("--images 50 --gpu cpu", "lora/emoji"),
    "Mac with 32 GB, 20 photos": ("--images 20 --gpu m2max --vram 32", "lora/z-image"),
    "$10": ("--images 30 --gpu rtx4090 --budget 10", "lora/qwen-image"),
    "$100": ("--images 2000 --gpu a100-80gb --budget 100 --hours 48", "lora/qwen-image-80gb"),
    "2 hours": ("--images 20 --gpu rtx4090 --hours 2", "lora/z-image"),
    "Stable Diffusion XL only": ("lora/sdxl-12gb --images 20 --gpu rtx3060", "lora/sdxl-12gb"),
    "Commercial use": ("--images 20 --gpu rtx3090 --commercial", "lora/qwen-image"),
}


@pytest.fixture(autouse=True)
def _listed_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PRICES, raising=False)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_recommendation_for_a_situation(situation: str) -> None:
    arguments, recipe = SITUATIONS[situation]
    with estimate.make_context("ft estimate", arguments.split()) as context:
        options = dict(context.params)
    gpu, group = choose_gpu(options["gpu_name"], options), Group(options["gpus"], options["sharding"])
    if options["recipe"]:
        one = forecast(load_recipe(options["recipe"]), options["recipe"], gpu, options["images"], group=group)
        assert one.fits and one.hours < OVERNIGHT and one.name == recipe
    else:
        limits = {key: options[key] for key in ("hours", "budget", "goal", "data", "commercial")}
        best = answer(Question(options["images"], gpu, group, **limits)).choice.forecast
        base = license_of(best)
        assert best.name == recipe and best.fits
        assert options["budget"] is None or (best.usd and best.usd[1] <= options["budget"])
        assert options["hours"] is None or best.hours <= options["hours"]
        assert not options["commercial"] or (base and base.commercial != "no")
    row = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {situation} |"))
    assert f"`ft estimate {arguments}`" in row and f"`{recipe}`" in row and len(row.split("|")[4].strip()) > 20


def test_page_ranks_every_base_as_its_spec_does() -> None:
    """Each row of the list: rank, name, license, whether commercial use is allowed; in the order of preference."""
    text = PAGE.read_text(encoding="utf-8")
    rows = [
        tuple(cell.strip() for cell in found)
        for found in re.findall(r"^\| (\d+) \| `([^`]+)` \| ([^|]+) \| ([^|]+) \|", text, re.M)
    ]
    wanted = sorted(
        (one.preference, name, one.license, one.commercial)
        for spec in specs().values()
        for name, one in spec.variants.items()
    )
    assert [(int(rank), name, license, commercial) for rank, name, license, commercial in rows] == [
        (rank, name, license, commercial) for rank, name, license, commercial in wanted if rank < 1_000
    ]


def test_earlier_goal_name_is_accepted() -> None:
    goal = next(one for one in estimate.params if one.name == "goal")
    assert isinstance(goal, click.Option) and goal.type.convert("speed", goal, None) == "sampling-speed"
