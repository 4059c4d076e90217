"""Hugging Face data sets as sources: saved by `save_to_disk`, parquet files in a folder, or a name on the hub.

A data set is a stranger's: no code of it runs (the library has no loading scripts any more, and only builders for plain
formats are used), no pickle is opened, and no file outside the data set's own folder or its place on the hub is read,
whatever its tables, its README or its state files name.
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

BUILDERS = {"arrow", "csv", "imagefolder", "json", "parquet", "webdataset"}  # of the library's: plain formats
SPLIT = re.compile(r"(?:^|[-_./ ])(train|test|validation|valid|val|dev|eval)(?=[-_./ 0-9]|$)", re.IGNORECASE)
RECENT_ROWS = 64  # of a stream, kept so that threads need not ask in order
STATE_ROWS = 1000  # a stream remembers where it was every so many rows


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` made it, or parquet files lie where Hugging Face's library looks for them."""
    marked = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))
    return marked or bool(_parquet(path))


def looks_like_hub_name(path: str) -> bool:
    """Whether `path` has the form `owner/name`, as data sets on the hub have it."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def rows(folder: Path | None, name: str, data: Data, roles: Collection[str] = ()) -> Iterator[Entry | Problem]:
    """The rows of the data set in `folder`, or of a name on the hub.

    Raises:
        UserError: it is not there, has other columns, or reaches outside.
    """
    splits = _open(folder, name, data.streaming)
    chosen = "train" if "train" in splits else next(iter(splits))
    for split in sorted(splits.keys() - {chosen}):
        count = "the" if data.streaming else len(splits[split])
        yield Problem(
            f"{name}[{split}]", "unused split", f"{count} rows do not train, only those of {chosen} do", False
        )
    columns = _columns(splits[chosen], data, roles)
    table = _checked(splits[chosen], data, columns)
    place = _Place(folder, name)
    if data.streaming:
        yield from _streamed(_Stream(table, place), name, data, columns)
        return
    captions = table[data.caption_column] if data.caption_column in table.column_names else [None] * len(table)
    read = _Table(table.select_columns([data.image_column]), place, data.image_column).read
    others = {role: table.select_columns([column]) for role, column in columns.items()}
    readers = {role: _Table(found, place, columns[role]).read for role, found in others.items()}
    filled = {role: _filled(found, len(table)) for role, found in others.items()}
    for row, caption in enumerate(captions):
        given = {role for role, there in filled.items() if next(there)}
        read_others = {role: functools.partial(readers[role], row) for role in readers if role in given}
        yield _entry(f"{name}[{row}]", caption, functools.partial(read, row), data, others=read_others)


def _columns(table: Any, data: Data, roles: Collection[str]) -> dict[str, str]:
    """Role → column, of the columns that hold partners of the image: the mask, if masks are used, and columns named by a role."""
    names = _names(table)
    found = {role: role for role in names if role_of(role, roles) is not None}
    return found | ({"mask": data.mask_column} if data.masks == BESIDE and data.mask_column in names else {})


def _names(table: Any) -> list[str]:
    return list(table.column_names or (table.features or next(iter(table), {})).keys())


def _filled(table: Any, length: int) -> Iterator[bool]:
    """Of each row of a table of one column, whether it has anything; no pixel is read."""
    if table is None:
        yield from itertools.repeat(False, length)
        return
    for batch in table.with_format("arrow").iter(STATE_ROWS):
        yield from (not nothing for nothing in batch.column(0).is_null().to_pylist())


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
    """An image that is in the row itself."""
    found = (cell or {}).get("bytes")
    return None if found is None else bytes(found)


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
    """Where the bytes of an image may come from: its cell, and files of the data set itself."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self._folder, self._name = folder, name

    def bytes_of(self, cell: dict[str, Any] | None) -> bytes:
        """Raises: Unreadable, OSError."""
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
            raise Unreadable("the row names a file outside the data set, which is not read")
        return Path(path).read_bytes()

    def _roots(self) -> list[Path]:
        if self._folder is not None:
            return [self._folder]
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE

        return [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]  # what the library downloaded and unpacked


