"""`ft check`: everything up to the first step, without weights in memory."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from finetune.config.loader import load_recipe


@click.command()
@click.argument("recipe")
@click.option(
    "overrides",
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one value of the recipe, such as train.batch_size=2.",
)
def command(recipe: str, overrides: tuple[str, ...]) -> None:
    """Look at a recipe, its images and its plan, without training.

    RECIPE is a YAML file, or the name of a bundled recipe. Exit code 2 says that the run cannot work, and why.
    """
    found = load_recipe(recipe, overrides)
    from finetune.job import audit_and_plan, foretell

    _, plan = audit_and_plan(found)
    foretell(plan)
    if Path(plan.folder).exists():
        click.echo(f"{plan.folder} exists already: --resume goes on with it, --set output.folder=… starts another")
    again = shlex.join(["ft", "train", recipe, *(part for assignment in overrides for part in ("--set", assignment))])
    click.echo(f"nothing speaks against it: {again}")
