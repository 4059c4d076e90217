"""Captions of folders: `metadata.jsonl`, `metadata.csv`, or a `.txt` file next to each image."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import posixpath
import re
from array import array
from bisect import bisect_left
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from finetune.data.sources.files import place_of
from finetune.data.sources.table import Rows
from finetune.errors import UserError

TABLES = ("metadata.jsonl", "metadata.csv")


def with_trigger(caption: str, trigger: str) -> str:
    """The caption, with the trigger word before it if it does not contain it as a word of its own."""
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger} {caption}".strip()


def without_trigger(caption: str, trigger: str) -> str:
    """The caption without the trigger word; of one like `sks dog`, the kind of thing stays."""
    _, _, kind = trigger.partition(" ")
    kept = kind if kind and " " not in kind else ""
    left = re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)[,.;:]?", kept, caption, flags=re.IGNORECASE)
    return " ".join(left.split())


@dataclass(frozen=True)
class Caption:
    """The caption of one image.

    Attributes:
        text: None if the image has no caption, "" if the caption is empty.
        problem: why an existing caption cannot be read, else "".
        mask: the mask file that a metadata file gives for the image, else "".
    """

    text: str | None
    problem: str = ""
    mask: str = ""


@final
class Captions:
    """The captions of the images in one folder, with a record of which ones were used.

    A metadata file covers the images in its folder and all subfolders, except those with a metadata file of their own.
    `.txt` files are not read for images that a metadata file covers.

    Args:
        folder: the folder of the images.
        names: the names of its files, sorted.
        column: the caption column of metadata files.
        above: the captions of the parent folder; None at the top of a source.
        mask_column: the column of metadata files with the mask's file name; None if masks are not used.

    Raises:
        UserError: a metadata file cannot be read; the error names the line.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        column: str,
        above: Captions | None = None,
        mask_column: str | None = None,
    ) -> None:
        self._folder, self._names, self._above = folder, names, above
        # For each file, whether it is an image whose caption was requested, or a text file that was used.
        self._used = bytearray(len(names))
        tables = [folder / name for name in TABLES if place_of(names, name) is not None]
        if len(tables) > 1:
            raise UserError(
                "the folder has two metadata files",
                where=str(folder),
                remedy=f"keep one of {' and '.join(TABLES)}",
            )
        if place_of(names, "metadata.parquet") is not None:
            where, remedy = str(folder / "metadata.parquet"), "save it as metadata.jsonl or metadata.csv"
            raise UserError("captions in metadata.parquet are not supported", where=where, remedy=remedy)
        self._table = MetadataFile(tables[0], column, mask_column) if tables else None

    def of(self, name: str) -> Caption:
        """The caption of an image in this folder."""
        image = self._folder / name
        self._mark(place_of(self._names, name))
        caption: Caption | None = None
        level: Captions | None = self
        while level is not None:
            if level._table is not None:
                row = level._table.of(image.relative_to(level._folder).as_posix())
                if row is not None and row.mask:
                    row = replace(row, mask=str(level._folder / row.mask))
                caption = caption or row or Caption(None)  # the nearest metadata file wins
            level = level._above
        if caption is not None:
            return caption
        file = image.with_suffix(".txt")
        if (place := place_of(self._names, file.name)) is None:
            return Caption(None)
        self._mark(place)
        try:
            # Not `read_text`, which silently drops a truncated byte order mark.
            return Caption(one_line(file.read_bytes().decode("utf-8-sig")))
        except UnicodeDecodeError as error:
            return Caption(None, f"{file.name} is not UTF-8 (byte {error.start})")
        except OSError as error:
            return Caption(None, f"{file.name} cannot be read: {error.strerror}")

    def is_mask(self, file: Path) -> bool:
        """Whether a metadata file lists this file as a mask, so that it is not a training image."""
        level: Captions | None = self
        while level is not None:
            if level._table is not None and level._table.names_mask(file.relative_to(level._folder).as_posix()):
                return True
            level = level._above
        return False

    def unused(self) -> Iterator[tuple[str, str, bool]]:
        """(file or line, what is wrong, whether a listed image is missing) of each caption that no image used.

        Call it after `of` was called for every image of the folder and its subfolders.
        """
        for line, name in self._table.unused() if self._table is not None else ():
            outside = name.startswith(("../", "/")) or name == ".."
            detail = "is outside the folder, so it is not read" if outside else "the image does not exist"
            yield f'{line} ("{name}")', detail, True
        for place, name in enumerate(self._names):
            if name.lower().endswith(".txt") and not self._used[place]:
                covered = "not read: a metadata file covers its image"
                yield str(self._folder / name), covered if self._has_image(name) else "no image has this name", False

    def _has_image(self, text: str) -> bool:
        """Whether an image has the name of the text file `text`, apart from the suffix."""
        stem = Path(text).stem
        place = bisect_left(self._names, f"{stem}.")
        while place < len(self._names) and self._names[place].startswith(f"{stem}."):
            if self._used[place] and Path(self._names[place]).stem == stem:
                return True
            place += 1
        return False

    def _mark(self, place: int | None) -> None:
        if place is not None:
            self._used[place] = 1


