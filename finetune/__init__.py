"""Fine-tune image generators with LoRA or fully, or train small ones from scratch, with a reliable estimate first.

    import finetune

    recipe = finetune.load_recipe("lora/emoji", ["train.steps=20", "output.folder=runs/try"])
    print(finetune.plan(recipe).arithmetic)  # 380 images / batch 8 = 47.5 steps per epoch; …
    run = finetune.train(recipe)  # the run's folder
    finetune.sample(run, ["a rocket", "a red heart"], seeds=[0, 1])  # the image files
    model = finetune.open_model("runs/scratch-vae")  # pixel-space families: the model itself

Mistakes in recipes, data and arguments raise `finetune.UserError`. Messages go to `logging.getLogger("finetune")`,
which shows them only if you configure logging (`finetune.terminal.configure()` does, as the commands do). Modules are
imported when they are used, so `import finetune` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.config.loader import load_recipe
    from finetune.config.schema import Recipe
    from finetune.errors import UserError
    from finetune.inference.sample import sample
    from finetune.job import plan, train
    from finetune.models.scratch.base import open_model

__all__ = ["Recipe", "UserError", "load_recipe", "open_model", "plan", "sample", "train"]

_MODULES = {
    "Recipe": "config.schema",
    "UserError": "errors",
    "load_recipe": "config.loader",
    "open_model": "models.scratch.base",
    "plan": "job",
    "sample": "inference.sample",
    "train": "job",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"finetune.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
