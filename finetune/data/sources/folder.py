"""Folders of images as sources: files in the order of their paths, with one folder's names in memory at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator
from heapq import merge
from pathlib import Path
from typing import final

from finetune.config.schema import Data
from finetune.data.media.video import FRAMES, read_frames
from finetune.data.shape import Medium
from finetune.data.sources.captions import TABLES, Captions
from finetune.data.sources.entry import Entry, Problem
from finetune.data.sources.files import is_inside, read_bytes
from finetune.data.sources.masks import BESIDE, Masks
from finetune.data.sources.partners import Partners
from finetune.errors import UserError

READ_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
# Images all the same, and named as unreadable: none may be left out in silence.
OTHER_SUFFIXES = {".heic", ".heif", ".jxl", ".jfif", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw"}


def folder_entries(
    folder: Path, data: Data, roles: Collection[str] = (), medium: Medium = "image"
) -> Iterator[Entry | Problem]:
    """Every image (or clip) in a folder and below.

    Args:
        roles: of partners that the family reads.

    Raises:
        UserError: there is none, or a metadata file cannot be read.
    """
    source = _Folder(folder, data, roles, medium)
    yield from source.below(folder, None)
    yield from source.unused()
    if not source.found:
        raise UserError(
            f"the folder {folder} holds no image",
            where="data.path",
            remedy="put images there (" + " ".join(sorted(READ_SUFFIXES)) + "), or correct data.path",
        )


@final
class _Folder:
    """`found`: whether there was any image, or what could have been one."""

    def __init__(self, top: Path, data: Data, roles: Collection[str], medium: Medium) -> None:
        self._top, self._data, self._masks, self._video = top, data, Masks(data.masks, top), medium == "video"
        self._partners = Partners(roles, top, READ_SUFFIXES)
        self._strict = data.unreadable_images == "stop"
        self._mask_column = data.mask_column if data.masks == BESIDE else None
        self.found = False
        self.partners: list[tuple[Path, str]] = []

    def below(self, folder: Path, above: Captions | None) -> Iterator[Entry | Problem]:
        """What `folder` and those in it give; `above` are the captions of the one that it lies in."""
        try:
            files, folders, refused = _listed(folder, self._top)
        except OSError as error:
            files, folders, refused = [], [], [(folder, f"the folder cannot be read: {error.strerror}")]
        for path, detail in refused:
            self.found = True
            yield Problem(printable(path), "unreadable image", detail, self._strict)
        by_folder = self._data.classes == "folders"
        names, lower = [] if by_folder else files, set(folders)
        captions = Captions(folder, names, self._data.caption_column, above, self._mask_column)
        for name in merge(files, folders):
            if name in lower and not (self._video and name.endswith(FRAMES)):
                yield from self.below(folder / name, captions)
            elif (found := self._entry(folder / name, files, captions)) is not None:
                yield found
        for name, detail, missing in captions.unused():
            yield Problem(name, "missing image" if missing else "unused caption", detail, missing and self._strict)

    def _entry(self, file: Path, beside: list[str], captions: Captions) -> Entry | Problem | None:
        by_folder = self._data.classes == "folders"
        if file.suffix == ".tar" and not by_folder:
            return Problem(printable(file), "unused shard", "lies among images: name it in data.sources", False)
        if (
            file.suffix.lower() not in READ_SUFFIXES | OTHER_SUFFIXES | ({FRAMES} if self._video else set())
            or self._masks.has(file)
            or captions.name_as_mask(file)
        ):
            return None
        if (role := self._partners.role(file)) is not None:
            self.partners.append((file, role))
            return None
        self.found = True
        read = functools.partial(read_frames if file.suffix == FRAMES else read_bytes, str(file))
        if by_folder:
            if file.parent == self._top:
                return Problem(printable(file), "missing class", "lies in no folder of its class", True)
            return Entry(printable(file), printable(Path(file.parent.name)), read, str(file))
        caption = captions.of(file.name)
        if caption.problem:
            return Problem(printable(file), "unreadable caption", caption.problem, True)
        if caption.mask and not is_inside(Path(caption.mask), self._top):
            return Problem(
                printable(file),
                "unreadable mask",
                "its mask is a file outside the folder, which is not read",
                self._strict,
            )
        mask = functools.partial(read_bytes, caption.mask) if caption.mask else self._masks.of(file, beside)
        others = self._partners.of(file, beside) | ({"mask": mask} if mask is not None else {})
        own_file = "" if file.suffix == FRAMES else str(file)
        return Entry(printable(file), caption.text, read, own_file, others=others)

    def unused(self) -> Iterator[Problem]:
        """Partners that no target has asked for."""
        for file, role in self.partners:
            if self._partners.unused(file):
                yield Problem(printable(file), "unused partner", f"a {role} without a target of its name", False)


def _listed(folder: Path, top: Path) -> tuple[list[str], list[str], list[tuple[Path, str]]]:
    """(files that may be read, folders, what may not be read and why) of one folder, each sorted. Hidden ones are left out.

    Nothing outside `top` is read.

    Raises:
        OSError: the folder cannot be read.
    """
    files: list[str] = []
    folders: list[str] = []
    refused: list[tuple[Path, str]] = []
    with os.scandir(folder) as listed:
        for one in listed:
            if one.name.startswith("."):
                continue
            linked = one.is_symlink()
            if linked and not is_inside(folder / one.name, top):
                refused.append(
                    (
                        folder / one.name,
                        "a link out of the folder is not followed; copy it, or name its folder in data.sources",
                    )
                )
            elif one.is_dir(follow_symlinks=False):
                folders.append(one.name)
            elif (
                (folder / one.name).is_file() if linked else one.is_file()
            ):  # a DirEntry raises where links go round in circles
                files.append(one.name)
            elif linked and (folder / one.name).is_dir():
                refused.append((folder / one.name, "a link to a folder is not followed; name it in data.sources"))
            else:
                refused.append((folder / one.name, "neither a file nor a folder"))
    meant = READ_SUFFIXES | OTHER_SUFFIXES | {".txt"}
    files.sort()
    folders.sort()
    return (
        files,
        folders,
        sorted(
            (path, why) for path, why in refused if path.suffix.lower() in meant or path.name in TABLES or path.is_dir()
        ),
    )


def printable(path: Path) -> str:
    """A path as text that any terminal and file takes, also where its bytes are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")
