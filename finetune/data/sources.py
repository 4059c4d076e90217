"""Where pictures and captions come from: folders, which are read and never written, and Hugging Face data sets."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.captions import TABLES, Captions, one_line
from finetune.data.files import read_bytes
from finetune.data.pictures import Unreadable
from finetune.errors import UserError
from finetune.recipe import Data, Source, embedded

READ_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
# Pictures all the same, and named as unreadable: none may be left out in silence.
OTHER_SUFFIXES = {".heic", ".heif", ".jxl", ".jfif", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw"}


REMEDIES = {
    "unreadable picture": "repair or remove the file, or set data.unreadable_pictures: skip",
    "missing picture": "put the file there or remove the line, or set data.unreadable_pictures: skip",
    "missing caption": "write a .txt file beside each picture or a metadata.jsonl, or set data.missing_captions: empty (or skip)",
    "missing class": "move it into the folder of its class, or set data.classes: captions",
    "unreadable caption": "save the caption as UTF-8 text",
}


@dataclass(frozen=True)
class Entry:
    """A picture not yet looked at. `read` gives its bytes, or raises OSError or Unreadable.

    `caption` is None where there is none, "" where it is empty. `file` is the file with these bytes and no others, if there is one.
    """

    name: str
    caption: str | None
    read: Callable[[], bytes]
    file: str = ""


@dataclass(frozen=True)
class Problem:
    """A picture or a caption that is not used as it is, and why. `stops`: the recipe does not allow it."""

    name: str
    kind: str  # such as "unreadable picture"; those that may stop a run stand in `REMEDIES`
    detail: str
    stops: bool


def entries(source: Source, data: Data) -> Iterator[Entry | Problem]:
    """Every picture of a source, in an order that is the same each time.

    Raises:
        UserError: there is no such source, or it holds no picture.
    """
    path = Path(embedded(source.path)).expanduser()
    if path.is_file():
        raise UserError(
            f'"{source.path}" is a file; a source is a folder of pictures or a data set', where="data.path", remedy="give the folder it lies in"
        )
    if path.is_dir() and not _is_saved_dataset(path):
        yield from _folder(path, data)
    elif path.is_dir() or _looks_like_hub_name(source.path):
        yield from _dataset(path if path.is_dir() else None, source.path, data)
    else:
        raise UserError(
            f'there is no folder "{source.path}"', where="data.path", remedy="check data.path (relative paths start at the working directory)"
        )


def refuse_inside(place: Path, data: Data, key: str) -> None:
    """Nothing is written among the user's pictures: raise if `place`, which `key` names, lies in a source's folder."""
    for source in data.sources or (Source(data.path or ""),):
        folder = Path(embedded(source.path)).expanduser()
        if folder.is_dir() and place.expanduser().resolve().is_relative_to(folder.resolve()):
            remedy = f"set {key} to a folder elsewhere"
            raise UserError(f'{key} lies in "{source.path}", where nothing is ever written', where=str(place), remedy=remedy)


def _folder(folder: Path, data: Data) -> Iterator[Entry | Problem]:
    strict = data.unreadable_pictures == "stop"
    files, refused = _walk(folder)
    yield from (Problem(_printable(path), "unreadable picture", detail, strict) for path, detail in refused)
    pictures = [file for file in files if file.suffix.lower() in READ_SUFFIXES | OTHER_SUFFIXES]
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
    captions = Captions(folder, files, data.caption_column)
    for file in pictures:
        found = captions.of(file)
        if found.problem:
            yield Problem(_printable(file), "unreadable caption", found.problem, True)
        else:
            yield Entry(_printable(file), found.text, functools.partial(read_bytes, str(file)), str(file))
    for name, detail, missing in captions.unused():
        yield Problem(name, "missing picture" if missing else "unused caption", detail, missing and strict)


def _walk(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """(files that may be read, what may not and why), each sorted. Hidden ones are left out; nothing outside is read."""
    files: list[Path] = []
    refused: list[tuple[Path, str]] = []
    root = folder.resolve()

    def failed(error: OSError) -> None:
        refused.append((Path(error.filename), f"the folder cannot be read: {error.strerror}"))

    for parent, folders, names in os.walk(folder, onerror=failed):
        linked = [name for name in folders if (Path(parent) / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in linked]
        for path in (Path(parent) / name for name in names + linked if not name.startswith(".")):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
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


def _is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` made it, or parquet files lie where Hugging Face's library looks for them."""
    marked = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))
    return marked or any(file.name != "metadata.parquet" for pattern in ("*.parquet", "data/*.parquet") for file in path.glob(pattern))


def _looks_like_hub_name(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _dataset(folder: Path | None, name: str, data: Data) -> Iterator[Entry | Problem]:
    """Rows of a Hugging Face data set: in `folder`, by `save_to_disk` or as parquet files, or of a name on the hub."""
    if data.classes == "folders":
        raise UserError("a data set's rows lie in no folders", where="data.classes", remedy="set data.classes: captions, and data.caption_column")
    splits = _open_splits(folder, name)
    chosen = "train" if "train" in splits else next(iter(splits))
    for split in splits.keys() - {chosen}:
        yield Problem(f"{name}[{split}]", "unused split", f"{len(splits[split])} rows do not train, only those of {chosen} do", False)
    table = _checked(splits[chosen], data)
    pictures = table.select_columns([data.image_column])
    captions = table[data.caption_column] if data.caption_column in table.column_names else [None] * len(table)

    def reader(row: int) -> Callable[[], bytes]:
        def read() -> bytes:
            cell = pictures[row][data.image_column] or {}
            if cell.get("bytes") is not None:
                return bytes(cell["bytes"])
            if not cell.get("path"):
                raise Unreadable("the row has no picture")
            path = Path(cell["path"])
            if folder is not None and not path.resolve().is_relative_to(folder.resolve()):
                raise Unreadable("the row names a file outside the data set, which is not read")
            return path.read_bytes()

        return read

    for row, caption in enumerate(captions):
        place = f"{name}[{row}]"
        if caption is None or isinstance(caption, str):
            yield Entry(place, None if caption is None else one_line(caption), reader(row))
        else:
            yield Problem(place, "unreadable caption", f'column "{data.caption_column}" holds {type(caption).__name__}, not text', True)


def _open_splits(folder: Path | None, name: str) -> dict[str, Any]:
    """{split: `datasets.Dataset`}."""
    import datasets

    try:
        if folder is not None and ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder or name))
    except Exception as error:  # the library raises many kinds, from the network's to pyarrow's
        lead = f'the data set "{name}" could not be read' if folder else f'there is no folder "{name}", and the hub gave no data set of that name'
        raise UserError(
            f"{lead}: {' '.join(str(error).split())[:200] or type(error).__name__}",
            where="data.path",
            remedy="check the name, the network, and your access to it (`hf auth login`); a folder of pictures works without a network",
        ) from error
    return found if isinstance(found, dict) else {"train": found}


def _checked(table: Any, data: Data) -> Any:
    """A `datasets.Dataset` with the recipe's columns, its pictures as bytes, not decoded."""
    import datasets

    there = f"columns there: {', '.join(table.column_names)}"
    for column, key in ((data.image_column, "image_column"), (data.caption_column, "caption_column")):
        if column not in table.column_names and not (key == "caption_column" and data.missing_captions == "empty"):
            raise UserError(f'the data set has no column "{column}"', where=f"data.{key}", remedy=there)
    try:
        return table.cast_column(data.image_column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow's
        raise UserError(f'column "{data.image_column}" holds no pictures', where="data.image_column", remedy=there) from error
