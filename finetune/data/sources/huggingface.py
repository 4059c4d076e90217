"""Hugging Face datasets as sources: saved by `save_to_disk`, parquet files in a folder, or a name on the Hub.

Datasets are untrusted input. Their code never runs (the library no longer supports loading scripts, and only builders
of plain data formats are used), no pickle is loaded, and no file outside the dataset's own folder or Hub repository is
read, even if its tables, README or state files refer to one.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from finetune.config.schema import Data
from finetune.data.example import role_of
from finetune.data.media.image import Unreadable
from finetune.data.sources.captions import one_line
from finetune.data.sources.entry import Entry, Problem
from finetune.data.sources.files import is_inside
from finetune.data.sources.masks import BESIDE
from finetune.errors import UserError

BUILDERS = {"arrow", "csv", "imagefolder", "json", "parquet", "webdataset"}  # the library's builders of plain formats
SPLIT = re.compile(r"(?:^|[-_./ ])(train|test|validation|valid|val|dev|eval)(?=[-_./ 0-9]|$)", re.IGNORECASE)
RECENT_ROWS = 64  # rows of a stream that stay in memory, so that threads may request them out of order
STATE_ROWS = 1000  # rows between the saved positions of a stream


def is_saved(path: Path) -> bool:
    """Whether `path` was written by `save_to_disk`, or has parquet files where the `datasets` library expects them."""
    marked = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))
    return marked or bool(_parquet(path))


def looks_like_hub_name(path: str) -> bool:
    """Whether `path` has the form `owner/name` of a dataset on the Hub."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def rows(folder: Path | None, name: str, data: Data, roles: Collection[str] = ()) -> Iterator[Entry | Problem]:
    """Yield the rows of the dataset in `folder`, or of the Hub dataset `name`.

    Raises:
        UserError: the dataset does not exist, lacks a column, or refers to files outside.
    """
    splits = _open(folder, name, data.streaming)
    chosen = "train" if "train" in splits else next(iter(splits))
    for split in sorted(splits.keys() - {chosen}):
        count = "its rows" if data.streaming else f"{len(splits[split])} rows"
        yield Problem(f"{name}[{split}]", "unused split", f"{count} are not used; only {chosen} is", False)
    columns = _columns(splits[chosen], data, roles)
    table = _checked(splits[chosen], data, columns)
    place = _Place(folder, name)
    if data.streaming:
        yield from _streamed(_Stream(table, place), name, data, columns)
        return
    captions = table[data.caption_column] if data.caption_column in table.column_names else [None] * len(table)
    read = _Table(table.select_columns([data.image_column]), place, data.image_column).read
    others = {role: table.select_columns([column]) for role, column in columns.items()}
    readers = {role: _Table(column, place, columns[role]).read for role, column in others.items()}
    filled = {role: _filled(column, len(table)) for role, column in others.items()}
    for row, caption in enumerate(captions):
        given = {role for role, has_value in filled.items() if next(has_value)}
        read_others = {role: functools.partial(readers[role], row) for role in readers if role in given}
        yield _entry(f"{name}[{row}]", caption, functools.partial(read, row), data, others=read_others)


def _columns(table: Any, data: Data, roles: Collection[str]) -> dict[str, str]:
    """Role → column of the image's partners: columns named after a role, and the mask column if masks are used."""
    names = _names(table)
    columns = {role: role for role in names if role_of(role, roles) is not None}
    return columns | ({"mask": data.mask_column} if data.masks == BESIDE and data.mask_column in names else {})


def _names(table: Any) -> list[str]:
    return list(table.column_names or (table.features or next(iter(table), {})).keys())


def _filled(table: Any, length: int) -> Iterator[bool]:
    """Whether each row of a one-column table has a value. Images are not read."""
    if table is None:
        yield from itertools.repeat(False, length)
        return
    for batch in table.with_format("arrow").iter(STATE_ROWS):
        yield from (not is_null for is_null in batch.column(0).is_null().to_pylist())


def _streamed(stream: _Stream, name: str, data: Data, columns: dict[str, str]) -> Iterator[Entry | Problem]:
    number = 0
    while (row := stream.row(number)) is not None:
        read = functools.partial(stream.read, number, data.image_column)
        others = {
            role: functools.partial(stream.read, number, column)
            for role, column in columns.items()
            if row.get(column) is not None
        }
        cell = content(row[data.image_column])
        yield _entry(f"{name}[{number}]", row.get(data.caption_column), read, data, cell, others)
        number += 1


