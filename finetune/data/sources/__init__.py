"""Sources of examples: folders (never written to), WebDataset shards and Hugging Face datasets."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from finetune.config.schema import Data, Source
from finetune.data.shape import Medium
from finetune.data.sources.entry import Entry, Problem
from finetune.data.sources.files import is_inside
from finetune.data.sources.folder import OTHER_SUFFIXES, READ_SUFFIXES, folder_entries, printable
from finetune.data.sources.huggingface import is_saved, looks_like_hub_name, rows
from finetune.data.sources.masks import refuse_folder
from finetune.data.sources.webdataset import samples, shards_of
from finetune.errors import UserError
from finetune.paths import embedded


def entries(
    source: Source, data: Data, roles: Collection[str] = (), medium: Medium = "image"
) -> Iterator[Entry | Problem]:
    """Every image (or clip) of a source with its partners, in the same order each time.

    Args:
        roles: of partners that the family reads: reference, control, first_frame.

    Raises:
        UserError: there is no such source, or it holds no image.
    """
    path = Path(embedded(source.path)).expanduser()
    shards = shards_of(path)
    if shards and (path.is_file() or not (is_saved(path) or _has_images(path))):
        yield from _shards(shards, path, data, roles)
    elif path.is_file():
        problem = f'"{source.path}" is a file; a source is a folder of images, .tar shards, or a dataset'
        raise UserError(problem, where="data.path", remedy="give the folder that contains it")
    elif path.is_dir() and not is_saved(path):
        yield from folder_entries(path, data, roles, medium)
    elif path.is_dir() or looks_like_hub_name(source.path):
        if data.classes == "folders":
            raise UserError(
                "the rows of a dataset have no class folders",
                where="data.classes",
                remedy="set data.classes: captions, and data.caption_column",
            )
        refuse_folder(data.masks)
        yield from rows(path if path.is_dir() else None, source.path, data, roles)
    else:
        raise _missing(source)


def refuse_missing(data: Data) -> None:
    """Raise if a source neither exists nor looks like the name of a Hub dataset. Reads nothing."""
    for source in data.sources or (Source(data.path or ""),):
        if not Path(embedded(source.path)).expanduser().exists() and not looks_like_hub_name(source.path):
            raise _missing(source)


def _missing(source: Source) -> UserError:
    return UserError(
        f'there is no folder "{source.path}"',
        where="data.path",
        remedy="check data.path (relative paths start at the working directory)",
    )


def refuse_inside(place: Path, data: Data, key: str) -> None:
    """Raise if `place`, the value of `key`, is inside a source folder: nothing is written among the user's images."""
    for source in data.sources or (Source(data.path or ""),):
        folder = Path(embedded(source.path)).expanduser()
        if folder.is_dir() and is_inside(place.expanduser(), folder):
            remedy = f"set {key} to a folder elsewhere"
            problem = f'{key} is inside the source "{source.path}", which is never written to'
            raise UserError(problem, where=str(place), remedy=remedy)


def _has_images(folder: Path) -> bool:
    return any(Path(name).suffix.lower() in READ_SUFFIXES for _, _, names in os.walk(folder) for name in names)


def _shards(shards: list[Path], path: Path, data: Data, roles: Collection[str]) -> Iterator[Entry | Problem]:
    refuse_folder(data.masks)
    for shard in shards:
        if not is_inside(shard, path):
            yield Problem(
                printable(shard),
                "damaged shard",
                "links out of the folder are not followed",
                data.unreadable_images == "stop",
            )
        else:
            yield from samples(shard, printable(shard), data, READ_SUFFIXES | OTHER_SUFFIXES, roles)
