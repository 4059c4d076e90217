"""`ft data`: images and captions, checked without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from finetune import terminal
from finetune.config.loader import load_recipe, parse_recipe
from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.terminal import Progress, plural

# Used without --recipe: only the defaults of its `data` section matter.
PLAIN = "method: lora\nmodel: {family: sd, path: none}\nadapter: {}\ntrain: {steps: 1}\ndata: {}\n"
SHOWN = 3  # images with their tokens


@click.group()
def command() -> None:
    """Check images and captions."""


@command.command()
@click.argument("source", required=False)
@click.option("--recipe", help="Use this recipe's sizes, settings and tokenizer, and without SOURCE its data.")
@click.option(
    "overrides", "--set", multiple=True, metavar="KEY=VALUE", help="Override one value, such as data.resolution=1024."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a self-contained page with thumbnails.",
)
def check(source: str | None, recipe: str | None, overrides: tuple[str, ...], as_json: bool, html: Path | None) -> None:
    """Check every image and caption of SOURCE: a folder, .tar shards, or a Hugging Face data set.

    Exit code 2: training would stop, and the message says why. Nothing is written to SOURCE.

    \b
    Examples:
      ft data check photos
      ft data check photos --recipe lora/sdxl --html check.html
    """
    if not (source or recipe):
        raise UserError(
            "no data given", remedy="name a folder or a data set: ft data check FOLDER; or give --recipe RECIPE"
        )
    loaded = _recipe(source, recipe, overrides)
    from finetune.data.sources import refuse_inside, refuse_missing

    refuse_missing(loaded.data)
    from finetune.data.audit.audit import scan
    from finetune.report import tables

    if html is not None:
        refuse_inside(html, loaded.data, "--html")
    with Progress("reading images", enabled=not as_json) as progress:
        audit = scan(loaded.data, lambda done, name: progress.show(done, None, name))
    facts = tables.facts(audit, SHOWN)
    counted = _tokens(loaded, audit, facts, bool(recipe))
    if as_json:
        plain = [{key: value for key, value in shown.items() if key != "image"} for shown in facts["images"]]
        terminal.echo(json.dumps(facts | {"images": plain}, indent=1, ensure_ascii=False))
    else:
        terminal.echo(terminal.table("data", tables.data_rows(facts) + tables.caption_rows(facts["images"], counted)))
    if html is not None:
        from finetune.report.data_page import write_page

        _write(lambda: write_page(audit, facts, source or loaded.data.path or str(recipe), html), html)
        terminal.echo(f"written: {html}", err=as_json)
    audit.raise_if_stopped()
    if recipe:
        from finetune.job import check as check_run

        check_run(loaded, quiet=True)


def _recipe(source: str | None, recipe: str | None, overrides: tuple[str, ...]) -> Recipe:
    given = ([f"data.path={source}"] if source else []) + list(overrides)
    return load_recipe(recipe, given) if recipe else parse_recipe(PLAIN, "ft data check", "data", given)


def _tokens(recipe: Recipe, audit: Any, facts: dict[str, Any], named: bool) -> str:
    """Add the tokens of the captions shown to `facts`, and the number of captions cut; returns a line about tokens."""
    if not named:
        return "add --recipe RECIPE to see its model's tokens, and how many captions it would cut"
    from finetune.models.pretrained.loading import open_reader
    from finetune.models.pretrained.tokenizer import spelled

    reader = open_reader(recipe, (image.caption for image in audit.training))
    if reader is None:
        return "this model takes no captions"
    for shown in facts["images"]:
        shown["tokens"] = spelled(reader.tokenizer, shown["caption"])
    counts = (reader.count(image.caption) for image in audit.images)
    long, (_, most) = sum(tokens > read for tokens, read in counts), reader.count("")
    facts["cut_captions"] = long
    return f"{long} longer than the {plural(most, 'token')} that this model reads"


def _write(write: Any, path: Path) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(
            f"the page cannot be written: {error.strerror}", where=str(path), remedy="choose another file for --html"
        ) from error
