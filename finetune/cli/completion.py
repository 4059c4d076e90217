"""What the shell completes for arguments of `ft`."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from finetune.config.loader import bundled_recipes


def recipes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Bundled recipes by name, else files."""
    names = [name for name in bundled_recipes() if name.startswith(incomplete)]
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


def runs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Runs in `runs/`, else folders."""
    folders = sorted(str(plan.parent) for plan in Path("runs").glob("*/plan.json"))
    found = [folder for folder in folders if folder.startswith(incomplete)]
    return [CompletionItem(folder) for folder in found] or [CompletionItem(incomplete, type="dir")]
