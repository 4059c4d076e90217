"""Folders of images as sources: files sorted by path, with the names of one folder in memory at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator
from dataclasses import replace
from heapq import merge
from pathlib import Path
from typing import final

from finetune.config.schema import Data
from finetune.data.media.video import FRAMES, read_frames
from finetune.data.shape import Medium
from finetune.data.sources.captions import TABLES, Caption, Captions, MetadataFile
from finetune.data.sources.entry import Entry, Problem
from finetune.data.sources.files import is_inside, read_bytes
from finetune.data.sources.masks import BESIDE, Masks
from finetune.data.sources.partners import Partners
from finetune.errors import UserError

READ_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
# Image formats that cannot be read; such files are reported as unreadable instead of being silently skipped.
OTHER_SUFFIXES = {".heic", ".heif", ".jxl", ".jfif", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw"}


def folder_entries(
    folder: Path, data: Data, roles: Collection[str] = (), medium: Medium = "image"
) -> Iterator[Entry | Problem]:
    """Every image (or clip) in a folder and below.

    Args:
        roles: of partners that the family reads.

    Raises:
        UserError: there is no image, or a metadata file cannot be read.
    """
    source = _Folder(folder, data, roles, medium)
    yield from source.below(folder, None)
    yield from source.unused()
    if not source.found:
        raise UserError(
            f"the folder {folder} contains no images",
            where="data.path",
            remedy="add images (" + " ".join(sorted(READ_SUFFIXES)) + "), or correct data.path",
        )


@final
class _Folder:
    """Walks one source folder.

    Attributes:
        found: whether any image was seen, readable or not.
    """

    def __init__(self, top: Path, data: Data, roles: Collection[str], medium: Medium) -> None:
        self._top, self._data, self._masks, self._video = top, data, Masks(data.masks, top), medium == "video"
        self._partners = Partners(roles, top, READ_SUFFIXES)
        self._strict = data.unreadable_images == "stop"
        self._mask_column = data.mask_column if data.masks == BESIDE else None
        self._edited = (
            MetadataFile(Path(data.captions).expanduser(), data.caption_column, None) if data.captions else None
        )
        self.found = False
        self.partners: list[tuple[Path, str]] = []

    def below(self, folder: Path, above: Captions | None) -> Iterator[Entry | Problem]:
        """Yield the entries of `folder` and its subfolders; `above` holds the captions of the parent folder."""
        try:
            files, folders, refused = _listed(folder, self._top)
        except OSError as error:
            files, folders, refused = [], [], [(folder, f"the folder cannot be read: {error.strerror}")]
        for path, detail in refused:
            self.found = True
            yield Problem(printable(path), "unreadable image", detail, self._strict)
        by_folder = self._data.classes == "folders"
        names, subfolders = [] if by_folder else files, set(folders)
        captions = Captions(folder, names, self._data.caption_column, above, self._mask_column)
        for name in merge(files, folders):
            if name in subfolders and not (self._video and name.endswith(FRAMES)):
                yield from self.below(folder / name, captions)
            elif (entry := self._entry(folder / name, files, captions)) is not None:
                yield entry
        for name, detail, missing in captions.unused():
            yield Problem(name, "missing image" if missing else "unused caption", detail, missing and self._strict)

    def _entry(self, file: Path, beside: list[str], captions: Captions) -> Entry | Problem | None:
        by_folder = self._data.classes == "folders"
        if file.suffix == ".tar" and not by_folder:
            return Problem(printable(file), "unused shard", "in a folder of images: list it in data.sources", False)
        if (
            file.suffix.lower() not in READ_SUFFIXES | OTHER_SUFFIXES | ({FRAMES} if self._video else set())
            or self._masks.has(file)
            or captions.is_mask(file)
        ):
            return None
        if (role := self._partners.role(file)) is not None:
            self.partners.append((file, role))
            return None
        self.found = True
        read = functools.partial(read_frames if file.suffix == FRAMES else read_bytes, str(file))
        if by_folder:
            if file.parent == self._top:
                return Problem(printable(file), "missing class", "not in a class folder", True)
            return Entry(printable(file), printable(Path(file.parent.name)), read, str(file))
        caption = self._caption(file, captions)
        if caption.problem:
            return Problem(printable(file), "unreadable caption", caption.problem, True)
        if caption.mask and not is_inside(Path(caption.mask), self._top):
            return Problem(
                printable(file),
                "unreadable mask",
                "the mask is a file outside the folder, which is not read",
                self._strict,
            )
        mask = functools.partial(read_bytes, caption.mask) if caption.mask else self._masks.of(file, beside)
        others = self._partners.of(file, beside) | ({"mask": mask} if mask is not None else {})
        own_file = "" if file.suffix == FRAMES else str(file)
        return Entry(printable(file), caption.text, read, own_file, others=others)

    def _caption(self, file: Path, captions: Captions) -> Caption:
        """The caption of the folder, or of `data.captions` where that names the image."""
        own = captions.of(file.name)
        edited = self._edited.of(file.relative_to(self._top).as_posix()) if self._edited is not None else None
        return own if edited is None else replace(edited, mask=own.mask)

    def unused(self) -> Iterator[Problem]:
        """Yield a problem for each line of `data.captions` without an image and each partner without a target."""
        for line, name in self._edited.unused() if self._edited is not None else ():
            yield Problem(f'{line} ("{name}")', "unused caption", "names an image that is not there", False)
        for file, role in self.partners:
            if self._partners.unused(file):
                yield Problem(printable(file), "unused partner", f"{role}: no target has this name", False)


def _listed(folder: Path, top: Path) -> tuple[list[str], list[str], list[tuple[Path, str]]]:
    """(files, subfolders, refused paths with the reason) of one folder, each sorted, without hidden ones.

    Links that leave `top` and links to folders are refused.

    Raises:
        OSError: the folder cannot be read.
    """
    files: list[str] = []
    folders: list[str] = []
    refused: list[tuple[Path, str]] = []
    with os.scandir(folder) as listed:
        for item in listed:
            if item.name.startswith("."):
                continue
            path, linked = folder / item.name, item.is_symlink()
            if linked and not is_inside(path, top):
                reason = "links out of the folder are not followed; copy the file, or list its folder in data.sources"
                refused.append((path, reason))
            elif item.is_dir(follow_symlinks=False):
                folders.append(item.name)
            elif path.is_file() if linked else item.is_file():  # `DirEntry.is_file` raises on circular links
                files.append(item.name)
            elif linked and path.is_dir():
                refused.append((path, "links to folders are not followed; list the folder in data.sources"))
            else:
                refused.append((path, "neither a file nor a folder"))
    relevant = READ_SUFFIXES | OTHER_SUFFIXES | {".txt"}
    refused = [
        (path, reason)
        for path, reason in refused
        if path.suffix.lower() in relevant or path.name in TABLES or path.is_dir()
    ]
    return sorted(files), sorted(folders), sorted(refused)


def printable(path: Path) -> str:
    """A path as valid Unicode text, even if its bytes are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")
