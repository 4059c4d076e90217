"""`ft data`: images and captions, looked at without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from finetune import terminal
from finetune.config.loader import load_recipe, parse_recipe
from finetune.config.schema import Recipe
from finetune.errors import UserError

# The recipe of a look without one: its model is not opened, its sections' defaults count.
PLAIN = "method: lora\nmodel: {family: sd, path: none}\nadapter: {}\ntrain: {steps: 1}\ndata: {}\n"
SHOWN = 3  # images with their tokens


@click.group()
def command() -> None:
    """Check images and captions: what trains, what is odd or twice."""


@command.command()
@click.argument("source", required=False)
@click.option(
    "--recipe", help="Take sizes and settings, the model's tokens, and without SOURCE the data too, from this recipe."
)
@click.option(
    "overrides", "--set", multiple=True, metavar="KEY=VALUE", help="Override one value, such as data.resolution=1024."
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page with small images, which stands alone.",
)
def check(source: str | None, recipe: str | None, overrides: tuple[str, ...], as_json: bool, html: Path | None) -> None:
    """Look at every image and caption of SOURCE: a folder, .tar shards, or a Hugging Face data set.

    Exit code 2 says that training would stop, and why. Nothing in SOURCE is written.
    """
    if not (source or recipe):
        raise UserError(
            "nothing to look at", remedy="name a folder or a data set: ft data check FOLDER; or --recipe RECIPE"
        )
    found = _recipe(source, recipe, overrides)
    from finetune.data.audit.audit import scan
    from finetune.data.sources import refuse_inside
    from finetune.report import tables
    from finetune.terminal import Progress

    if html is not None:
        refuse_inside(html, found.data, "--html")
    looking = Progress("looking at images", enabled=not as_json)
    audit = scan(found.data, lambda done, name: looking.show(done, done + 1, name))
    looking.end()
    facts = tables.facts(audit, SHOWN)
    counted = _tokens(found, audit, facts, bool(recipe))
    if as_json:
        plain = [{key: value for key, value in shown.items() if key != "image"} for shown in facts["images"]]
        click.echo(json.dumps(facts | {"images": plain}, indent=1, ensure_ascii=False))
    else:
        click.echo(terminal.table("data", tables.data_rows(facts) + tables.caption_rows(facts["images"], counted)))
    if html is not None:
        from finetune.report.data_page import write_page

        _write(lambda: write_page(audit, facts, source or found.data.path or str(recipe), html), html)
        click.echo(f"written {html}", err=as_json)
    audit.raise_if_stopped()


def _recipe(source: str | None, recipe: str | None, overrides: tuple[str, ...]) -> Recipe:
    given = ([f"data.path={source}"] if source else []) + list(overrides)
    return load_recipe(recipe, given) if recipe else parse_recipe(PLAIN, "ft data check", "data", given)


def _tokens(found: Recipe, audit: Any, facts: dict[str, Any], named: bool) -> str:
    """Add the tokens of what is shown to `facts`, and how many captions are cut; returns what to say of tokens."""
    if not named:
        return "with --recipe RECIPE they are shown as its model's tokens, and those that it would cut are counted"
    from finetune.cli.process import quiet_libraries

    quiet_libraries()
    from finetune.models.pretrained.loading import open_reader
    from finetune.models.pretrained.tokenizer import spelled

    reader = open_reader(found, (image.caption for image in audit.training))
    if reader is None:
        return "this model reads no captions"
    for shown in facts["images"]:
        shown["tokens"] = spelled(reader.tokenizer, shown["caption"])
    counts = (reader.count(image.caption) for image in audit.images)
    long, (_, most) = sum(tokens > read for tokens, read in counts), reader.count("")
    facts["cut_captions"] = long
    return f"{long} longer than the {most} tokens that this model reads"


def _write(write: Any, path: Path) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(
            f"the page cannot be written: {error.strerror}", where=str(path), remedy="give another place to --html"
        ) from error
