"""`ft sample`: images generated with a trained run."""

from __future__ import annotations

from pathlib import Path

import click

from finetune import terminal
from finetune.cli import completion
from finetune.cli.preflight import refuse_existing_output, refuse_missing_run
from finetune.errors import UserError
from finetune.terminal import plural


@click.command()
@click.argument("run", shell_complete=completion.runs)
@click.option(
    "prompts",
    "--prompt",
    multiple=True,
    help="Repeat for several prompts. Default: the recipe's prompts.",
)
@click.option(
    "seeds",
    "--seed",
    multiple=True,
    type=click.IntRange(min=0),
    help="Every prompt is sampled with every seed. Default: the run's seeds.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps. Default: the recipe's.")
@click.option(
    "--guidance",
    type=click.FloatRange(min=0),
    help="Classifier-free guidance scale (1: off). Default: the recipe's.",
)
@click.option("--negative", help="Negative prompt. Default: the recipe's.")
@click.option(
    "--sampler",
    help="euler, heun, dpm++, unipc, ddim, …, if valid for the model. Default: the recipe's, or the model's own.",
)
@click.option("--eta", type=click.FloatRange(0, 1), help="Noise of the DDIM sampler: 0 is deterministic, 1 is DDPM.")
@click.option("--truncation", type=click.FloatRange(0, 2), help="For GANs: below 1, higher quality and less diversity.")
@click.option("--strengths", help="LoRA strengths, such as 0.4,0.7,1: one sheet per prompt with a column for each.")
@click.option("--checkpoints", help="all, or steps such as 500,1000: a row of the sheet for each.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="A new folder for the images. Default: inside the run's folder.",
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
    """Generate images with a trained run.

    RUN is the run's folder, a diffusers folder, or embedded:base. Writes one file per image, and grid.png with all.
    With --strengths or --checkpoints, it writes sheets to compare a LoRA's strengths and checkpoints.

    \b
    Examples:
      ft sample runs/lora-mine --prompt "a red fox in snow" --seed 1 --seed 2
      ft sample runs/lora-mine --prompt "a red fox" --strengths 0.4,0.7,1 --checkpoints all
    """
    several = strengths is not None or checkpoints is not None
    factors = parse_numbers(strengths or "1", "--strengths", "0.4,0.7,1")
    chosen = (
        None
        if checkpoints in (None, "all")
        else [int(step) for step in parse_numbers(checkpoints or "", "--checkpoints", "all, or 500,1000")]
    )
    refuse_missing_run(run)
    refuse_existing_output(out)
    if several:
        if truncation is not None:
            raise UserError(
                "--truncation is for GANs, and --strengths and --checkpoints are for LoRAs",
                where="--truncation",
                remedy="remove --truncation",
            )
        from finetune.inference.lora_sweep import compare

        sheets = compare(run, factors, chosen, prompts, seeds or None, steps, guidance, negative, out)
        terminal.echo("\n".join(map(str, sheets)))
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
    terminal.echo(f"{plural(len(files), 'image')} and grid.png are in {files[0].parent}")


def parse_numbers(text: str, option: str, example: str) -> list[float]:
    """Parse `0.4,0.7,1`.

    Raises:
        UserError: it is not a list of numbers.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f'"{text}" is not a list of numbers', where=option, remedy=f"write {option} {example}"
        ) from None
    if not all(abs(number) < 1e9 for number in numbers):
        raise UserError(
            f'"{text}" contains a number that is too large', where=option, remedy=f"write {option} {example}"
        )
    return numbers
