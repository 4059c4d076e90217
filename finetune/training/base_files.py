"""The files of the base model that training reads, and their digest, which a resume compares. Torch-free.

The base is whatever the recipe names and training does not change: the pipeline at `model.path` (denoiser, text
encoders, tokenizers, VAE, scheduler), `model.transformer`, `model.vae`, and the first stage at `model.base_run`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.config.schema import Recipe
from finetune.data.cache_dir import cache_folder
from finetune.data.sources.file_digest import sha256_of
from finetune.errors import UserError
from finetune.paths import embedded

UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}  # parts of pipelines that are not loaded
SUFFIXES = {".safetensors", ".json", ".txt", ".model"}  # weights, configurations, tokenizers


def digest(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each file of the base, such as `model.path unet/diffusion_pytorch_model.safetensors`.

    Of a model on the Hub that has not been downloaded, nothing. Digests are cached: a base is read once, at about
    1 GB/s, and then only its files' times are looked at.

    Raises:
        UserError: a file cannot be read.
    """
    cache = cache_folder(recipe.data.cache)
    found: dict[str, str] = {}
    for name, path in _files(recipe):
        try:
            found[name] = sha256_of(path, cache)
        except OSError as error:
            raise UserError(
                f"a file of the base model cannot be read: {error.strerror}",
                where=str(path),
                remedy="copy or download the model again",
            ) from error
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """The files that are not as they were, by name and in what way."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            what = "is gone" if name not in now else "is new" if name not in before else "has changed"
            found.append(f"{name} {what}")
    return found


def named(recipe: Recipe) -> dict[str, str]:
    """The recipe's keys that name the base, with their values."""
    keys = ("path", "transformer", "vae", "base_run")
    return {f"model.{key}": value for key in keys if (value := getattr(recipe.model, key)) is not None}


def _files(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    section = recipe.model
    if section.path is not None:
        replaced = {key for key in ("vae", "transformer") if getattr(section, key) is not None}
        yield from _pipeline("model.path", section.path, replaced)
    if section.transformer is not None:
        yield "model.transformer", Path(section.transformer).expanduser()
    for key in ("vae", "base_run"):
        if (given := getattr(section, key)) is not None:
            yield from _network(f"model.{key}", given)


def _pipeline(key: str, given: str, replaced: set[str]) -> Iterator[tuple[str, Path]]:
    """Files of a pipeline, without the parts in `replaced`."""
    place = _place(given, "model_index.json")
    if place is None or place.is_file():
        yield from [(key, place)] if place is not None else []
        return
    index = place / "model_index.json"
    yield f"{key} {index.name}", index
    for part, entry in _json(index).items():
        if isinstance(entry, list) and entry and entry[0] is not None and part not in UNUSED | replaced:
            for path in _of_folder(place / part):
                yield f"{key} {part}/{path.name}", path


def _network(key: str, given: str) -> Iterator[tuple[str, Path]]:
    """Files of a VAE, or of the run of a first stage."""
    place = _place(given, "config.json")
    if place is None or place.is_file():
        yield from [(key, place)] if place is not None else []
        return
    if (place / "model_index.json").is_file():
        place = place / "vae"
    for path in _of_folder(place):
        yield f"{key} {path.name}", path


def _of_folder(folder: Path) -> list[Path]:
    """What diffusers and transformers read of a folder: no variants such as `model.fp16.safetensors`."""
    return [
        path
        for path in sorted(folder.glob("*"))
        if path.suffix in SUFFIXES
        and path.is_file()
        and not (path.suffix == ".safetensors" and path.name.count(".") > 1)
    ]


def _place(given: str, entry: str) -> Path | None:
    """The file or folder that a recipe names; of a run its `final`, of a name on the Hub its snapshot in the cache."""
    path = Path(embedded(given)).expanduser()
    if path.is_dir():
        return path / "final" if (path / "final").is_dir() else path
    if path.is_file():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(given, entry)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
