"""DreamBooth's prior preservation (Ruiz et al. 2023, arXiv:2208.12242, §3.2): images of the class, drawn by the base itself, train beside
the subject's, so that the class stays what it was. Torch-free but for `draw`.

The images lie in the project's cache, under a key of all that they depend on, and are a source like any other: with a caption,
a weight and their place in the arithmetic.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from finetune.config.schema import Data, Prior, Recipe, Source
from finetune.data.cache_dir import cache_folder
from finetune.errors import UserError
from finetune.models.registry import spec_of
from finetune.rng import key_of, mix
from finetune.terminal import Progress

SECONDS_BETWEEN_LOOKS = 2.0  # of processes that wait for the one that draws


def folder_of(recipe: Recipe, prior: Prior) -> Path:
    """Where the class images of a recipe lie."""
    model, sample = recipe.model, recipe.sample
    parts = (
        next(
            iter(spec_of(model.family).aliases), model.family
        ),  # the name under which images were cached before it changed
        model.path or "",
        model.transformer or "",
        model.vae or "",
        model.prediction or "",
        prior.prompt,
    )
    return (
        cache_folder(recipe.data.cache)
        / "class"
        / key_of(*parts, recipe.data.resolution, sample.steps, str(sample.guidance), sample.seed)[:24]
    )


def missing(recipe: Recipe) -> list[int]:
    """Numbers of the class images that are yet to be drawn."""
    if recipe.prior is None:
        return []
    folder = folder_of(recipe, recipe.prior)
    return [number for number in range(recipe.prior.images) if not _file(folder, number).is_file()]


def with_class(recipe: Recipe) -> Data:
    """The recipe's data with the class images among the sources, once they are all there."""
    data, prior = recipe.data, recipe.prior
    if prior is None or missing(recipe):
        return data
    given = data.sources or (Source(data.path or ""),)
    drawn = Source(str(folder_of(recipe, prior)), weight=prior.weight, limit=prior.images, generated=True)
    return dataclasses.replace(data, path=None, sources=(*given, drawn))


def draw(recipe: Recipe, main: bool) -> None:
    """Draw what is missing, each image from a seed of its own; other processes wait until the main one has.

    Raises:
        UserError: the cache cannot be written.
    """
    prior = recipe.prior
    if prior is None or not missing(recipe):
        return
    if not main:
        while missing(recipe):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return
    folder = folder_of(recipe, prior)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _draw(recipe, prior, folder)
    except OSError as error:
        raise UserError(
            f"the class images cannot be written: {error.strerror}",
            where=str(folder),
            remedy="keep the cache elsewhere: data.cache, or FT_CACHE",
        ) from error


def _draw(recipe: Recipe, prior: Prior, folder: Path) -> None:
    from finetune.inference.sample import drawn_by_base

    wanted = missing(recipe)
    drawing = Progress("class images")
    drawing.show(0, len(wanted), prior.prompt)
    seeds = [mix(recipe.sample.seed, "class", number) for number in wanted]
    for done, (number, image) in enumerate(zip(wanted, drawn_by_base(recipe, prior.prompt, seeds), strict=True), 1):
        drawing.show(done, len(wanted), prior.prompt)
        (folder / f"{number:05d}.txt").write_text(prior.prompt, encoding="utf-8")
        aside = folder / f".{number:05d}.png"
        image.save(aside)
        aside.replace(_file(folder, number))
    drawing.end()


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"