def on_hub(url: str, name: str) -> bool:
    """Whether `url`, or the archive that it is inside, belongs to the data set `name` on the hub."""
    return url.rsplit("::", 1)[-1].startswith((f"hf://datasets/{name}@", f"hf://datasets/{name}/")) and ".." not in url


class _Table:
    """A column of images on disk. It can be pickled, for the other processes of a run."""

    def __init__(self, images: Any, place: _Place, column: str) -> None:
        self._images, self._place, self._column, self._lock = images, place, column, threading.Lock()

    def __reduce__(self) -> Any:
        return _Table, (self._images, self._place, self._column)

    def read(self, row: int) -> bytes:
        with self._lock:
            cell = self._images[row][self._column]
        return self._place.bytes_of(cell)


class _Stream:
    """Rows that come one after another, by their number: asked for in order they cost nothing more.

    Going back starts again from the nearest place that was remembered, so what a number gives never depends on what was
    asked before. It can be pickled, for the other processes of a run, which then know these places too.
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
        """Row `number`, or None behind the last."""
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
            # A README in the folder could name any file as data: it is not asked.
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
    except Exception as error:  # the library raises many kinds, from the network's to pyarrow's
        lead = (
            f'the data set "{name}" could not be read'
            if folder
            else f'there is no folder "{name}", and the hub gave no data set of that name'
        )
        raise UserError(
            f"{lead}: {' '.join(str(error).split())[:200] or type(error).__name__}",
            where="data.path",
            remedy="check the name, the network, and your access to it (`hf auth login`); a folder of images works without a network",
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
    """Parquet files by the split that their names tell.

    Raises:
        UserError: one is a link out of the folder.
    """
    found: dict[str, list[str]] = {}
    for file in _parquet(folder):
        _inside(file, folder)
        told = SPLIT.search(file.name)
        found.setdefault(told[1].lower() if told else "train", []).append(str(file))
    return found


def _inside(path: Path, folder: Path) -> None:
    if not is_inside(path, folder):
        problem, remedy = (
            "the data set names a file outside its folder, which is not read",
            "put the file into the folder, or remove its name",
        )
        raise UserError(problem, where=str(path), remedy=remedy)


def _refuse_outside(folder: Path) -> None:
    """Raise if a data set made by `save_to_disk` names, in its own words, what is not in its folder."""
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
    """The builder of a data set on the hub, its files all its own.

    Raises:
        UserError: its README names files elsewhere, or files of a kind that is not read here.
    """
    import datasets

    builder = datasets.load_dataset_builder(name)
    kind = type(builder).__module__.rsplit(".", 1)[-1]
    if kind not in BUILDERS:
        remedy = "convert it to parquet or to a folder of images"
        raise UserError(
            f'the data set "{name}" is made of {kind} files, which are not read here', where="data.path", remedy=remedy
        )
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if not on_hub(str(file), name):
                raise UserError(
                    f'the data set "{name}" names a file that is not its own: {file}',
                    where="data.path",
                    remedy="use another data set",
                )
    return builder


def _checked(table: Any, data: Data, columns: dict[str, str]) -> Any:
    """The data set with the recipe's columns, its images as bytes, not decoded."""
    import datasets

    names = _names(table)
    there = f"columns there: {', '.join(names)}"
    for column, key in ((data.image_column, "image_column"), (data.caption_column, "caption_column")):
        if column not in names and not (key == "caption_column" and data.missing_captions == "empty"):
            raise UserError(f'the data set has no column "{column}"', where=f"data.{key}", remedy=there)
    keys = {data.image_column: "image_column"} | {
        column: "mask_column" if role == "mask" else "path" for role, column in columns.items()
    }
    for column, key in keys.items():
        try:
            table = table.cast_column(column, datasets.Image(decode=False))
        except Exception as error:  # pyarrow's
            raise UserError(f'column "{column}" holds no images', where=f"data.{key}", remedy=there) from error
    return table
