"""`ft recipes`: the recipes that come with the project."""

from __future__ import annotations

from pathlib import Path

import click

from finetune.config.loader import bundled_recipes
from finetune.errors import UserError, did_you_mean
from finetune.paths import RECIPES


@click.group(invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """List the recipes that come with ft, show one, or copy one to edit."""
    if context.invoked_subcommand is None:
        names = bundled_recipes()
        width = max(map(len, names))
        for name in names:
            click.echo(f"{name:<{width}}  {whom_for(_text(name))}")


@command.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a recipe."""
    click.echo(_text(name), nl=False)


@command.command()
@click.argument("name")
@click.argument("file", required=False, type=click.Path(path_type=Path))
def copy(name: str, file: Path | None) -> None:
    """Copy a recipe to FILE (by default its own name, here) for editing; never writes over a file."""
    target = file or Path(f"{name.replace('/', '-')}.yaml")
    if target.is_dir():
        target = target / f"{name.replace('/', '-')}.yaml"
    try:
        with open(target, "x", encoding="utf-8") as opened:
            opened.write(_text(name))
    except FileExistsError:
        raise UserError(
            f"{target} exists already; it was not touched", remedy=f"name another file: ft recipes copy {name} FILE"
        ) from None
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror}", remedy=f"name another file: ft recipes copy {name} FILE"
        ) from None
    click.echo(f"copied to {target}; next: ft check {target}")


def whom_for(text: str) -> str:
    """The recipe's first comment."""
    first = text.partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _text(name: str) -> str:
    names = bundled_recipes()
    if name not in names:
        raise UserError(f'no recipe that comes with ft is called "{name}"', remedy=did_you_mean(name, names))
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
