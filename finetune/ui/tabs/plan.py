"""The tab Plan: three choices from the estimate for a folder and a device, and a recipe for one of them."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from starlette.responses import Response
from starlette.routing import Route

from finetune.config.loader import find_recipe, parse_recipe
from finetune.config.training_table import PURPOSES
from finetune.data.sources.files import write_aside
from finetune.data.sources.folder import READ_SUFFIXES
from finetune.data.sources.webdataset import images_in, shards_of
from finetune.errors import UserError
from finetune.estimate.constants import GIB
from finetune.estimate.hardware.gpus import Gpu, find, known, this_cpu
from finetune.estimate.recommend import Answer, Choice, Question, answer
from finetune.estimate.text import accuracy, host_line, licensed
from finetune.terminal import duration
from finetune.ui.site import Site, moved, page, posted, shown
from finetune.ui.tabs.data import captions_file, checked_folder
from finetune.ui.tabs.train import NAME

TITLES = {"best": "Best", "fastest": "Fastest", "cheapest": "Cheapest"}
HERE = "here"


def overview(site: Site, query: Mapping[str, str]) -> Response:
    """The form and, once it is filled in, the three choices."""
    folder = query.get("folder", "").strip()
    context: dict[str, Any] = {
        "title": "Plan",
        "form": {key: query.get(key, "") for key in ("folder", "trigger", "hours", "budget", "commercial")}
        | {"device": query.get("device") or HERE, "purpose": query.get("purpose") or "subject"},
        "devices": [
            (HERE, f"this machine: {_device(site, HERE).name}"),
            *((gpu.id, _gpu_text(gpu)) for gpu in known()),
        ],
        "purposes": PURPOSES,
        "result": _result(site, query) if folder else None,
    }
    return page(site, "plan", "plan.html.j2", **context)


def write(site: Site, form: Mapping[str, str]) -> Response:
    """Write the recipe of one choice into the folder of the runs."""
    found = _answer(site, form)
    key = form.get("choice", "")
    if key not in found.choices:
        raise UserError(f'there is no choice "{key}"', remedy="reload the page")
    folder = checked_folder(site, form.get("folder", "").strip())
    name = form.get("name", "").strip() or _suggested(folder, found.choices[key])
    if not NAME.fullmatch(name):
        raise UserError(f'"{name}" cannot be a recipe\'s name', remedy="use letters, digits, dots and dashes")
    file = site.queue.runs / f"{name}.yaml"
    if file.exists():
        raise UserError(f"{file} exists already", remedy="choose another name")
    text = recipe_text(site, form, found.choices[key], folder)
    parse_recipe(text, str(file), name)  # a recipe that would be refused is not written
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, text.encode())
    return moved("/train", recipe=str(file), name=name)


ROUTES = [Route("/plan", shown(overview)), Route("/plan/write", posted(write), methods=["POST"])]


def recipe_text(site: Site, form: Mapping[str, str], choice: Choice, folder: Path) -> str:
    """The bundled recipe of a choice for the folder, with the memory options that make it fit."""
    one = choice.forecast
    values: dict[str, Any] = yaml.safe_load(find_recipe(one.name).read_text(encoding="utf-8"))
    for option in one.edits:
        for key, value in ((option.key, option.value), *option.also):
            _set(values, key, value)
    source = form.get("folder", "").strip()
    _set(values, "data.path", source if source.startswith("embedded:") else str(folder))
    edited = captions_file(site, folder)
    if edited.is_file():
        _set(values, "data.captions", str(edited))
    if trigger := form.get("trigger", "").strip():
        _set(values, "data.trigger", trigger)
    if values["method"] != "scratch":
        values.get("sample", {}).pop("prompts", None)  # the run takes them from the captions
        _set(values, "train.purpose", form.get("purpose") or "subject")
        if not source.startswith("embedded:"):
            values["train"].pop("steps", None)  # follow from purpose and images
            values["train"].pop("epochs", None)
    about = f"# {TITLES[_key_of(form)]} choice of ft ui for {one.images} images on {one.gpu.name}: {one.name}"
    return f"{about}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)}"


def count_images(folder: Path) -> int:
    """Images in a folder and below, or in its shards, by their names."""
    inside = sum(images_in(shard, READ_SUFFIXES) for shard in shards_of(folder))
    files = (Path(name) for _, _, names in os.walk(folder) for name in names)
    return inside + sum(file.suffix.lower() in READ_SUFFIXES and not file.name.startswith(".") for file in files)


# -- parts ------------------------------------------------------------------------------------------------------------


def _key_of(form: Mapping[str, str]) -> str:
    return form.get("choice", "best")


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


def _device(site: Site, name: str) -> Gpu:
    """The GPU of that name; `here`: this machine's, or its CPU."""
    if name != HERE:
        return find(name)
    local = site.memory.get("local gpu")
    return find(local) if local else _cpu()


