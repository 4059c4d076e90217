"""The latent cache: tensors on disk, with keys derived from what they were computed from.

A store is a folder of safetensors shards, each named by the SHA-256 of its bytes. A shard is written to a temporary
file, synced and renamed, so a run may be killed at any time and several processes may write at once. There is no index
on disk: the header of a shard lists its keys. In memory, an entry takes 12 bytes. A shard is checked against its name
when it is first read; a damaged shard is renamed, and its entries are computed again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from finetune.data.sources.files import try_to_create, write_aside
from finetune.errors import UserError
from finetune.replaceable import replaceable

SHARD_ENTRIES = 64  # entries of a full shard: the most that a killed process loses
SHARD_BYTES = 64 << 20  # size of a full shard: the most memory that pending entries take
SEPARATOR = "|"  # between an entry's key and the names of its tensors
HEADERS = 256  # parsed shard headers kept in memory
RECENT = 1 << 16  # new entries that are kept in a dict before they are merged into the sorted arrays

# Key → tensor name → safetensors' description ("dtype", "shape"), and the start and end of its bytes in the file.
Header = dict[str, dict[str, tuple[dict[str, object], int, int]]]


class Store:
    """A folder of tensors by key. Thread-safe.

    Args:
        folder: created if missing.

    Raises:
        UserError: the folder cannot be created or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._shards: list[Path] = []
        # The sorted hashes of the keys on disk, and the index of each one's shard. Recent entries are in `_recent`.
        self._hashes, self._places = numpy.zeros(0, numpy.uint64), numpy.zeros(0, numpy.int32)
        self._recent: dict[int, int] = {}
        self._header = functools.lru_cache(HEADERS)(_header)
        self._checked: set[Path] = set()
        self._damaged: set[Path] = set()
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._pending_bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for shard in sorted(folder.glob("*.safetensors")):
                self._add(shard)
        except OSError as error:
            raise _unusable(folder, error) from error
        self._merge_recent()

    def __contains__(self, key: str) -> bool:
        """Whether `get` can return `key`; detects damaged shards."""
        with self._lock:
            return key in self._pending or self._shard_of(key) is not None

    def get(self, key: str) -> dict[str, Tensor]:
        """The named tensors of `key`.

        Raises:
            KeyError: the key is not in the store, or its shard is damaged.
        """
        with self._lock:
            if key in self._pending:
                return self._pending[key]
            shard = self._shard_of(key)
            if shard is None:
                raise KeyError(key)
            described = self._header(shard)[key]
        try:
            return _read(shard, described)
        except (OSError, SafetensorError) as error:  # deleted or truncated since it was checked
            raise KeyError(key) from error

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Add `tensors` under `key`. They are written to disk when a shard is full, or by `flush`."""
        # Clone: a view would keep its whole storage alive, and safetensors rejects tensors that share storage.
        kept = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        with self._lock:
            self._pending[key] = kept
            self._pending_bytes += sum(tensor.nbytes for tensor in kept.values())
            if len(self._pending) >= SHARD_ENTRIES or self._pending_bytes >= SHARD_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write the pending entries as one shard.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        with self._lock:
            if not self._pending:
                return
            content = save(
                {
                    key + SEPARATOR + name: tensor
                    for key, entry in self._pending.items()
                    for name, tensor in entry.items()
                }
            )
            shard = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
            try:
                write_aside(shard, content)
            except OSError as error:
                raise _unusable(self.folder, error) from error
            self._pending.clear()
            self._pending_bytes = 0
            self._checked.add(shard)
            self._damaged.discard(shard)
            self._add(shard)

    def _add(self, shard: Path) -> None:
        try:
            keys = self._header(shard)
        except ValueError:
            self._set_aside(shard)
            return
        except FileNotFoundError:  # another process has just renamed it
            return
        self._shards.append(shard)
        self._recent.update((_hash(key), len(self._shards) - 1) for key in keys)
        if len(self._recent) >= RECENT:
            self._merge_recent()

    def _merge_recent(self) -> None:
        count = len(self._recent)
        hashes = numpy.concatenate([self._hashes, numpy.fromiter(self._recent.keys(), numpy.uint64, count)])
        places = numpy.concatenate([self._places, numpy.fromiter(self._recent.values(), numpy.int32, count)])
        order = numpy.argsort(hashes, kind="stable")
        self._hashes, self._places = hashes[order], places[order]
        self._recent.clear()

    def _shard_of(self, key: str) -> Path | None:
        """An undamaged shard that contains `key`."""
        wanted = _hash(key)
        start = int(numpy.searchsorted(self._hashes, numpy.uint64(wanted)))
        places = [self._recent[wanted]] if wanted in self._recent else []
        while start < len(self._hashes) and int(self._hashes[start]) == wanted:
            places.append(int(self._places[start]))
            start += 1
        for shard in (self._shards[place] for place in places):
            if shard in self._damaged:
                continue
            if shard not in self._checked and not _is_whole(shard):
                self._set_aside(shard)
                continue
            self._checked.add(shard)
            if key in self._header(shard):  # two keys can share a hash
                return shard
        return None

    def _set_aside(self, shard: Path) -> None:
        """Forget a damaged shard, and rename it so that no other run reads it."""
        self._damaged.add(shard)
        with contextlib.suppress(OSError):  # a read-only cache, or another process was faster
            os.replace(shard, shard.with_suffix(".damaged"))


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def _header(shard: Path) -> Header:
    """The contents of a shard, from its header (https://github.com/huggingface/safetensors, Format).

    Raises:
        ValueError: it is not a safetensors file.
        OSError: it cannot be read.
    """
    with open(shard, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= os.fstat(file.fileno()).st_size:
            raise ValueError("the header is longer than the file")
        described = json.loads(file.read(start - 8))
    header: Header = {}
    try:
        for full, value in described.items():
            if full != "__metadata__":
                key, _, name = full.rpartition(SEPARATOR)
                first, last = value["data_offsets"]
                header.setdefault(key, {})[name] = (
                    {"dtype": value["dtype"], "shape": value["shape"]},
                    start + int(first),
                    start + int(last),
                )
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError("the header is not a valid safetensors header") from error
    return header


def _read(shard: Path, tensors: dict[str, tuple[dict[str, object], int, int]]) -> dict[str, Tensor]:
    """Read some tensors of a shard, without `mmap`: a mapped file that shrinks would kill the process."""
    header: dict[str, object] = {}
    body = bytearray()
    with open(shard, "rb") as file:
        for name, (description, start, end) in tensors.items():
            header[name] = description | {"data_offsets": [len(body), len(body) + end - start]}
            file.seek(start)
            body += file.read(end - start)
    described = json.dumps(header).encode()
    tensors_read: dict[str, Tensor] = load(len(described).to_bytes(8, "little") + described + bytes(body))
    return tensors_read


def _is_whole(shard: Path) -> bool:
    try:
        with open(shard, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.stem
    except OSError:
        return False


def refuse_unusable(folder: Path) -> None:
    """Raise if the cache's folder cannot be created; nothing is left behind.

    Raises:
        UserError: as `Store`.
    """
    try:
        try_to_create(folder)
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"the cache cannot be written: {error.strerror}",
        where=str(folder),
        remedy="free some space, or move the cache with --set data.cache=FOLDER or the environment variable FT_CACHE",
    )


@replaceable
def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: equal exactly for equal weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
