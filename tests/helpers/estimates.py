"""`ft estimate` and its parts, as tests use them."""

from __future__ import annotations

from finetune.config.loader import load_recipe
from finetune.estimate.forecast import Forecast, forecast
from finetune.estimate.hardware.gpus import Gpu, find
from finetune.estimate.tracing.traced_run import Phase, TracedRun
from tests.helpers import commands


def ft(*arguments: str) -> int:
    """`ft estimate …` in this process; returns the exit code."""
    return commands.ft("estimate", *arguments)


def traced(name: str, *overrides: str) -> dict[str, Phase]:
    """The traced training step of a bundled recipe on fake tensors."""
    recipe = load_recipe(name, overrides)
    return TracedRun(recipe, "bfloat16", (recipe.data.resolution,) * 2).phases(only_training=True)


def forecast_of(name: str, *overrides: str, gpu: Gpu | None = None, images: int = 3000) -> Forecast:
    """The estimate of a bundled recipe on an RTX 3090, or on `gpu`."""
    return forecast(load_recipe(name, overrides), name, gpu or find("rtx3090"), images)
