"""`ft eval`: the quality of a run's images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune import terminal
from finetune.cli import completion
from finetune.cli.preflight import refuse_existing_output, refuse_missing_run
from finetune.terminal import plural

if TYPE_CHECKING:
    from finetune.evaluation.evaluate import Closeness, Evaluation

# (field, name, format, meaning)
METRICS = (
    ("frechet_distance", "{} Fréchet distance", ".3f", "0: equal (compare only equal numbers of images)"),
    ("kernel_distance", "{} kernel distance", ".4f", "about 0: equal"),
    ("precision", "precision", ".1%", "of the generated images look real"),
    ("recall", "recall", ".1%", "of the real images could have been generated"),
    ("density", "density", ".2f", "1: as close to real images as they are to each other"),
    ("coverage", "coverage", ".1%", "of the real images have a generated one nearby"),
    ("diversity", "diversity", ".2f", "relative to the real images; near 0: all alike"),
    ("copied", "close copies", ".1%", "are closer to a training image than any other training image is"),
)


@click.command()
@click.argument("run", type=click.Path(path_type=Path), shell_complete=completion.runs)
@click.option("--against", help="Folder of images to compare with; default: the run's training images.")
@click.option(
    "--images",
    type=click.IntRange(min=2),
    help="Number of images to generate; default: as many as there are real ones, at most 500.",
)
@click.option(
    "--scored",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Number of images whose likelihood is computed, at most.",
)
@click.option(
    "--features",
    default="emoji-net",
    show_default=True,
    help="Feature network: emoji-net, or a DINOv2 by its folder or name on the hub.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="New folder for metrics and image grids; default: inside the run's folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    run: Path, against: str | None, images: int | None, scored: int, features: str, out: Path | None, as_json: bool
) -> None:
    """Measure a run's images: quality, diversity, novelty.

    RUN is the run's folder. Generates images from the captions of real images and compares both by the features of a
    small network trained on emoji, or of a DINOv2. If there are enough images, the same metrics of other real images
    show what can be reached.
    """
    refuse_missing_run(str(run))
    refuse_existing_output(out)
    from finetune.evaluation.evaluate import evaluate

    result = evaluate(run, against, images, features, out, scored)
    if as_json:
        terminal.echo(json.dumps(dataclasses.asdict(result), indent=1, ensure_ascii=False))
        return
    terminal.echo(result.verdict)
    terminal.echo(as_table(result))
    terminal.echo(f"Metrics and image grids: {result.folder}")


def as_table(result: Evaluation) -> terminal.Table:
    """The metrics with their meanings."""
    columns = [result.closeness] + ([result.reference] if result.reference is not None else [])
    rows = [(name, f"{values}   {meaning}") for name, values, meaning in _metric_rows(result, columns)]
    heading = f"{'generated':>11}" + (f"{'real':>11}" if result.reference is not None else "")
    likelihood, blank = result.likelihood, " " * 11 * (len(columns) - 1)
    if likelihood is not None:
        bound = "exact" if likelihood.exact else "upper bound"
        rows.append(("bits/dim", f"{likelihood.bits_per_dimension:>11.3f}{blank}   {bound}, of {likelihood.of}"))
    else:
        rows.append(("bits/dim", f"{'–':>11}{blank}   {result.no_likelihood}"))
    rows.append(("images/s", f"{1 / max(result.seconds_per_image, 1e-9):>11.3g}"))
    title = f"{plural(result.generated, 'image')} by {Path(result.run).name}"
    title += f" compared with {result.real} of {result.against}"
    return terminal.table(title, [("", heading), *rows])


def _metric_rows(result: Evaluation, columns: list[Closeness]) -> Iterator[tuple[str, str, str]]:
    """Name, values and meaning of each metric."""
    for field, name, form, meaning in METRICS:
        values = [getattr(column, field) for column in columns]
        shown = "".join(f"{'–' if value is None else format(value, form):>11}" for value in values)
        yield name.format(result.features), shown, meaning
