"""Captions of a folder: `metadata.jsonl`, `metadata.csv`, or a `.txt` file beside each picture."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError

TABLES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Caption:
    """`text` is None where there is none, "" where it is empty. `problem` says why one that is there cannot be read, else ""."""

    text: str | None
    problem: str = ""


class Captions:
    """The captions of one folder, and which of them no picture asked for.

    A metadata file speaks for the pictures in its folder and below, unless a nearer one does; no `.txt` is read there.

    Args:
        folder: of the source.
        files: all files below it.
        column: of metadata files, the one with the caption.

    Raises:
        UserError: a metadata file that cannot be read, naming its line.
    """

    def __init__(self, folder: Path, files: Sequence[Path], column: str) -> None:
        self._folder = folder
        self._tables: dict[Path, dict[str, tuple[str, Caption]]] = {}  # folder → file name → (place in the file, caption)
        for file in files:
            if file.name in TABLES and file.parent in self._tables:
                raise UserError(
                    "two metadata files stand side by side: which is meant?", where=str(file.parent), remedy=f"keep one of {' and '.join(TABLES)}"
                )
            if file.name == "metadata.parquet":
                raise UserError("captions are not read from metadata.parquet", where=str(file), remedy="save it as metadata.jsonl or metadata.csv")
            if file.name in TABLES:
                self._tables[file.parent] = _table(file, column)
        self._texts = {file for file in files if file.suffix.lower() == ".txt"}
        self._asked: set[Path] = set()

    def of(self, picture: Path) -> Caption:
        """The caption of a picture of this folder."""
        self._asked.add(picture)
        table = self._governing(picture)
        if table is not None:
            return self._tables[table].get(picture.relative_to(table).as_posix(), ("", Caption(None)))[1]
        file = picture.with_suffix(".txt")
        if file not in self._texts:
            return Caption(None)
        self._asked.add(file)
        try:
            return Caption(one_line(file.read_bytes().decode("utf-8-sig")))  # read_text takes half a byte order mark for nothing
        except UnicodeDecodeError as error:
            return Caption(None, f"{file.name} is not UTF-8 (byte {error.start})")
        except OSError as error:
            return Caption(None, f"{file.name} cannot be read: {error.strerror}")

    def unused(self) -> Iterator[tuple[str, str, bool]]:
        """(place, what is wrong, whether a picture that is named is not there), once every picture has asked."""
        for folder, table in self._tables.items():
            for name, (place, _) in table.items():
                if folder / name in self._asked:
                    continue
                outside = name.startswith(("../", "/")) or name == ".."
                yield (
                    f'{place} ("{name}")',
                    "names a file outside its folder, which is not read" if outside else "names a picture that is not there",
                    True,
                )
        pictures = {file.with_suffix("") for file in self._asked}
        for file in sorted(self._texts - self._asked):
            yield (
                str(file),
                "not read: a metadata file speaks for its picture" if file.with_suffix("") in pictures else "no picture has its name",
                False,
            )

    def _governing(self, picture: Path) -> Path | None:
        """The nearest folder above `picture` with a metadata file."""
        for parent in picture.parents:
            if parent in self._tables:
                return parent
            if parent == self._folder:
                break
        return None


def one_line(text: str) -> str:
    """Line breaks and runs of blanks become one blank."""
    return " ".join(text.split())


def _table(file: Path, column: str) -> dict[str, tuple[str, Caption]]:
    """file name → (place, caption)."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name} is not UTF-8 text (byte {error.start})", where=str(file), remedy="save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file.name} cannot be read: {error.strerror}", where=str(file), remedy="check its permissions") from error
    captions: dict[str, tuple[str, Caption]] = {}
    for number, row in _json_rows(text, file) if file.suffix == ".jsonl" else _csv_rows(text, file):
        place = f"{file}:{number}"
        for key in ("file_name", column):
            if key not in row:
                there = ", ".join(map(str, row)) or "nothing"
                raise UserError(
                    f'there is no "{key}" in this line, but {there}', where=place, remedy="name the caption's column with data.caption_column"
                )
        name, caption = posixpath.normpath(str(row["file_name"])), row[column]
        if name in captions:
            raise UserError(f'"{name}" is named twice: here and at {captions[name][0]}', where=place, remedy="keep one of the two lines")
        wrong = "" if caption is None or isinstance(caption, str) else f"the caption at {place} is not text"
        captions[name] = (place, Caption(one_line(caption) if isinstance(caption, str) else None, wrong))
    return captions


def _json_rows(text: str, file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(
                "this line is not a JSON object", where=f"{file}:{number}", remedy='one object a line: {"file_name": "a.png", "text": "…"}'
            )
        yield number, row


def _csv_rows(text: str, file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise UserError(
            f"not a table of comma-separated values: {error}", where=f"{file}:{reader.reader.line_num}", remedy="check the quotes of this line"
        ) from error
