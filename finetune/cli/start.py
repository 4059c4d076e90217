"""`ft start`: from a folder of images to a recipe, in at most three questions."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import yaml

from finetune import terminal
from finetune.cli.estimate import choose_gpu
from finetune.config.loader import load_recipe, to_dict
from finetune.config.schema import Recipe
from finetune.config.training_table import FEW, Purpose
from finetune.data.sources.folder import READ_SUFFIXES
from finetune.errors import UserError
from finetune.estimate.constants import GIB
from finetune.estimate.forecast import Forecast
from finetune.estimate.recommend import Answer, Question, answer
from finetune.estimate.text import licensed
from finetune.terminal import duration, plural

KINDS: dict[str, Purpose] = {"person": "subject", "object": "subject", "style": "style", "concept": "concept"}
NO_DESCRIPTION: dict[str, Any] = {"vram": None, "tflops": None, "bandwidth": None, "price": None, "gpus": 1}
WISHES = {"quality": "best", "speed": "fastest"}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(list(KINDS)), help="What the images show.")
@click.option("--prefer", type=click.Choice(list(WISHES)), help="The best result, or the shortest run.")
@click.option("--trigger", help='Trigger word that later calls up what was trained; "" for none.')
@click.option("--gpu", "gpu_name", help="Plan for this GPU (`ft gpus` lists them).  [default: this machine]")
@click.option("--out", type=click.Path(path_type=Path), help="The recipe to write.  [default: FOLDER's name.yaml]")
@click.option("--yes", "-y", is_flag=True, help="Ask nothing; take the defaults.")
@click.option("--json", "as_json", is_flag=True, help="Ask nothing; print JSON.")
def command(
    folder: Path,
    kind: str | None,
    prefer: str | None,
    trigger: str | None,
    gpu_name: str | None,
    out: Path | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Turn a folder of images into a recipe, in three questions.

    \b
    Examples:
      ft start photos
      ft start photos --gpu rtx3060 --kind object --trigger "sks dog" --yes
    """
    images = count_images(folder)
    file = out or Path(f"{_slug(folder)}.yaml")
    if file.exists():
        raise UserError(f"{file} already exists; it was not changed", where="--out", remedy="choose another file")
    gpu = choose_gpu(gpu_name, NO_DESCRIPTION)
    asks = not (yes or as_json) and interactive()
    if not as_json:
        terminal.echo(f"{plural(images, 'image')} in {folder}; {gpu.name}, {gpu.visible_gib:.0f} GiB")
    kind = kind or _ask("What do they show?", list(KINDS), "object" if images <= FEW else "style", asks)
    prefer = prefer or _ask("Quality or speed?", list(WISHES), "quality", asks)
    if trigger is None:
        trigger = _ask("Trigger word?", None, _slug(folder).replace("-", " "), asks)
    overrides = (f"train.purpose={KINDS[kind]}",)
    found = answer(Question(images, gpu, overrides=overrides))
    chosen = found.choices[WISHES[prefer]].forecast
    text = recipe_text(chosen, folder, trigger, images)
    try:
        with open(file, "x", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror}", where="--out", remedy="choose another file"
        ) from None
    load_recipe(str(file))
    start = shlex.join(["ft", "train", str(file)])
    if as_json:
        values = {
            "images": images,
            "kind": kind,
            "prefer": prefer,
            "trigger": trigger,
            "recipe": str(file),
            "start": start,
        }
        choices = {key: _values(one.forecast) | {"reason": one.reason} for key, one in found.choices.items()}
        terminal.echo(json.dumps(values | {"choices": choices, "chosen": chosen.name}, indent=1))
        return
    terminal.echo(
        "\n".join(
            [*_choices(found, chosen), "", f"Written: {file}", "", text, f"Check: ft check {file}", f"Start: {start}"]
        )
    )


def interactive() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty()


def count_images(folder: Path) -> int:
    """The images below a folder, by their names.

    Raises:
        UserError: there is no such folder, or it holds none.
    """
    if not folder.is_dir():
        raise UserError(f'there is no folder "{folder}"', remedy="name the folder with your images")
    count = sum(
        path.suffix.lower() in READ_SUFFIXES and ".mask" not in path.name and path.is_file()
        for path in folder.rglob("*")
    )
    if not count:
        raise UserError(f"{folder} holds no image", remedy="put images there, such as .jpg, .png or .webp")
    return count


def recipe_text(one: Forecast, folder: Path, trigger: str, images: int) -> str:
    """A recipe of one line a section, with what differs from the defaults."""
    recipe = dataclasses.replace(
        one.recipe,
        name=_slug(folder),
        data=dataclasses.replace(one.recipe.data, path=str(folder), trigger=trigger, missing_captions="empty"),
    )
    edits = "; ".join(option.words for option in one.edits)
    lines = [f"# ft start: {plural(images, 'image')} on {one.gpu.name}, from {one.name}"]
    lines += [f"# to fit into memory: {edits}"] if edits else []
    for key, value in _changed(recipe, to_dict(recipe)).items():
        flow = yaml.safe_dump([value], default_flow_style=True, width=1000, sort_keys=False, allow_unicode=True)
        lines.append(f"{key}: {flow.strip()[1:-1]}")
    return "\n".join(lines) + "\n"


def _changed(recipe: Recipe, values: dict[str, Any]) -> dict[str, Any]:
    """The keys whose values are not the defaults."""
    kept: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        if field.name not in values:
            continue
        section, value = getattr(recipe, field.name), values[field.name]
        if dataclasses.is_dataclass(section) and isinstance(value, dict):
            value = {
                inner.name: value[inner.name]
                for inner in dataclasses.fields(section)
                if inner.name in value and getattr(section, inner.name) != _default(inner)
            }
            if value or field.name == "adapter":
                kept[field.name] = value
        elif section != _default(field) and field.name != "lines":
            kept[field.name] = value
    return kept


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _ask(question: str, choices: list[str] | None, default: str, asks: bool) -> str:
    if not asks:
        return default
    kind = click.Choice(choices) if choices else str
    answered: str = click.prompt(question, type=kind, default=default)
    return answered


def _choices(found: Answer, chosen: Forecast) -> list[str]:
    lines = [""]
    for key, choice in found.choices.items():
        one = choice.forecast
        price = f", ${one.usd[0]:.2f}–{one.usd[1]:.2f} rented" if one.usd else ""
        mark = "▸" if one is chosen else " "
        lines.append(f"{mark} {key:<9}{one.name}: {one.memory.peak / GIB:.1f} GiB, {duration(3600 * one.hours)}{price}")
        lines.append(f"           {choice.reason}")
    return [*lines, *([f"License: {terms}"] if (terms := licensed(chosen)) else [])]


def _values(one: Forecast) -> dict[str, Any]:
    return {"recipe": one.name, "gpu": one.gpu.id, "hours": one.hours, "usd": one.usd, "peak_bytes": one.memory.peak}


def _slug(folder: Path) -> str:
    return re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "images"
