"""The audit before a run: every picture and caption of the sources, what trains, and what does not and why.

A folder is read, never written. Captions of a folder come from `metadata.jsonl` / `metadata.csv` (columns `file_name`
and the recipe's caption column, the convention of Hugging Face's imagefolder) or else from a `.txt` file beside each
picture. Torch is not imported here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.data.captions import folder_captions
from finetune.data.pictures import Bucket, Crop, Unreadable, buckets, decode, fit, open_picture, upright_size
from finetune.errors import UserError
from finetune.recipe import Data, Source, embedded

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


@dataclass(frozen=True)
class Picture:
    """One picture that trains. `read` gives the file's bytes; `digest` is their SHA-256."""

    name: str
    caption: str
    digest: str
    crop: Crop
    repeats: int
    held_out: bool
    read: Callable[[], bytes] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Problem:
    """A picture that does not train as it is, and why."""

    name: str
    kind: str  # unreadable, missing caption, unreadable caption
    detail: str
    stops: bool


@dataclass(frozen=True)
class Audit:
    pictures: tuple[Picture, ...]
    problems: tuple[Problem, ...]
    background: str

    @property
    def training(self) -> tuple[Picture, ...]:
        return tuple(p for p in self.pictures if not p.held_out)

    @property
    def held_out(self) -> tuple[Picture, ...]:
        return tuple(p for p in self.pictures if p.held_out)

    def bucket_counts(self) -> dict[Bucket, int]:
        """Examples an epoch (pictures × repeats) by bucket."""
        counts: Counter[Bucket] = Counter()
        for picture in self.training:
            counts[picture.crop.bucket] += picture.repeats
        return dict(sorted(counts.items()))

    def raise_if_stopped(self) -> None:
        """Raise for the problems that the recipe does not allow, naming files.

        Raises:
            UserError: at a missing caption, an unreadable picture or no picture at all.
        """
        stopping = [problem for problem in self.problems if problem.stops]
        if stopping:
            kinds = Counter(problem.kind for problem in stopping)
            remedies = {
                "unreadable": "repair or remove the file, or set data.unreadable_pictures: skip",
                "missing caption": "write a .txt file beside each picture or a metadata.jsonl, or set data.missing_captions: empty (or skip)",
                "unreadable caption": "save the caption file as UTF-8",
            }
            shown = "; ".join(f"{p.name}: {p.detail}" for p in stopping[:5]) + (f"; and {len(stopping) - 5} more" if len(stopping) > 5 else "")
            raise UserError(
                "the data has " + " and ".join(f"{count} × {kind}" for kind, count in kinds.items()),
                where=shown,
                remedy="; ".join(remedies[kind] for kind in kinds),
            )
        if not self.training:
            raise UserError("no picture is left to train on", remedy="see the table above for why each was left out")


def scan(data: Data, progress: Callable[[int, str], None] | None = None) -> Audit:
    """Look at every picture of every source.

    Args:
        data: the recipe's section.
        progress: called with (pictures seen, name) now and then.

    Raises:
        UserError: a source that is not there or holds no picture, or a resolution below the bucket step.
    """
    choices = buckets(data.resolution, data.bucket_step, data.maximum_aspect, data.buckets)
    if not choices:
        raise UserError(
            f"no bucket has sides that are multiples of {data.bucket_step} and an area of {data.resolution}²",
            where="data.bucket_step",
            remedy=f"set data.bucket_step to at most {data.resolution}",
        )
    pictures: list[Picture] = []
    problems: list[Problem] = []
    for source in data.sources or (Source(data.path or ""),):
        for number, found in enumerate(_entries(source, data)):
            if progress is not None and number % 50 == 0:
                progress(len(pictures), found.name)
            outcome = _examine(found, source, data, choices)
            if isinstance(outcome, Picture):
                pictures.append(outcome)
            else:
                problems.append(outcome)
            if isinstance(outcome, Picture) and found.caption is None:
                problems.append(Problem(found.name, "missing caption", "trains with an empty caption", stops=False))
    return Audit(_hold_out(pictures, data.held_out), tuple(problems), data.background)


