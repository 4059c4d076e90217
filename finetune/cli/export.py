"""`ft export`: a run's weights as files for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from finetune import terminal
from finetune.cli import completion
from finetune.cli.preflight import refuse_missing_run
from finetune.errors import UserError
from finetune.export import WHERE, Format, export


@click.command()
@click.argument("run", type=click.Path(path_type=Path), shell_complete=completion.runs)
@click.option(
    "--format",
    "layout",
    type=click.Choice(get_args(Format)),
    default="diffusers",
    show_default=True,
    help="comfyui and kohya write one LoRA file for ComfyUI, or with kohya's names (A1111, Forge).",
)
@click.option("--merge", is_flag=True, help="Write the whole model with the LoRA merged into its weights.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Data type of the weights. Default: unchanged.",
)
@click.option(
    "--checkpoint",
    metavar="best|STEPS",
    help="A checkpoint of the run: best (lowest held-out loss), or its step. Default: the end of the run.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="File or folder to write. Default: inside the run's folder."
)
def command(run: Path, layout: str, merge: bool, dtype: str | None, checkpoint: str | None, out: Path | None) -> None:
    """Write a run's weights as files for other programs.

    RUN is the run's folder. Nothing is overwritten.

    \b
    Examples:
      ft export runs/lora-mine --format comfyui --out mine.safetensors
      ft export runs/lora-mine --checkpoint best
      ft export runs/lora-mine --merge --dtype float16
    """
    refuse_missing_run(str(run))
    if out is not None and out.exists():
        raise UserError(
            f"{out} already exists; it was not changed", where="--out", remedy="choose another name for --out"
        )
    for file in export(run, layout, merge, dtype, out, checkpoint):
        terminal.echo(str(file))
    if layout != "diffusers":
        terminal.echo(WHERE[layout])
