"""Class images for DreamBooth's prior preservation (Ruiz et al. 2023, arXiv:2208.12242, §3.2).

The base model generates images of the subject's class. The run trains on them together with the subject's images, so
that the class does not change. They are kept in the project's cache, with a key of everything they depend on, and are a
source like any other, with a caption and a weight. Only `generate` needs torch.
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

POLL_SECONDS = 2.0  # how often the other processes check whether the main process has finished


def folder_of(recipe: Recipe, prior: Prior) -> Path:
    """The folder of a recipe's class images."""
    model, sample = recipe.model, recipe.sample
    parts = (
        # The family's former name, if it has one, so that images cached under it are found.
        next(iter(spec_of(model.family).aliases), model.family),
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
    """Numbers of the class images that have not been generated yet."""
    if recipe.prior is None:
        return []
    folder = folder_of(recipe, recipe.prior)
    return [number for number in range(recipe.prior.images) if not _file(folder, number).is_file()]


def with_class(recipe: Recipe) -> Data:
    """The recipe's data with the class images as an additional source, once all of them exist."""
    data, prior = recipe.data, recipe.prior
    if prior is None or missing(recipe):
        return data
    given = data.sources or (Source(data.path or ""),)
    generated = Source(str(folder_of(recipe, prior)), weight=prior.weight, limit=prior.images, generated=True)
    return dataclasses.replace(data, path=None, sources=(*given, generated))


def generate(recipe: Recipe, main: bool) -> None:
    """Generate the missing class images, each from its own seed; other processes wait for the main one.

    Raises:
        UserError: the cache cannot be written.
    """
    prior = recipe.prior
    if prior is None or not missing(recipe):
        return
    if not main:
        while missing(recipe):
            time.sleep(POLL_SECONDS)
        return
    folder = folder_of(recipe, prior)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _generate(recipe, prior, folder)
    except OSError as error:
        raise UserError(
            f"the class images cannot be written: {error.strerror}",
            where=str(folder),
            remedy="move the cache with --set data.cache=FOLDER or the environment variable FT_CACHE",
        ) from error


def _generate(recipe: Recipe, prior: Prior, folder: Path) -> None:
    from finetune.inference.sample import generate_with_base

    wanted = missing(recipe)
    progress = Progress("class images")
    progress.show(0, len(wanted), prior.prompt)
    seeds = [mix(recipe.sample.seed, "class", number) for number in wanted]
    images = generate_with_base(recipe, prior.prompt, seeds)
    for done, (number, image) in enumerate(zip(wanted, images, strict=True), 1):
        progress.show(done, len(wanted), prior.prompt)
        (folder / f"{number:05d}.txt").write_text(prior.prompt, encoding="utf-8")
        temporary = folder / f".{number:05d}.png"
        image.save(temporary)
        temporary.replace(_file(folder, number))
    progress.end()


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"
