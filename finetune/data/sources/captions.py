"""Captions of folders: `metadata.jsonl`, `metadata.csv`, or a `.txt` file beside each image."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import posixpath
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


@dataclass(frozen=True)
class Caption:
    """`text` is None where there is none, "" where it is empty. `problem` says why one that is there cannot be read, else "".

    `mask` is the file that a metadata file names for the image's mask, else "".
    """

    text: str | None
    problem: str = ""
    mask: str = ""


@final
class Captions:
    """The captions of the images in one folder, and which of them no image asked for.

    A metadata file speaks for the images in its folder and below, unless a nearer one does; no `.txt` is read there.

    Args:
        folder: they lie in.
        names: of its files, sorted.
        column: of metadata files, the one with the caption.
        above: the captions of the folder that this one lies in; none at the top of a source.
        mask_column: of metadata files, the one with the mask's file; none: masks are not asked for.

    Raises:
        UserError: a metadata file that cannot be read, naming its line.
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
        self._asked = bytearray(
            len(names)
        )  # of each file, whether it is an image that asked, or the text that it was given
        tables = [folder / name for name in TABLES if place_of(names, name) is not None]
        if len(tables) > 1:
            raise UserError(
                "two metadata files stand side by side: which is meant?",
                where=str(folder),
                remedy=f"keep one of {' and '.join(TABLES)}",
            )
        if place_of(names, "metadata.parquet") is not None:
            where, remedy = str(folder / "metadata.parquet"), "save it as metadata.jsonl or metadata.csv"
            raise UserError("captions are not read from metadata.parquet", where=where, remedy=remedy)
        self._table = _Table(tables[0], column, mask_column) if tables else None

    def of(self, name: str) -> Caption:
        """The caption of an image in this folder."""
        image = self._folder / name
        self._mark(place_of(self._names, name))
        told: Caption | None = None
        level: Captions | None = self
        while level is not None:
            if level._table is not None:
                found = level._table.of(image.relative_to(level._folder).as_posix())
                if found is not None and found.mask:
                    found = replace(found, mask=str(level._folder / found.mask))
                told = told or found or Caption(None)  # the nearest speaks
            level = level._above
        if told is not None:
            return told
        file = image.with_suffix(".txt")
        if (place := place_of(self._names, file.name)) is None:
            return Caption(None)
        self._mark(place)
        try:
            return Caption(
                one_line(file.read_bytes().decode("utf-8-sig"))
            )  # read_text takes half a byte order mark for nothing
        except UnicodeDecodeError as error:
            return Caption(None, f"{file.name} is not UTF-8 (byte {error.start})")
        except OSError as error:
            return Caption(None, f"{file.name} cannot be read: {error.strerror}")

    def name_as_mask(self, file: Path) -> bool:
        """Whether a metadata file says that this one is a mask, and so no image."""
        level: Captions | None = self
        while level is not None:
            if level._table is not None and level._table.names_mask(file.relative_to(level._folder).as_posix()):
                return True
            level = level._above
        return False

    def unused(self) -> Iterator[tuple[str, str, bool]]:
        """(place, what is wrong, whether an image that is named is not there), once every image has asked, also below."""
        for line, name in self._table.unasked() if self._table is not None else ():
            outside = name.startswith(("../", "/")) or name == ".."
            told = (
                "names a file outside its folder, which is not read" if outside else "names an image that is not there"
            )
            yield f'{line} ("{name}")', told, True
        for place, name in enumerate(self._names):
            if name.lower().endswith(".txt") and not self._asked[place]:
                spoken_for = "not read: a metadata file speaks for its image"
                yield (
                    str(self._folder / name),
                    spoken_for if self._image_of(name) else "no image has its name",
                    False,
                )

    def _image_of(self, text: str) -> bool:
        """Whether a file that asked differs from `text` in its ending alone."""
        stem = Path(text).stem
        place = bisect_left(self._names, f"{stem}.")
        while place < len(self._names) and self._names[place].startswith(f"{stem}."):
            if self._asked[place] and Path(self._names[place]).stem == stem:
                return True
            place += 1
        return False

    def _mark(self, place: int | None) -> None:
        if place is not None:
            self._asked[place] = 1


