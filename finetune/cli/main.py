"""`ft`: the command. Subcommands are imported only when they are used, so that help appears at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import final

import click

from finetune import terminal
from finetune.cli.process import report_errors
from finetune.errors import UserError, did_you_mean

# Name of the module in `finetune/cli/` → its line in `ft --help`: the first line of its own help.
COMMANDS = {
    "start": "Turn a folder of images into a recipe, in three questions.",
    "recipes": "List the bundled recipes, show one, or copy one to edit.",
    "estimate": "Estimate memory, time and cost of a run before it starts.",
    "data": "Check images and captions.",
    "check": "Check a recipe, its images and its plan without training.",
    "train": "Train a recipe, or resume a run.",
    "runs": "List runs: state, progress, time left.",
    "sample": "Generate images with a trained run.",
    "eval": "Measure a run's images: quality, diversity, novelty.",
    "export": "Write a run's weights as files for other programs.",
    "doctor": "Check this machine, and suggest fixes.",
    "ui": "Serve a local web page to check data, plan, train and sample.",
    "gpus": "List GPUs: memory, speed, price, and the sources of each figure.",
}
MODULES = {"eval": "evaluate"}  # commands whose module has another name
EPILOG = """\b
Shell completion, for bash (zsh and fish likewise):
  eval "$(_FT_COMPLETE=bash_source ft)"
"""


@final
class Commands(click.Group):
    """The commands by name, each imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if ctx.resilient_parsing and cmd_name not in COMMANDS:  # the shell completes a line
            return None
        if cmd_name not in COMMANDS:
            raise UserError(f'ft has no command "{cmd_name}"', remedy=did_you_mean(cmd_name, COMMANDS))
        command: click.Command = importlib.import_module(f"finetune.cli.{MODULES.get(cmd_name, cmd_name)}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
)
@click.version_option(package_name="ft-image", prog_name="ft")
def ft() -> None:
    """Fine-tune image generators with LoRA or fully, or train small ones from scratch.

    Start with `ft recipes`, then `ft check RECIPE` and `ft train RECIPE`.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `ft`; always ends in SystemExit: 0 for success, 2 for a mistake in the arguments, the recipe or the data."""
    terminal.configure()
    terminal.silence_libraries()
    with report_errors():
        try:
            sys.exit(ft.main(arguments, prog_name="ft", standalone_mode=False))
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except click.Abort:  # click's name for Ctrl-C
            raise KeyboardInterrupt from None


if __name__ == "__main__":
    main()
