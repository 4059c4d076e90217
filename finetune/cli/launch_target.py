"""What `accelerate launch finetune/lora.py` (full.py, scratch.py) runs in each process, and `ft train` in its own."""

from __future__ import annotations

import argparse

from finetune import terminal
from finetune.cli.launcher import refuse_unsupported_engines
from finetune.cli.process import training_process
from finetune.config.loader import load_recipe
from finetune.config.schema import Method, Recipe
from finetune.errors import UserError

DEFAULTS: dict[Method, str] = {"lora": "lora/emoji", "full": "full/emoji", "scratch": "scratch/emoji-vae"}


def main(method: Method) -> int:
    """Train the recipe that the command line names, or the bundled default of `method`."""
    with training_process():
        train(*parse_arguments(method))
    return 0


def train(recipe: Recipe, resume: bool, force: bool) -> None:
    """Train `recipe` in this process.

    Raises:
        UserError: for whatever cannot work; what is known without torch is refused before it is imported.
    """
    from finetune.cli.preflight import refuse_early

    refuse_early(recipe, resume)
    terminal.silence_libraries()
    from finetune.job import run

    run(recipe, resume, force)


def parse_arguments(method: Method) -> tuple[Recipe, bool, bool]:
    """Parse `[RECIPE] [--set KEY=VALUE …] [--resume] [--force]`; returns (recipe, resume, force).

    Raises:
        UserError: among others, for a recipe of another method.
    """
    default = DEFAULTS[method]
    parser = argparse.ArgumentParser(description=f"Train a recipe of method {method}.")
    recipe_help = f"a YAML file, or the name of a bundled recipe (`ft recipes` lists them); default: {default}"
    parser.add_argument("recipe", nargs="?", help=recipe_help)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the recipe"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in the recipe's folder")
    parser.add_argument("--force", action="store_true", help="train even if the estimate says it does not fit")
    given = parser.parse_args()
    refuse_unsupported_engines()
    recipe = load_recipe(given.recipe or default, given.set)
    if given.recipe is None:
        terminal.log.info(
            f"No recipe given: training the bundled {default} on the bundled images. `ft recipes` lists others."
        )
    if recipe.method != method:
        raise UserError(
            f"this recipe's method is {recipe.method}, not {method}",
            where=given.recipe,
            remedy=f"launch finetune/{recipe.method}.py, or use `ft train`",
        )
    return recipe, given.resume, given.force
