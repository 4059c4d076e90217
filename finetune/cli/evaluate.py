"""`ft eval`: how good a run's images are, in numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune.cli.process import quiet_libraries

if TYPE_CHECKING:
    from finetune.evaluation.evaluate import Evaluation

# (field, name, form, what it says)
MEASURES = (
    ("frechet_distance", "{} Fréchet distance", ".3f", "0: equal; compare only equal numbers of images"),
    ("kernel_distance", "{} kernel distance", ".4f", "about 0: equal"),
    ("precision", "precision", ".1%", "of drawn images look real"),
    ("recall", "recall", ".1%", "of real ones could have been drawn"),
    ("density", "density", ".2f", "1: as close to real ones as they to each other"),
    ("coverage", "coverage", ".1%", "of real ones have a drawn one near"),
    ("diversity", "diversity", ".2f", "÷ that of the real ones; towards 0, all are alike"),
    ("copied", "closer than kin", ".1%", "of drawn ones come nearer to a training image than any other does"),
)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--against", help="Images to compare with, a folder; by default those that it was trained on.")
@click.option(
    "--images",
    type=click.IntRange(min=2),
    help="How many to draw; by default as many as there are real ones, 500 at most.",
)
@click.option(
    "--scored",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Images whose likelihood is taken, at most.",
)
@click.option(
    "--features",
    default="emoji-net",
    show_default=True,
    help="What compares: emoji-net, or a DINOv2's folder or name on the hub.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="A new folder for figures and grids; by default in the run's own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(
    run: Path, against: str | None, images: int | None, scored: int, features: str, out: Path | None, as_json: bool
) -> None:
    """Measure a run's images: how real, how varied, how new.

    RUN is the run's folder. Draws images, each for a real image's caption, and compares them by the features of a small net
    trained on emoji, or of a DINOv2. Beside them, where there are images enough, stands what other real images would reach.
    """
    quiet_libraries()
    from finetune.evaluation.evaluate import evaluate

    found = evaluate(run, against, images, features, out, scored)
    click.echo(json.dumps(dataclasses.asdict(found), indent=1, ensure_ascii=False) if as_json else said(found))


def said(found: Evaluation) -> str:
    """The table."""
    from finetune.terminal import table

    rows = [("", f"{'drawn':>8}{'real':>8}" if found.itself else f"{'drawn':>8}")]
    for field, name, form, meaning in MEASURES:
        values = [getattr(one, field) for one in (found.closeness, found.itself) if one is not None]
        shown = "".join(f"{'–' if value is None else format(value, form):>8}" for value in values)
        rows.append((name.format(found.features), f"{shown}   {meaning}"))
    if found.likelihood is not None:
        bound = "exact" if found.likelihood.exact else "at most"
        rows.append(
            (
                "bits/dim",
                f"{found.likelihood.bits_per_dimension:>8.3f}{' ' * 8 * bool(found.itself)}   {bound}, of {found.likelihood.of}",
            )
        )
    else:
        rows.append(("bits/dim", f"{'–':>8}{' ' * 8 * bool(found.itself)}   {found.no_likelihood}"))
    rows.append(("images/s", f"{1 / max(found.seconds_per_image, 1e-9):>8.3g}"))
    title = f"{found.drawn} drawn by {Path(found.run).name} beside {found.real} of {found.against}"
    return f"{table(title, rows)}\nfigures and grids are in {found.folder}"
