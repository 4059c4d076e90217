"""`ft check`: everything up to the first training step, without loading weights."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from finetune import terminal
from finetune.cli import completion
from finetune.config.loader import load_recipe


@click.command()
@click.argument("recipe", shell_complete=completion.recipes)
@click.option(
    "overrides",
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one value of the recipe, such as train.batch_size=2.",
)
def command(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check a recipe, its images and its plan without training.

    RECIPE is a YAML file, or the name of a bundled recipe. Exit code 2: training would fail, and the message says why.

    \b
    Examples:
      ft check lora/emoji
      ft check mine.yaml --set data.path=photos --set train.steps=1000
    """
    loaded = load_recipe(recipe, overrides)
    from finetune.cli.preflight import refuse_early

    refuse_early(loaded)
    from finetune.job import audit_and_plan, check_estimate

    _, plan = audit_and_plan(loaded)
    check_estimate(plan)
    if Path(plan.folder).exists():
        terminal.echo(
            f"{plan.folder} already exists: add --resume to continue that run,"
            " or choose another folder: --set output.folder=…"
        )
    start = shlex.join(["ft", "train", recipe, *(part for assignment in overrides for part in ("--set", assignment))])
    terminal.echo(f"OK. Start with: {start}")
