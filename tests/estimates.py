"""`ft estimate` and what stands behind it, as tests ask for it."""

from __future__ import annotations

import pytest

from finetune import cli
from finetune.estimate.forecast import Forecast, forecast
from finetune.estimate.gpus import Gpu, find
from finetune.estimate.subject import Phase, Subject
from finetune.recipe import load_recipe


def ft(*arguments: str) -> int:
    """The exit code of `ft estimate` with these arguments."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["estimate", *arguments])
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return code or 0


def traced(name: str, *overrides: str) -> dict[str, Phase]:
    """The training step of a bundled recipe on fake tensors."""
    recipe = load_recipe(name, overrides)
    return Subject(recipe, "bfloat16", (recipe.data.resolution,) * 2).phases(only_training=True)


def of(name: str, *overrides: str, gpu: Gpu | None = None, images: int = 3000) -> Forecast:
    """A bundled recipe on an RTX 3090, or on `gpu`."""
    return forecast(load_recipe(name, overrides), name, gpu or find("rtx3090"), images)
