"""Tensors that were dear to compute, kept by what they were computed from.

A store is a folder of safetensors shards, each named by the SHA-256 of its bytes. A shard is written aside, synced and
renamed, so a run may be killed anywhere and others may write at the same time; a damaged shard is noticed when it is
opened and set aside, and what it held is computed again. There is no index: a shard's header lists its keys.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

SHARD_ENTRIES = 256
SEPARATOR = "|"  # between an entry's key and the names of its tensors


class Store:
    """Args:
    folder: made if missing.

    Attributes:
        damaged: shards whose bytes no longer agree with their name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[Path] = []
        self._places: dict[str, dict[str, Path]] = {}  # key → tensor name → shard
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._open: dict[Path, safe_open] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for shard in sorted(folder.glob("*.safetensors")):
            self._read_header(shard)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._pending

    def get(self, key: str) -> dict[str, Tensor]:
        """The named tensors of `key`; KeyError if it is not there."""
        if key in self._pending:
            return self._pending[key]
        return {name: self._open[shard].get_tensor(f"{key}{SEPARATOR}{name}") for name, shard in self._places[key].items()}

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep `tensors` under `key`; on disk at the latest after `SHARD_ENTRIES` entries or `flush`."""
        self._pending[key] = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if len(self._pending) >= SHARD_ENTRIES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard."""
        if not self._pending:
            return
        content = save({f"{key}{SEPARATOR}{name}": tensor for key, entry in self._pending.items() for name, tensor in entry.items()})
        shard = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        write_aside(shard, content)
        self._pending.clear()
        self._read_header(shard)

    def _read_header(self, shard: Path) -> None:
        if hashlib.sha256(shard.read_bytes()).hexdigest() != shard.stem:
            self.damaged.append(shard)
            os.replace(shard, shard.with_suffix(".damaged"))
            return
        try:
            opened = safe_open(shard, framework="pt")
        except SafetensorError:
            self.damaged.append(shard)
            return
        self._open[shard] = opened
        for full in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
            key, _, name = full.rpartition(SEPARATOR)
            self._places.setdefault(key, {})[name] = shard


def write_aside(path: Path, content: bytes) -> None:
    """Write `path` so that it is there whole or not at all: beside it first, synced, then renamed."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def cache_folder(wanted: str | None) -> Path:
    """The recipe's `data.cache`, else $FT_CACHE, else the user's cache folder."""
    if wanted:
        return Path(wanted).expanduser()
    if os.environ.get("FT_CACHE"):
        return Path(os.environ["FT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "finetune"


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: equal exactly for equal weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
