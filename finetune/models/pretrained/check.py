"""Checks of the files that a recipe names, without loading them. Rules between keys are in `finetune.config.rules`.

Torch-free.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from finetune.adapters.lora_file import look
from finetune.config.schema import Model, Recipe
from finetune.errors import UserError
from finetune.models.registry import family_of_pipeline, spec_of
from finetune.paths import embedded

_PIPELINE = (
    "a diffusers folder, a .safetensors checkpoint, or a Hub name such as stabilityai/stable-diffusion-xl-base-1.0"
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check(recipe: Recipe) -> None:
    """Check the files of the model section. Only the form of a Hub name is checked: nothing is downloaded.

    Raises:
        UserError: the family is unknown, or a path does not exist or holds another kind of model.
    """
    spec_of(recipe.model.family)
    if recipe.model.path is not None:
        _check_pipeline(recipe.model)
    if recipe.adapter is not None and recipe.adapter.init_lora is not None:
        look(recipe.adapter.init_lora)
    if recipe.model.transformer is not None:
        _check_transformer(recipe.model.transformer)
    if recipe.model.vae is not None:
        _check_vae(recipe.model.vae)


def _check_pipeline(section: Model) -> None:
    given, wanted = section.path or "", spec_of(section.family).pipeline
    path = Path(embedded(given)).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{given} is not a .safetensors file", where="model.path", remedy=f"give {_PIPELINE}")
    elif path.is_dir():
        found = pipeline_class(path / "model_index.json", given)
        if found != wanted:
            right = family_of_pipeline(found)
            raise UserError(
                f"{given} holds a {found}, and family {section.family} needs a {wanted}",
                where="model.path",
                remedy=f"set model.family: {right.slug}" if right else "give another model.path",
            )
    else:
        _check_hub_name(given, "model.path", _PIPELINE)


def _check_transformer(given: str) -> None:
    path = Path(given).expanduser()
    if not path.is_file() or path.suffix != ".safetensors":
        problem = f'"{given}" is not a .safetensors file' if path.exists() else f'there is no file "{given}"'
        raise UserError(
            problem,
            where="model.transformer",
            remedy="give the transformer's file, and set model.path to the pipeline it belongs to",
        )


def _check_vae(given: str) -> None:
    path = Path(embedded(given)).expanduser()
    if not path.exists():
        _check_hub_name(given, "model.vae", "a VAE's folder, the run that trained it, or a Hub name")
    elif path.is_dir() and not any((folder / "config.json").is_file() for folder in (path, path / "final")):
        raise UserError(
            f"{given} holds no trained VAE",
            where="model.vae",
            remedy="give a folder with config.json, or a run that has finished",
        )


def pipeline_class(index: Path, given: str) -> str:
    """Read `_class_name` from a pipeline's `model_index.json`."""
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except FileNotFoundError:
        raise UserError(
            f"{given} is not a diffusers folder: it has no model_index.json",
            where="model.path",
            remedy=f"give {_PIPELINE}",
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{index} cannot be read: {error}", where="model.path", remedy="copy or download the model again"
        ) from error


def _check_hub_name(given: str, where: str, wanted: str) -> None:
    if not _HUB_NAME.fullmatch(given) or given.startswith("."):
        raise UserError(
            f'there is no file or folder "{given}"',
            where=where,
            remedy=f"give {wanted} (relative paths start at the working directory)",
        )
