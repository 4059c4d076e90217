"""`ExampleStore`: encoded tensors in memory and in the disk cache, computed if neither has them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from finetune.data.batch import Batch
from finetune.data.latent_cache import Store
from finetune.errors import UserError
from finetune.rng import key_of

TENSOR_BYTES = 1024  # memory that a tensor takes besides its elements
MEMORY_BYTES = 2 << 30  # tensors kept in memory; the rest is read again from the cache, or computed again


class ExampleStore:
    """Tensors by (part, key), where `part` is the key of a `finetune.data.batch.Part`. Thread-safe.

    Args:
        cached: whether tensors are kept on disk as well.
    """

    def __init__(self, cached: bool) -> None:
        self._cached = cached
        self._stores: dict[str, Store] = {}
        self._memory: OrderedDict[str, Batch] = OrderedDict()
        self._memory_bytes = 0
        self._lock = threading.Lock()
        self.sealed = False  # True once the encoder is released, so that nothing can be computed

    def open(self, folder: Path, parts: Collection[str]) -> None:
        """Open the parts' folders in the cache, or reopen them to see what other processes have written.

        Raises:
            UserError: the cache cannot be read or written.
        """
        self._stores = {part: Store(folder / key_of(part)[:24]) for part in parts if part}

    def on_disk(self, part: str) -> Store:
        """The disk store of a part."""
        return self._stores[part]

    def flush(self) -> None:
        """Write pending tensors to disk."""
        for store in self._stores.values():
            store.flush()

    def get(self, part: str, key: str, compute: Callable[[], Batch], keep: bool = True) -> Batch:
        """Return tensors from memory, else from the disk cache, else compute them and store them in both.

        Args:
            keep: whether to keep them in memory.

        Raises:
            UserError: the cache has lost the tensors since training began.
        """
        place = part + key
        with self._lock:
            if place in self._memory:
                self._memory.move_to_end(place)
                return self._memory[place]
        if self._cached:
            tensors = self._from_disk(self._stores[part], key, compute)
        else:
            with torch.no_grad():
                tensors = compute()
        if keep:
            with self._lock:
                if place not in self._memory:
                    self._memory_bytes += _bytes(tensors)
                self._memory[place] = tensors
                while self._memory_bytes > MEMORY_BYTES:
                    self._memory_bytes -= _bytes(self._memory.popitem(last=False)[1])
        return tensors

    def _from_disk(self, store: Store, key: str, compute: Callable[[], Batch]) -> Batch:
        try:
            return store.get(key)
        except KeyError as error:
            if self.sealed:
                raise UserError(
                    "cached tensors were lost or damaged during the run",
                    where=str(store.folder),
                    remedy="resume with --resume: missing tensors are computed again",
                ) from error
        with torch.no_grad():
            store.put(key, compute())
        return store.get(key)


def _bytes(batch: Batch) -> int:
    return sum(tensor.nbytes + TENSOR_BYTES for tensor in batch.values())
