"""Tensors that were dear to compute, kept by what they were computed from.

A store is a folder of safetensors shards, each named by the SHA-256 of its bytes. A shard is written aside, synced and
renamed, so a run may be killed anywhere and others may write at the same time. There is no index: a shard's header lists
its keys. A shard is checked against its name when something in it is first asked for; a damaged one is set aside, and
what it held is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from finetune.errors import UserError

SHARD_ENTRIES = 64  # at most so many are lost by a kill
SHARD_BYTES = 64 << 20  # and not more memory than this is held for them
SEPARATOR = "|"  # between an entry's key and the names of its tensors


class Store:
    """Args:
    folder: made if missing.

    Raises:
        UserError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[str, Path] = {}  # by key; an entry's tensors are in one shard
        self._names: dict[str, list[str]] = {}  # by key, of its tensors
        self._opened: dict[Path, Any] = {}  # `safe_open`, mapped to memory: no file stays open
        self._checked: set[Path] = set()
        self._pending: dict[str, dict[str, Tensor]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for shard in sorted(folder.glob("*.safetensors")):
                self._read_header(shard)
        except OSError as error:
            raise _unusable(folder, error) from error

    def __contains__(self, key: str) -> bool:
        """Whether `key` can be had; a damaged shard is found out here."""
        if key in self._pending:
            return True
        shard = self._shards.get(key)
        if shard is None:
            return False
        if shard not in self._checked and not _is_whole(shard):
            self._set_aside(shard)
            return False
        self._checked.add(shard)
        return True

    def get(self, key: str) -> dict[str, Tensor]:
        """The named tensors of `key`; KeyError if it is not there."""
        if key in self._pending:
            return self._pending[key]
        opened = self._opened[self._shards[key]]
        return {name: opened.get_tensor(key + SEPARATOR + name) for name in self._names[key]}

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep `tensors` under `key`; on disk once a shard is full, or after `flush`."""
        # Clones: a view would keep its whole storage alive, and safetensors refuses tensors that share one.
        self._pending[key] = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        size = sum(tensor.nbytes for entry in self._pending.values() for tensor in entry.values())
        if len(self._pending) >= SHARD_ENTRIES or size >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        if not self._pending:
            return
        content = save({key + SEPARATOR + name: tensor for key, entry in self._pending.items() for name, tensor in entry.items()})
        shard = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        try:
            write_aside(shard, content)
        except OSError as error:
            raise _unusable(self.folder, error) from error
        self._pending.clear()
        self._checked.add(shard)
        self._read_header(shard)

    def _read_header(self, shard: Path) -> None:
        try:
            opened: Any = safe_open(shard, framework="pt")
        except SafetensorError:
            self._set_aside(shard)
            return
        except FileNotFoundError:  # another process has just set it aside
            return
        self._opened[shard] = opened
        for full in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
            key, _, name = full.rpartition(SEPARATOR)
            if self._shards.setdefault(key, shard) == shard:
                self._names.setdefault(key, []).append(name)

    def _set_aside(self, shard: Path) -> None:
        """Forget a damaged shard, and rename it so that no other run meets it."""
        for key in [key for key, place in self._shards.items() if place == shard]:
            del self._shards[key], self._names[key]
        self._opened.pop(shard, None)
        with contextlib.suppress(OSError):  # a cache that can only be read, or another process was faster
            os.replace(shard, shard.with_suffix(".damaged"))


def _is_whole(shard: Path) -> bool:
    try:
        with open(shard, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.stem
    except OSError:
        return False


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"the cache cannot be written: {error.strerror}",
        where=str(folder),
        remedy="free some space there, or keep the cache elsewhere: --set data.cache=FOLDER, or the environment's FT_CACHE",
    )


def write_aside(path: Path, content: bytes) -> None:
    """Write `path` so that it is there whole or not at all: beside it first, synced, then renamed."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(aside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: equal exactly for equal weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
