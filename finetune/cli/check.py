"""`ft check`: everything that `ft train` would refuse before its first step."""

from __future__ import annotations

import shlex

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
@click.option("--resume", is_flag=True, help="Check that the run in the recipe's folder can be resumed.")
@click.option("--force", is_flag=True, help="Accept a run that does not fit into memory, or takes weeks on a CPU.")
def command(recipe: str, overrides: tuple[str, ...], resume: bool, force: bool) -> None:
    """Check a recipe, its images and its plan without training.

    RECIPE is a YAML file, or the name of a bundled recipe. Exit code 2: training would fail, and the message says why.

    \b
    Examples:
      ft check lora/emoji
      ft check mine.yaml --set data.path=photos --set train.steps=1000
    """
    loaded = load_recipe(recipe, overrides)
    from finetune.cli.preflight import refuse_early

    refuse_early(loaded, resume)
    terminal.silence_libraries()
    from finetune.job import check

    check(loaded, resume, force)
    flags = [flag for flag, given in (("--resume", resume), ("--force", force)) if given]
    start = shlex.join(
        ["ft", "train", recipe, *(part for assignment in overrides for part in ("--set", assignment)), *flags]
    )
    terminal.echo(f"OK. Start with: {start}")
