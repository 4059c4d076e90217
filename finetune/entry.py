"""What the entry scripts share before anything is imported that takes long: arguments, and errors told to people."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from finetune.errors import UserError
from finetune.recipe import Method, Recipe, load_recipe


def arguments(method: Method) -> tuple[Recipe, bool]:
    """Read `RECIPE [--set KEY=VALUE ...] [--resume]`; returns (recipe, resume).

    Raises:
        UserError: among others, for a recipe of another method.
    """
    parser = argparse.ArgumentParser(description=f"Train by a recipe of method {method}.")
    parser.add_argument("recipe", help="a YAML file, or the name of a bundled recipe (`ft recipes` lists them)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the recipe")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the recipe's folder")
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, given.set)
    if recipe.method != method:
        raise UserError(f"this recipe is of method {recipe.method}", where=given.recipe, remedy=f"launch finetune/{recipe.method}.py, or use `ft train`")
    return recipe, given.resume


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Show a user's mistake as its message, without a traceback, and end with exit code 2."""
    try:
        yield
    except UserError as error:
        print("\n".join(error.lines()), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on from the last checkpoint", file=sys.stderr, flush=True)
        sys.exit(130)
