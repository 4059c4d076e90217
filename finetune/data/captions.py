"""Captions of a folder: `metadata.jsonl`, `metadata.csv`, or a `.txt` file beside each picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

from finetune.errors import UserError

Lookup = Callable[[Path], tuple[str | None, str]]


def folder_captions(folder: Path, column: str) -> Lookup:
    """A function from a picture's path to (its caption or None, what is wrong with it or "").

    Raises:
        UserError: a metadata file that cannot be read, naming its line.
    """
    tables = [path for path in (folder / "metadata.jsonl", folder / "metadata.csv") if path.is_file()]
    if len(tables) > 1:
        raise UserError("two metadata files stand side by side: which is meant?", where=str(folder), remedy="keep metadata.jsonl or metadata.csv")
    if not tables:
        return _beside
    captions = _table(tables[0], column)
    return lambda picture: (captions.get(picture.relative_to(folder).as_posix()), "")


def _beside(picture: Path) -> tuple[str | None, str]:
    file = picture.with_suffix(".txt")
    if not file.is_file():
        return None, ""
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split()) or None, ""
    except UnicodeDecodeError as error:
        return None, f"{file.name} is not UTF-8 (byte {error.start})"
    except OSError as error:
        return None, f"{file.name}: {error.strerror}"


def _table(file: Path, column: str) -> dict[str, str]:
    """file name → caption. Empty captions are left out: they are missing."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name} is not UTF-8 text (byte {error.start})", where=str(file), remedy="save it as UTF-8") from error
    rows: list[tuple[int, dict[str, object]]] = []
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError("this line is not JSON", where=f"{file}:{number}", remedy='one object a line: {"file_name": "a.png", "text": "…"}') from error
            rows.append((number, row if isinstance(row, dict) else {}))
    else:
        reader = csv.DictReader(io.StringIO(text))
        rows = [(reader.line_num, dict(row)) for row in reader]
    captions: dict[str, str] = {}
    for number, row in rows:
        missing = [key for key in ("file_name", column) if key not in row]
        if missing:
            raise UserError(
                f'there is no "{missing[0]}" in this line', where=f"{file}:{number}", remedy="name the caption's column with data.caption_column"
            )
        name, caption = str(row["file_name"]), row[column]
        if isinstance(caption, str) and caption.split():
            captions[name] = " ".join(caption.split())
    return captions
