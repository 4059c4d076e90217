"""`ft`: the command. Subcommands are imported only when they are used, so that help answers at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import final

import click

from finetune.cli.process import told
from finetune.errors import UserError, did_you_mean

# Name of the module in `finetune/cli/` → what `ft --help` says of it: the first line of its own help.
COMMANDS = {
    "recipes": "List the recipes that come with ft, show one, or copy one to edit.",
    "estimate": "Say what a run will need: memory, hours, money.",
    "data": "Check images and captions: what trains, what is odd or twice.",
    "check": "Look at a recipe, its images and its plan, without training.",
    "train": "Train by a recipe, or go on with a run.",
    "runs": "List runs: where each stands, how far, and how long to go.",
    "sample": "Draw images with what a run has trained.",
    "eval": "Measure a run's images: how real, how varied, how new.",
    "export": "Write what a run has trained as files for other programs.",
    "doctor": "Say what of this machine works, and what to do about the rest.",
    "gpus": "List GPUs: memory, speed, price, and where figures come from.",
}


MODULES = {"eval": "evaluate"}  # commands whose module has another name


@final
class Commands(click.Group):
    """The commands by name, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in COMMANDS:
            raise UserError(f'ft has no command "{cmd_name}"', remedy=did_you_mean(cmd_name, COMMANDS))
        command: click.Command = importlib.import_module(f"finetune.cli.{MODULES.get(cmd_name, cmd_name)}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ft-image", prog_name="ft")
def ft() -> None:
    """Fine-tune image generators with LoRA or fully, or train small ones from scratch.

    Begin with `ft recipes`, then `ft check RECIPE` and `ft train RECIPE`.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `ft`; always ends by SystemExit: 0 when all is well, 2 for a mistake in what was given."""
    with told():
        try:
            sys.exit(ft.main(arguments, prog_name="ft", standalone_mode=False))
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except click.Abort:  # click's word for Ctrl-C
            raise KeyboardInterrupt from None


if __name__ == "__main__":
    main()
