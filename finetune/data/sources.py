"""Where pictures and captions come from: folders, which are read and never written, shards, and Hugging Face data sets."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from finetune.data.captions import TABLES, Captions
from finetune.data.entry import Entry, Problem
from finetune.data.files import is_inside, read_bytes
from finetune.data.hugging import is_saved, looks_like_hub_name, rows
from finetune.data.masks import Masks
from finetune.data.shards import samples, shards_of
from finetune.errors import UserError
from finetune.recipe import Data, Source, embedded

READ_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
# Pictures all the same, and named as unreadable: none may be left out in silence.
OTHER_SUFFIXES = {".heic", ".heif", ".jxl", ".jfif", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw"}


def entries(source: Source, data: Data) -> Iterator[Entry | Problem]:
    """Every picture of a source, in an order that is the same each time.

    Raises:
        UserError: there is no such source, or it holds no picture.
    """
    path = Path(embedded(source.path)).expanduser()
    shards = shards_of(path)
    if shards and (path.is_file() or not (is_saved(path) or _has_pictures(path))):
        yield from _shards(shards, path, data)
    elif path.is_file():
        problem = f'"{source.path}" is a file; a source is a folder of pictures, .tar shards, or a data set'
        raise UserError(problem, where="data.path", remedy="give the folder it lies in")
    elif path.is_dir() and not is_saved(path):
        yield from _folder(path, data)
    elif path.is_dir() or looks_like_hub_name(source.path):
        if data.classes == "folders":
            raise UserError("a data set's rows lie in no folders", where="data.classes", remedy="set data.classes: captions, and data.caption_column")
        yield from rows(path if path.is_dir() else None, source.path, data)
    else:
        raise UserError(
            f'there is no folder "{source.path}"', where="data.path", remedy="check data.path (relative paths start at the working directory)"
        )


def refuse_inside(place: Path, data: Data, key: str) -> None:
    """Nothing is written among the user's pictures: raise if `place`, which `key` names, lies in a source's folder."""
    for source in data.sources or (Source(data.path or ""),):
        folder = Path(embedded(source.path)).expanduser()
        if folder.is_dir() and is_inside(place.expanduser(), folder):
            remedy = f"set {key} to a folder elsewhere"
            raise UserError(f'{key} lies in "{source.path}", where nothing is ever written', where=str(place), remedy=remedy)


def _has_pictures(folder: Path) -> bool:
    return any(Path(name).suffix.lower() in READ_SUFFIXES for _, _, names in os.walk(folder) for name in names)


def _shards(shards: list[Path], path: Path, data: Data) -> Iterator[Entry | Problem]:
    if data.classes == "folders":
        raise UserError("the pictures of shards lie in no folders", where="data.classes", remedy="set data.classes: captions")
    for shard in shards:
        if not is_inside(shard, path):
            yield Problem(_printable(shard), "damaged shard", "a link out of the folder is not followed", data.unreadable_pictures == "stop")
        else:
            yield from samples(shard, _printable(shard), data, READ_SUFFIXES | OTHER_SUFFIXES)


def _folder(folder: Path, data: Data) -> Iterator[Entry | Problem]:
    strict = data.unreadable_pictures == "stop"
    files, refused = _walk(folder)
    yield from (Problem(_printable(path), "unreadable picture", detail, strict) for path, detail in refused)
    masks = Masks(data.masks, folder, files)
    pictures = [file for file in files if file.suffix.lower() in READ_SUFFIXES | OTHER_SUFFIXES and file not in masks]
    if not pictures and not refused:
        raise UserError(
            f"the folder {folder} holds no picture",
            where="data.path",
            remedy="put pictures there (" + " ".join(sorted(READ_SUFFIXES)) + "), or correct data.path",
        )
    if data.classes == "folders":
        for file in pictures:
            if file.parent == folder:
                yield Problem(_printable(file), "missing class", "lies in no folder of its class", True)
            else:
                yield Entry(_printable(file), _printable(Path(file.parent.name)), functools.partial(read_bytes, str(file)), str(file))
        return
    shards = [file for file in files if file.suffix == ".tar"]
    yield from (Problem(_printable(file), "unused shard", "lies among pictures: name it in data.sources", False) for file in shards)
    captions = Captions(folder, files, data.caption_column)
    for file in pictures:
        found = captions.of(file)
        if found.problem:
            yield Problem(_printable(file), "unreadable caption", found.problem, True)
        else:
            yield Entry(_printable(file), found.text, functools.partial(read_bytes, str(file)), str(file), mask=masks.of(file))
    for name, detail, missing in captions.unused():
        yield Problem(name, "missing picture" if missing else "unused caption", detail, missing and strict)


def _walk(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """(files that may be read, what may not and why), each sorted. Hidden ones are left out; nothing outside is read."""
    files: list[Path] = []
    refused: list[tuple[Path, str]] = []

    def failed(error: OSError) -> None:
        refused.append((Path(error.filename), f"the folder cannot be read: {error.strerror}"))

    for parent, folders, names in os.walk(folder, onerror=failed):
        linked = [name for name in folders if (Path(parent) / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in linked]
        for path in (Path(parent) / name for name in names + linked if not name.startswith(".")):
            if path.is_symlink() and not is_inside(path, folder):
                refused.append((path, "a link out of the folder is not followed; copy it, or name its folder in data.sources"))
            elif path.is_file():
                files.append(path)
            elif path.name in linked:
                refused.append((path, "a link to a folder is not followed; name it in data.sources"))
            else:
                refused.append((path, "neither a file nor a folder"))
    meant = READ_SUFFIXES | OTHER_SUFFIXES | {".txt"}
    return sorted(files), sorted((path, why) for path, why in refused if path.suffix.lower() in meant or path.name in TABLES or path.is_dir())


def _printable(path: Path) -> str:
    """A path as text that any terminal and file takes, also where its bytes are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")
