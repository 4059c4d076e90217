"""`ft sample`: images from what a run has trained."""

from __future__ import annotations

from pathlib import Path

import click

from finetune.cli.process import quiet_libraries
from finetune.errors import UserError


@click.command()
@click.argument("run")
@click.option(
    "prompts",
    "--prompt",
    multiple=True,
    help="What to draw; give it as often as you like. By default the recipe's prompts.",
)
@click.option(
    "seeds",
    "--seed",
    multiple=True,
    type=click.IntRange(min=0),
    help="Every prompt is drawn with every seed. By default as the run drew.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps; by default as the recipe says.")
@click.option(
    "--guidance",
    type=click.FloatRange(min=0),
    help="How strictly to follow the prompt (1: plainly); by default as the recipe says.",
)
@click.option("--negative", help="What not to draw; by default as the recipe says.")
@click.option(
    "--sampler",
    help="euler, heun, dpm++, unipc, ddim, …: those valid for the model; by default as the recipe says, or the model's own.",
)
@click.option("--eta", type=click.FloatRange(0, 1), help="DDIM's noise on the way: 0 adds none, 1 as much as DDPM.")
@click.option(
    "--truncation", type=click.FloatRange(0, 2), help="Of a GAN: below 1, images are more alike and better made."
)
@click.option("--strengths", help="Of a LoRA, such as 0.4,0.7,1: a sheet a prompt, with a column for each.")
@click.option("--checkpoints", help="all, or steps such as 500,1000: a row of the sheet for each.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="A new folder for the images; by default in the run's own.",
)
def command(
    run: str,
    prompts: tuple[str, ...],
    seeds: tuple[int, ...],
    steps: int | None,
    guidance: float | None,
    negative: str | None,
    sampler: str | None,
    eta: float | None,
    truncation: float | None,
    strengths: str | None,
    checkpoints: str | None,
    out: Path | None,
) -> None:
    """Draw images with what a run has trained.

    RUN is the run's folder; a diffusers folder or embedded:base are drawn with too. Writes a file for each image, and
    grid.png with them all. With --strengths or --checkpoints, sheets by which to choose among a LoRA's checkpoints.
    """
    several = strengths is not None or checkpoints is not None
    factors = numbers(strengths or "1", "--strengths", "0.4,0.7,1")
    chosen = (
        None
        if checkpoints in (None, "all")
        else [int(step) for step in numbers(checkpoints or "", "--checkpoints", "all, or 500,1000")]
    )
    quiet_libraries()
    if several:
        if truncation is not None:
            raise UserError(
                "sheets are of LoRAs, and only a GAN is truncated",
                where="--truncation",
                remedy="leave out --truncation",
            )
        from finetune.inference.lora_sweep import compare

        sheets = compare(run, factors, chosen, prompts, seeds or None, steps, guidance, negative, out)
        click.echo("\n".join(map(str, sheets)))
        return
    from finetune.inference.sample import sample

    asked = {
        "steps": steps,
        "guidance": guidance,
        "negative": negative,
        "out": out,
        "sampler": sampler,
        "eta": eta,
        "truncation": truncation,
    }
    files = sample(run, prompts, seeds or None, **asked)  # type: ignore[arg-type]
    click.echo(f"{len(files)} images and grid.png are in {files[0].parent}")


def numbers(text: str, option: str, example: str) -> list[float]:
    """`0.4,0.7,1` as numbers.

    Raises:
        UserError: it is something else.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f'"{text}" is no list of numbers', where=option, remedy=f"write {option} {example}") from None
    if not all(abs(number) < 1e9 for number in found):
        raise UserError(f'"{text}" holds no usable number', where=option, remedy=f"write {option} {example}")
    return found
