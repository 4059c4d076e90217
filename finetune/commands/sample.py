"""`ft sample`: pictures from what a run has trained."""

from __future__ import annotations

from pathlib import Path

import click

from finetune.entry import quiet_libraries


@click.command()
@click.argument("run")
@click.option("prompts", "--prompt", multiple=True, help="What to draw; give it as often as you like. By default the recipe's prompts.")
@click.option("seeds", "--seed", multiple=True, type=click.IntRange(min=0), help="Every prompt is drawn with every seed. By default as the run drew.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps; by default as the recipe says.")
@click.option("--guidance", type=click.FloatRange(min=0), help="How strictly to follow the prompt (1: plainly); by default as the recipe says.")
@click.option("--negative", help="What not to draw; by default as the recipe says.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="A new folder for the pictures; by default in the run's own.")
def command(
    run: str, prompts: tuple[str, ...], seeds: tuple[int, ...], steps: int | None, guidance: float | None, negative: str | None, out: Path | None
) -> None:
    """Draw pictures with what a run has trained.

    RUN is the run's folder; a diffusers folder or embedded:base are drawn with too. Writes a file for each picture, and
    grid.png with them all.
    """
    quiet_libraries()
    from finetune.sampling import sample

    files = sample(run, prompts, seeds or None, steps=steps, guidance=guidance, negative=negative, out=out)
    click.echo(f"{len(files)} pictures and grid.png are in {files[0].parent}")
