"""`ft sample`: pictures from what a run has trained."""

from __future__ import annotations

from pathlib import Path

import click

from finetune.entry import quiet_libraries


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("prompts", "--prompt", multiple=True, required=True, help="What to draw; give it as often as you like.")
@click.option("seeds", "--seed", multiple=True, type=click.IntRange(min=0), default=(0,), help="One picture of each prompt for each seed; by default 0.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps; by default as the recipe says.")
@click.option("--guidance", type=click.FloatRange(min=0), help="How strictly to follow the prompt (1: plainly); by default as the recipe says.")
@click.option("--negative", help="What not to draw; by default as the recipe says.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for the pictures; by default in the run's own.")
def command(
    run: Path, prompts: tuple[str, ...], seeds: tuple[int, ...], steps: int | None, guidance: float | None, negative: str | None, out: Path | None
) -> None:
    """Draw pictures with what a run has trained.

    RUN is the run's folder. Writes a file for each picture, and a grid of them all.
    """
    quiet_libraries()
    from finetune.sampling import sample

    for file in sample(run, prompts, seeds, steps=steps, guidance=guidance, negative=negative, out=out):
        click.echo(file)