@functools.cache
def _cpu() -> Gpu:
    return this_cpu()


def _gpu_text(gpu: Gpu) -> str:
    price = f", ${gpu.price.low:.2f}–{gpu.price.high:.2f} an hour" if gpu.price else ""
    return f"{gpu.name}, {gpu.sold_gb:g} GB{price}"


def _answer(site: Site, form: Mapping[str, str]) -> Answer:
    folder = checked_folder(site, form.get("folder", "").strip())
    images = count_images(folder)
    if not images:
        raise UserError(f"the folder {folder} has no images", remedy="choose another folder")
    purpose = form.get("purpose") or "subject"
    if purpose not in PURPOSES:
        raise UserError(f'there is no purpose "{purpose}"', remedy="reload the page")
    return answer(
        Question(
            images,
            _device(site, form.get("device") or HERE),
            hours=_number(form, "hours"),
            budget=_number(form, "budget"),
            commercial=bool(form.get("commercial")),
            overrides=(f"train.purpose={purpose}",),
        )
    )


def _number(form: Mapping[str, str], name: str) -> float | None:
    text = form.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"\d{1,6}(\.\d{1,3})?", text) or not float(text):
        raise UserError(f'"{text}" is not a number of {"hours" if name == "hours" else "dollars"}', remedy="write 12")
    return float(text)


def _result(site: Site, query: Mapping[str, str]) -> dict[str, Any]:
    found = _answer(site, query)
    folder = checked_folder(site, query.get("folder", "").strip())
    best = found.choice.forecast
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for key, choice in found.choices.items():
        same = (choice.forecast.name, choice.forecast.gpu.id)
        if same in groups:  # one recipe may be two of the three
            groups[same]["title"] += f" and {TITLES[key].lower()}"
        else:
            groups[same] = _card(key, choice, key == found.recommended) | {"suggested": _suggested(folder, choice)}
    return {
        "choices": list(groups.values()),
        "reason": _sentence(found.reason),
        "accuracy": _sentence(accuracy(best.gpu)),
        "first": found.choice.first,
    }


def _card(key: str, choice: Choice, recommended: bool) -> dict[str, Any]:
    one = choice.forecast
    return {
        "key": key,
        "title": TITLES[key],
        "recommended": recommended,
        "recipe": one.name,
        "gpu": one.gpu.name,
        "memory": f"{one.memory.peak / GIB:.1f} of {one.limit / GIB:.1f} GiB",
        "percent": min(100, round(100 * one.memory.peak / one.limit)),
        "time": duration(3600 * one.hours) if one.gpu.timed else "unknown",
        "steps": f"{one.steps:,} steps of {one.recipe.train.batch_size * one.recipe.train.accumulation}",
        "cost": f"${one.usd[0]:.2f}–{one.usd[1]:.2f}" if one.usd else "your own machine",
        "license": licensed(one) or "bundled base, free to use",
        "host": host_line(one),
        "edits": [option.words for option in one.edits],
        "reason": _sentence(choice.reason),
    }


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _suggested(folder: Path, choice: Choice) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.stem).strip("-.") or "images"
    return f"{name}-{choice.forecast.name.rpartition('/')[2]}"[:80]
