"""`ft recipes`: the bundled recipes."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import yaml

from finetune import terminal
from finetune.config import json_schema, reference, renamed
from finetune.config.loader import bundled_recipes, load_recipe
from finetune.errors import UserError, did_you_mean
from finetune.paths import RECIPES


@click.group(invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """List the bundled recipes, show one, or copy one to edit."""
    if context.invoked_subcommand is None:
        names = bundled_recipes()
        width = max(map(len, names))
        for name in names:
            terminal.echo(f"{name:<{width}}  {whom_for(_text(name))}")


@command.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a recipe."""
    terminal.echo(_text(name).removesuffix("\n"))


@command.command()
@click.argument("name")
@click.argument("file", required=False, type=click.Path(path_type=Path))
def copy(name: str, file: Path | None) -> None:
    """Copy a recipe to FILE for editing. Default: its own name, in this folder. Never overwrites a file."""
    target = file or Path(f"{name.replace('/', '-')}.yaml")
    if target.is_dir():
        target = target / f"{name.replace('/', '-')}.yaml"
    try:
        with open(target, "x", encoding="utf-8") as opened:
            opened.write(json_schema.with_header(_text(name), target))
    except FileExistsError:
        raise UserError(
            f"{target} already exists; it was not changed", remedy=f"name another file: ft recipes copy {name} FILE"
        ) from None
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror}", remedy=f"name another file: ft recipes copy {name} FILE"
        ) from None
    terminal.echo(f"copied to {target}; next: ft check {target}")


def whom_for(text: str) -> str:
    """The recipe's first comment, after the line for editors."""
    first = next((line for line in text.splitlines() if not line.startswith(json_schema.HEADER)), "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _text(name: str) -> str:
    names = bundled_recipes()
    if name not in names:
        raise UserError(f'there is no bundled recipe "{name}"', remedy=did_you_mean(name, names))
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


@command.command()
@click.argument("section", required=False)
def keys(section: str | None) -> None:
    """Explain the keys of a recipe: all sections, or one SECTION (adapter, net.dcgan) or key (adapter.rank)."""
    if section is None:
        terminal.echo(reference.overview())
        terminal.echo("\n`ft recipes keys SECTION` prints the type, default, range, meaning and effect of each key")
    else:
        terminal.echo(reference.text(reference.find(section)))


@command.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def migrate(files: tuple[Path, ...]) -> None:
    """Replace old names of keys and values in recipe FILES, in place; comments and layout stay."""
    for file in files:
        try:
            text = file.read_bytes().decode()
            new, lines = renamed.migrate(text)
            if lines:
                beside = file.with_name(f".{file.name}.new")
                beside.write_bytes(new.encode())
                shutil.copymode(file, beside)
                beside.replace(file)
        except OSError as error:
            raise UserError(
                f"{file} cannot be rewritten: {error.strerror}", remedy="check its name and permissions"
            ) from None
        except (UnicodeDecodeError, yaml.YAMLError):
            load_recipe(file)  # says what is wrong, and in which line
            raise
        terminal.echo(f"{file}: " + ("nothing to rename" if not lines else f"{len(lines)} renamed"))
        for line in lines:
            terminal.echo(f"  {line}")