def one_line(text: str) -> str:
    """Line breaks and runs of blanks become one blank."""
    return " ".join(text.split())


@final
class _Table:
    """A metadata file: captions by the names of images. In memory, a line takes some 20 bytes.

    Raises:
        UserError: it cannot be read, a line is not as it should be, or two name the same image.
    """

    def __init__(self, file: Path, column: str, mask_column: str | None) -> None:
        import numpy

        self._file, self._rows = file, Rows()  # of name, line, caption or None, what is wrong with it, mask
        hashes, of_masks = array("Q"), array("Q")
        for number, row in _json_rows(file) if file.suffix == ".jsonl" else _csv_rows(file):
            for key in ("file_name", column):
                if key not in row:
                    there = ", ".join(map(str, row)) or "nothing"
                    problem, remedy = (
                        f'there is no "{key}" in this line, but {there}',
                        "name the caption's column with data.caption_column",
                    )
                    raise UserError(problem, where=f"{file}:{number}", remedy=remedy)
            name, caption = posixpath.normpath(str(row["file_name"])), row[column]
            wrong = "" if caption is None or isinstance(caption, str) else f"the caption at {file}:{number} is not text"
            mask = row.get(mask_column or "") or ""
            if not isinstance(mask, str):
                mask, wrong = "", f"the mask at {file}:{number} is not a file's name"
            if mask:
                mask = posixpath.normpath(mask)
                of_masks.append(_hash(mask))
            self._rows.append([name, number, one_line(caption) if isinstance(caption, str) else None, wrong, mask])
            hashes.append(_hash(name))
        unsorted = numpy.frombuffer(hashes, numpy.uint64)
        self._order = numpy.argsort(unsorted, kind="stable").astype(numpy.uint32)
        self._hashes = unsorted[self._order]
        self._masks = numpy.sort(numpy.frombuffer(of_masks, numpy.uint64))
        self._asked = bytearray(len(hashes))
        self._refuse_twice()

    def of(self, name: str) -> Caption | None:
        """The caption of the image with this name, None if no line names it."""
        import numpy

        wanted = _hash(name)
        start = int(
            numpy.searchsorted(self._hashes, numpy.uint64(wanted))
        )  # as it is: compared with a plain number, all would become floats
        while start < len(self._hashes) and int(self._hashes[start]) == wanted:
            place = int(self._order[start])
            found, _, caption, wrong, mask = self._rows[place]
            if found == name:  # and not only its hash
                self._asked[place] = 1
                return Caption(caption, wrong, mask)
            start += 1
        return None

    def names_mask(self, name: str) -> bool:
        """Whether a line names this file as a mask, by its hash."""
        import numpy

        wanted = numpy.uint64(_hash(name))
        place = int(numpy.searchsorted(self._masks, wanted))
        return place < len(self._masks) and bool(self._masks[place] == wanted)

    def unasked(self) -> Iterator[tuple[str, str]]:
        """(place in the file, name) of each line that no image has asked for."""
        for place, asked in enumerate(self._asked):
            if not asked:
                name, line, *_ = self._rows[place]
                yield f"{self._file}:{line}", name

    def _refuse_twice(self) -> None:
        import numpy

        equal = numpy.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        lines: dict[str, int] = {}
        for place in numpy.unique(self._order[numpy.concatenate([equal, equal + 1])]).tolist():
            name, line, *_ = self._rows[place]
            if name in lines:
                problem = f'"{name}" is named twice: here and at {self._file}:{lines[name]}'
                raise UserError(problem, where=f"{self._file}:{line}", remedy="keep one of the two lines")
            lines[name] = line


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text file with their ends, one at a time."""
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
                remedy='one object a line: {"file_name": "a.png", "text": "…"}',
            )
        yield number, row


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    lines = itertools.chain.from_iterable(
        io.StringIO(line, newline="") for line in _lines(file)
    )  # some end in \r alone
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise UserError(
            f"not a table of comma-separated values: {error}",
            where=f"{file}:{reader.reader.line_num}",
            remedy="check the quotes of this line",
        ) from error
