"""Load a recipe: find its file, read the YAML, apply overrides, validate."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune.config import nets, renamed, validation, yaml_reader
from finetune.config.schema import Recipe
from finetune.errors import UserError, did_you_mean
from finetune.paths import RECIPES


def find_recipe(path_or_name: str) -> Path:
    """Find a recipe by its file, or a bundled one by its name: `lora/emoji`, `recipes/lora/emoji.yaml`."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    name = renamed.recipe_name(path_or_name.removeprefix("recipes/").removesuffix(".yaml"))
    if (RECIPES / f"{name}.yaml").is_file():
        return RECIPES / f"{name}.yaml"
    if (file := path.with_name(f"{path.name}.yaml")).is_file():
        raise UserError(f'there is no recipe "{path_or_name}"', remedy=f'did you mean the file "{file}"?')
    similar = did_you_mean(name, bundled_recipes())
    remedy = f"{similar} (`ft recipes` lists them)" if similar.startswith("did") else "`ft recipes` lists them"
    raise UserError(f'there is no recipe "{path_or_name}"', remedy=remedy)


def bundled_recipes() -> list[str]:
    """Return the names of the recipes that come with ft, such as `lora/sdxl`."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.glob("*/*.yaml"))


def load_recipe(path_or_name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and check everything that can be checked without data and machine.

    Args:
        path_or_name: a YAML file, or the name of a bundled recipe.
        overrides: `section.key=value` each, applied in order.

    Raises:
        UserError: with file, line and key.
    """
    path = find_recipe(str(path_or_name))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError("the recipe is not UTF-8 text", where=str(path), remedy="save it as UTF-8") from error
    return parse_recipe(text, str(path), path.stem, overrides)


def parse_recipe(text: str, source: str, name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from its text; errors call it `source`."""
    root = renamed.current(yaml_reader.read(text, source))
    for assignment in overrides:
        if assignment.startswith("data.path="):  # the one folder on the command line replaces all of the recipe's
            root = yaml_reader.override(_without_bundled_prompts(root), "data.sources=[]")
        root = renamed.current(yaml_reader.override(root, assignment, Recipe, renamed.current_key))
    rest, net = _split(root)
    recipe: Recipe = yaml_reader.build(Recipe, rest)
    recipe = dataclasses.replace(
        recipe, net=net(recipe.model.family), name=recipe.name or name, lines=yaml_reader.lines(root)
    )
    validation.check(recipe, source)
    return recipe


def _without_bundled_prompts(root: yaml_reader.Node) -> yaml_reader.Node:
    """The recipe without `sample.prompts`, if it fine-tunes on bundled images: other images have other captions."""
    sections = root.content if isinstance(root.content, dict) else {}
    method, data, sample = sections.get("method"), sections.get("data"), sections.get("sample")
    path = data.content.get("path") if data is not None and isinstance(data.content, dict) else None
    bundled = path is not None and isinstance(path.content, str) and path.content.startswith("embedded:")
    if not bundled or method is None or method.content == "scratch":
        return root
    if sample is None or not isinstance(sample.content, dict):
        return root
    kept = {name: node for name, node in sample.content.items() if name != "prompts" or node.where.startswith("--set")}
    return dataclasses.replace(root, content={**sections, "sample": dataclasses.replace(sample, content=kept)})


def _split(root: yaml_reader.Node) -> tuple[yaml_reader.Node, Callable[[str], Any]]:
    """Split off the `net` section, whose keys depend on the family; returns the rest and a function that reads it."""
    children = dict(root.content) if isinstance(root.content, dict) else {}
    given = children.pop("net", None)

    def net(family: str) -> Any:
        declared = nets.section(family)
        if declared is not None:
            return yaml_reader.build(declared, given or yaml_reader.Node({}, root.where), "net")
        if given is not None:
            remedy = f"families with one: {', '.join(nets.families())}"
            raise UserError(f'family "{family}" has no `net` section', where=f"{given.where}, net", remedy=remedy)
        return None

    return dataclasses.replace(root, content=children), net


@contextlib.contextmanager
def error_location(recipe: Recipe) -> Iterator[None]:
    """Add file and line to errors that are raised inside and name a key of the recipe."""
    try:
        yield
    except UserError as error:
        line = recipe.lines.get(error.where.partition(", ")[0])
        if line is None:
            raise
        raise UserError(error.problem, where=f"{line}, {error.where}", remedy=error.remedy) from error


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return plain values, for YAML and JSON: missing keys get their defaults, missing sections stay missing."""
    sections = {"autoencoder", "diffusion", "flow", "adapter", "prior", "net"}
    return {key: value for key, value in _plain(recipe).items() if not (key in sections and value is None)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if not f.metadata.get("internal")
        }
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