def one_line(text: str) -> str:
    """Replace line breaks and runs of whitespace with single spaces."""
    return " ".join(text.split())


@final
class MetadataFile:
    """A metadata file: captions by image name. Each line takes about 20 bytes of memory.

    Raises:
        UserError: the file cannot be read, a line is malformed, or two lines name the same image.
    """

    def __init__(self, file: Path, column: str, mask_column: str | None) -> None:
        import numpy

        self._file, self._rows = file, Rows()  # name, line, caption or None, what is wrong with it, mask
        hashes, mask_hashes = array("Q"), array("Q")
        for number, row in _json_rows(file) if file.suffix == ".jsonl" else _csv_rows(file):
            for key in ("file_name", column):
                if key not in row:
                    keys = ", ".join(map(str, row)) or "none"
                    remedy = "set data.caption_column to the caption's column"
                    if key == "file_name":
                        remedy = 'give each image\'s file name in a column "file_name"'
                    problem = f'this line has no "{key}" (its columns: {keys})'
                    raise UserError(problem, where=f"{file}:{number}", remedy=remedy)
            name, caption = posixpath.normpath(str(row["file_name"])), row[column]
            problem = ""
            if caption is not None and not isinstance(caption, str):
                problem = f"the caption at {file}:{number} is not text"
            mask = row.get(mask_column or "") or ""
            if not isinstance(mask, str):
                mask, problem = "", f"the mask at {file}:{number} is not a file name"
            if mask:
                mask = posixpath.normpath(mask)
                mask_hashes.append(_hash(mask))
            self._rows.append([name, number, one_line(caption) if isinstance(caption, str) else None, problem, mask])
            hashes.append(_hash(name))
        unsorted = numpy.frombuffer(hashes, numpy.uint64)
        self._order = numpy.argsort(unsorted, kind="stable").astype(numpy.uint32)
        self._hashes = unsorted[self._order]
        self._masks = numpy.sort(numpy.frombuffer(mask_hashes, numpy.uint64))
        self._used = bytearray(len(hashes))
        self._refuse_repeated_names()

    def of(self, name: str) -> Caption | None:
        """The caption of the image with this name; None if no line has it."""
        import numpy

        wanted = _hash(name)
        # As uint64: given a Python int, NumPy would convert all hashes to floats.
        start = int(numpy.searchsorted(self._hashes, numpy.uint64(wanted)))
        while start < len(self._hashes) and int(self._hashes[start]) == wanted:
            place = int(self._order[start])
            candidate, _, caption, problem, mask = self._rows[place]
            if candidate == name:  # two names can share a hash
                self._used[place] = 1
                return Caption(caption, problem, mask)
            start += 1
        return None

    def names_mask(self, name: str) -> bool:
        """Whether a line lists this file as a mask, by the hash of its name."""
        import numpy

        wanted = numpy.uint64(_hash(name))
        place = int(numpy.searchsorted(self._masks, wanted))
        return place < len(self._masks) and bool(self._masks[place] == wanted)

    def unused(self) -> Iterator[tuple[str, str]]:
        """(file:line, image name) of each line that no image used."""
        for place, used in enumerate(self._used):
            if not used:
                name, line, *_ = self._rows[place]
                yield f"{self._file}:{line}", name

    def _refuse_repeated_names(self) -> None:
        import numpy

        equal = numpy.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        lines: dict[str, int] = {}
        for place in numpy.unique(self._order[numpy.concatenate([equal, equal + 1])]).tolist():
            name, line, *_ = self._rows[place]
            if name in lines:
                problem = f'"{name}" is listed twice: here and at {self._file}:{lines[name]}'
                raise UserError(problem, where=f"{self._file}:{line}", remedy="keep one of the two lines")
            lines[name] = line


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a text file, with their line endings."""
    start = 0
    try:
        with open(file, "rb") as opened:
            for content in opened:
                mark = len(BOM_UTF8) if not start and content.startswith(BOM_UTF8) else 0
                try:
                    line = content[mark:].decode()
                except UnicodeDecodeError as error:
                    problem = f"{file.name} is not UTF-8 text (byte {start + mark + error.start})"
                    raise UserError(problem, where=str(file), remedy="save it as UTF-8") from error
                yield line
                start += len(content)
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be read: {error.strerror}", where=str(file), remedy="check its permissions"
        ) from error


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(
                "this line is not a JSON object",
                where=f"{file}:{number}",
                remedy='write one object per line: {"file_name": "a.png", "text": "…"}',
            )
        yield number, row


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    # StringIO also splits at \r alone, which ends the lines of some files.
    lines = itertools.chain.from_iterable(io.StringIO(line, newline="") for line in _lines(file))
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise UserError(
            f"not a valid CSV file: {error}",
            where=f"{file}:{reader.reader.line_num}",
            remedy="check the quotes in this line",
        ) from error