def content(cell: dict[str, Any] | None) -> bytes | None:
    """The bytes of an image that is stored in the row itself; None if it is in a file."""
    value = (cell or {}).get("bytes")
    return None if value is None else bytes(value)


def _entry(
    place: str,
    caption: Any,
    read: functools.partial[bytes],
    data: Data,
    content: bytes | None = None,
    others: Mapping[str, Callable[[], bytes]] = MappingProxyType({}),
) -> Entry | Problem:
    if caption is None or isinstance(caption, str):
        return Entry(place, None if caption is None else one_line(caption), read, content=content, others=others)
    return Problem(
        place, "unreadable caption", f'column "{data.caption_column}" holds {type(caption).__name__}, not text', True
    )


class _Place:
    """Where the bytes of an image may come from: its cell, or a file of the dataset itself."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self._folder, self._name = folder, name

    def bytes_of(self, cell: dict[str, Any] | None) -> bytes:
        """The bytes of the image in `cell`.

        Raises:
            Unreadable: the cell is empty, or refers to a file outside the dataset.
            OSError: the file cannot be read.
        """
        cell = cell or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        path = cell.get("path")
        if not path:
            raise Unreadable("the row has no image")
        if self._folder is None and on_hub(str(path), self._name):
            from datasets.utils.file_utils import xopen

            with xopen(path, "rb") as file:
                return bytes(file.read())
        if not any(is_inside(Path(path), root) for root in self._roots()):
            raise Unreadable("the row refers to a file outside the dataset, which is not read")
        return Path(path).read_bytes()

    def _roots(self) -> list[Path]:
        if self._folder is not None:
            return [self._folder]
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE

        return [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]  # where the library downloads and unpacks


def on_hub(url: str, name: str) -> bool:
    """Whether `url`, or the archive that contains it, belongs to the dataset `name` on the Hub."""
    return url.rsplit("::", 1)[-1].startswith((f"hf://datasets/{name}@", f"hf://datasets/{name}/")) and ".." not in url


class _Table:
    """A column of images on disk. It can be pickled and sent to the other processes of a run."""

    def __init__(self, images: Any, place: _Place, column: str) -> None:
        self._images, self._place, self._column, self._lock = images, place, column, threading.Lock()

    def __reduce__(self) -> Any:
        return _Table, (self._images, self._place, self._column)

    def read(self, row: int) -> bytes:
        with self._lock:
            cell = self._images[row][self._column]
        return self._place.bytes_of(cell)


class _Stream:
    """Access by row number to a stream, at no extra cost if the rows are read in order.

    Going back restarts from the nearest saved position, so the result never depends on earlier reads. A stream can be
    pickled, with its saved positions, and sent to the other processes of a run.
    """

    def __init__(self, table: Any, place: _Place, states: dict[int, Any] | None = None) -> None:
        self._fresh, self._table, self._place, self._lock = table, table, place, threading.Lock()
        self._states = states or {}
        self._recent: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._rows: Iterator[dict[str, Any]] | None = None
        self._next = 0

    def __reduce__(self) -> Any:
        return _Stream, (self._fresh, self._place, self._states)

    def read(self, number: int, column: str) -> bytes:
        row = self.row(number)
        if row is None:
            raise Unreadable("the data set has become shorter")
        return self._place.bytes_of(row[column])

    def row(self, number: int) -> dict[str, Any] | None:
        """Row `number`; None past the end."""
        with self._lock:
            if number in self._recent:
                return self._recent[number]
            if self._rows is None or number < self._next or self._nearest(number) > self._next:
                self._start(self._nearest(number))
            assert self._rows is not None
            while self._next <= number:
                row = next(self._rows, None)
                if row is None:
                    return None
                self._recent[self._next] = row
                if len(self._recent) > RECENT_ROWS:
                    self._recent.popitem(last=False)
                self._next += 1
                if self._next % STATE_ROWS == 0 and self._next not in self._states:
                    self._states[self._next] = copy.deepcopy(self._table.state_dict())
            return self._recent[number]

    def _nearest(self, number: int) -> int:
        return max((known for known in self._states if known <= number), default=0)

    def _start(self, number: int) -> None:
        table = copy.deepcopy(self._fresh)
        if number:
            table.load_state_dict(copy.deepcopy(self._states[number]))
        self._table, self._rows, self._next = table, iter(table), number
        self._recent.clear()


def _open(folder: Path | None, name: str, streaming: bool) -> dict[str, Any]:
    """{split: `datasets.Dataset`, or `IterableDataset` if streaming}."""
    import datasets

    try:
        if folder is not None and not _parquet(folder):
            _refuse_outside(folder)
            found = datasets.load_from_disk(str(folder))
            if streaming:
                found = {
                    split: table.to_iterable_dataset()
                    for split, table in (found if isinstance(found, dict) else {"train": found}).items()
                }
        else:
            # The folder's README is not read: it could list any file as data.
            builder = (
                datasets.load_dataset_builder("parquet", data_files=_by_split(folder)) if folder else _on_the_hub(name)
            )
            if streaming:
                found = builder.as_streaming_dataset()
            else:
                builder.download_and_prepare()
                found = builder.as_dataset()
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds, from network errors to pyarrow's
        problem = (
            f'the dataset "{name}" could not be read'
            if folder
            else f'there is no folder "{name}", and no dataset of that name could be loaded from the Hub'
        )
        raise UserError(
            f"{problem}: {' '.join(str(error).split())[:200] or type(error).__name__}",
            where="data.path",
            remedy="check the name, the network and your access (`hf auth login`), or use a local folder of images",
        ) from error
    return found if isinstance(found, dict) else {"train": found}


def _parquet(folder: Path) -> list[Path]:
    found = sorted(
        file
        for pattern in ("*.parquet", "data/*.parquet")
        for file in folder.glob(pattern)
        if file.name != "metadata.parquet"
    )
    return [file for file in found if file.is_file()]


def _by_split(folder: Path) -> dict[str, list[str]]:
    """Parquet files by split, which is part of their names.

    Raises:
        UserError: a file is a link out of the folder.
    """
    files: dict[str, list[str]] = {}
    for file in _parquet(folder):
        _inside(file, folder)
        match = SPLIT.search(file.name)
        files.setdefault(match[1].lower() if match else "train", []).append(str(file))
    return files


def _inside(path: Path, folder: Path) -> None:
    if not is_inside(path, folder):
        problem = "the dataset refers to a file outside its folder, which is not read"
        raise UserError(problem, where=str(path), remedy="move the file into the folder, or remove the reference")


def _refuse_outside(folder: Path) -> None:
    """Raise if the state files of a `save_to_disk` dataset refer to files outside its folder."""
    parts = [folder]
    if (folder / "dataset_dict.json").is_file():
        parts = [
            folder / str(split)
            for split in json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        ]
    for part in parts:
        _inside(part / "state.json", folder)
        for file in json.loads((part / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            _inside(part / str(file["filename"]), folder)


def _on_the_hub(name: str) -> Any:
    """The builder of a Hub dataset that consists of its own files only.

    Raises:
        UserError: its README refers to files elsewhere, or to files in an unsupported format.
    """
    import datasets

    builder = datasets.load_dataset_builder(name)
    kind = type(builder).__module__.rsplit(".", 1)[-1]
    if kind not in BUILDERS:
        remedy = "convert it to parquet or to a folder of images"
        raise UserError(
            f'the dataset "{name}" consists of {kind} files, which are not supported', where="data.path", remedy=remedy
        )
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if not on_hub(str(file), name):
                raise UserError(
                    f'the dataset "{name}" refers to a file outside its repository: {file}',
                    where="data.path",
                    remedy="use another dataset",
                )
    return builder


def _checked(table: Any, data: Data, columns: dict[str, str]) -> Any:
    """The dataset with the recipe's columns checked, and its images as undecoded bytes."""
    import datasets

    names = _names(table)
    available = f"its columns are: {', '.join(names)}"
    for column, key in ((data.image_column, "image_column"), (data.caption_column, "caption_column")):
        if column not in names and not (key == "caption_column" and data.missing_captions == "empty"):
            raise UserError(f'the dataset has no column "{column}"', where=f"data.{key}", remedy=available)
    keys = {data.image_column: "image_column"} | {
        column: "mask_column" if role == "mask" else "path" for role, column in columns.items()
    }
    for column, key in keys.items():
        try:
            table = table.cast_column(column, datasets.Image(decode=False))
        except Exception as error:  # pyarrow's
            problem = f'column "{column}" does not contain images'
            raise UserError(problem, where=f"data.{key}", remedy=available) from error
    return table