@dataclass(frozen=True)
class _Entry:
    """A picture before it was looked at. `caption` None: there is none; `caption_problem`: there is one that is unreadable."""

    name: str
    caption: str | None
    read: Callable[[], bytes]
    caption_problem: str = ""


def _examine(entry: _Entry, source: Source, data: Data, choices: list[Bucket]) -> Picture | Problem:
    if entry.caption_problem:
        return Problem(entry.name, "unreadable caption", entry.caption_problem, stops=True)
    if entry.caption is None and data.missing_captions != "empty":
        return Problem(entry.name, "missing caption", "no caption was found", stops=data.missing_captions == "stop")
    try:
        content = entry.read()
        decode(content, data.background)
        size = upright_size(open_picture(content))
    except (Unreadable, OSError) as error:
        return Problem(entry.name, "unreadable", str(error), stops=data.unreadable_pictures == "stop")
    caption = f"{source.prefix} {entry.caption or ''}".strip() if source.prefix else (entry.caption or "")
    return Picture(entry.name, caption, hashlib.sha256(content).hexdigest(), fit(size, choices), source.repeats, False, entry.read)


def _hold_out(pictures: list[Picture], share: float) -> tuple[Picture, ...]:
    """Mark the share of pictures with the smallest digests: the same ones whatever else is in the folder's order."""
    chosen = {p.digest for p in sorted(pictures, key=lambda p: p.digest)[: round(share * len(pictures))]}
    return tuple(replace(p, held_out=p.digest in chosen) for p in pictures)


def _entries(source: Source, data: Data) -> Iterator[_Entry]:
    path = Path(embedded(source.path)).expanduser()
    if path.is_dir() and not _is_saved_dataset(path):
        yield from _folder(path, data)
    elif path.is_file():
        raise UserError(f"{source.path} is a file; a source is a folder of pictures or a data set", remedy="give the folder it lies in")
    elif path.exists() or _looks_like_hub_name(source.path):
        yield from _dataset(str(path) if path.exists() else source.path, data)
    else:
        raise UserError(f'there is no folder "{source.path}"', where="data.path", remedy="check data.path (relative paths start at the working directory)")


def _folder(folder: Path, data: Data) -> Iterator[_Entry]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file() and not p.name.startswith("."))
    if not files:
        raise UserError(
            f"the folder {folder} holds no picture",
            remedy="put pictures there (" + " ".join(sorted(PICTURE_SUFFIXES)) + "), or correct data.path",
        )
    captions = folder_captions(folder, data.caption_column)
    for file in files:
        caption, problem = captions(file)
        yield _Entry(str(file), caption, file.read_bytes, problem)


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")) or any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))


def _looks_like_hub_name(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _dataset(path: str, data: Data) -> Iterator[_Entry]:
    """Rows of a Hugging Face data set: saved by `save_to_disk`, a folder of parquet files, or a name on the hub."""
    import datasets

    try:
        if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(path)
        else:
            table = datasets.load_dataset(path)
    except Exception as error:  # the library raises many kinds, from the network's to pyarrow's
        raise UserError(
            f'the data set "{path}" could not be loaded: {type(error).__name__}: {str(error).splitlines()[0]}',
            where="data.path",
            remedy="check the name, the network, and access to the repository; a folder of pictures works too",
        ) from error
    if isinstance(table, dict):
        table = table["train"] if "train" in table else next(iter(table.values()))
    for column, key in ((data.image_column, "image_column"), (data.caption_column, "caption_column")):
        if column not in table.column_names and not (key == "caption_column" and data.missing_captions == "empty"):
            raise UserError(f'the data set has no column "{column}"', where=f"data.{key}", remedy=f"columns there: {', '.join(table.column_names)}")
    table = table.cast_column(data.image_column, datasets.Image(decode=False))

    def reader(row: int) -> Callable[[], bytes]:
        def read() -> bytes:
            cell = table[row][data.image_column]
            return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

        return read

    captions = table[data.caption_column] if data.caption_column in table.column_names else [None] * len(table)
    for row, caption in enumerate(captions):
        yield _Entry(f"{path}[{row}]", caption if caption is None else str(caption), reader(row))
