"""Fine-tune image generators with LoRA, fully, or train small ones from scratch, knowing beforehand what it takes.

    import finetune

    recipe = finetune.load_recipe("lora/emoji", ["train.steps=20", "output.folder=runs/try"])
    print(finetune.plan(recipe).arithmetic)  # pictures ÷ batch … = steps
    run = finetune.train(recipe)  # the run's folder
    finetune.sample(run, ["a rocket", "a red heart"], seeds=[0, 1])  # the files drawn
    model = finetune.open_model("runs/scratch-vae")  # of families in pixel space: the model itself, to draw with and to ask

A mistake in what was given raises `finetune.UserError`. Nothing is imported before it is used, so `import finetune` costs
nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.errors import UserError
    from finetune.job import plan, train
    from finetune.models.pixels import open_model
    from finetune.recipe import Recipe, load_recipe
    from finetune.sampling import sample

__all__ = ["Recipe", "UserError", "load_recipe", "open_model", "plan", "sample", "train"]

_MODULES = {
    "Recipe": "recipe",
    "UserError": "errors",
    "load_recipe": "recipe",
    "open_model": "models.pixels",
    "plan": "job",
    "sample": "sampling",
    "train": "job",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"finetune.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
