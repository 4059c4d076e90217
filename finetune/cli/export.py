"""`ft export`: a run's weights as files for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from finetune.cli.process import quiet_libraries
from finetune.export import Format, export


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "layout",
    type=click.Choice(get_args(Format)),
    default="diffusers",
    help="One LoRA file for ComfyUI, or by kohya's names.",
)
@click.option("--merge", is_flag=True, help="Write the whole model with the LoRA worked into its weights.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Numbers of the file; by default as they are.",
)
@click.option(
    "--checkpoint",
    metavar="best|STEPS",
    help="One that the run keeps: best by validation loss, or by steps taken; by default its end.",
)
@click.option("--out", type=click.Path(path_type=Path), help="File or folder to write; by default in the run's folder.")
def command(run: Path, layout: str, merge: bool, dtype: str | None, checkpoint: str | None, out: Path | None) -> None:
    """Write what a run has trained as files for other programs.

    RUN is the run's folder.
    """
    quiet_libraries()
    for file in export(run, layout, merge, dtype, out, checkpoint):
        click.echo(file)
