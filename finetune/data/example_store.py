"""`ExampleStore`: encoded tensors in memory and in the cache on disk, computed when neither has them."""

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
MEMORY_BYTES = 2 << 30  # tensors kept in memory; others are read again from the cache, or computed again


class ExampleStore:
    """Tensors by (part, key). A part is what its tensors depend on besides the example: an encoder's weights, precision.

    Threads may share it.

    Args:
        cached: whether tensors are kept on disk as well.
    """

    def __init__(self, cached: bool) -> None:
        self._cached = cached
        self._stores: dict[str, Store] = {}
        self._memory: OrderedDict[str, Batch] = OrderedDict()
        self._memory_bytes = 0
        self._lock = threading.Lock()
        self.sealed = False  # whether nothing can be computed any more: the encoder is released

    def open(self, folder: Path, parts: Collection[str]) -> None:
        """Open the parts' folders in the cache, also those that other processes have written to meanwhile.

        Raises:
            UserError: the cache cannot be read or written.
        """
        self._stores = {part: Store(folder / key_of(part)[:24]) for part in parts if part}

    def on_disk(self, part: str) -> Store:
        """The part's store on disk."""
        return self._stores[part]

    def flush(self) -> None:
        """Write what is pending."""
        for store in self._stores.values():
            store.flush()

    def get(self, part: str, key: str, compute: Callable[[], Batch], keep: bool = True) -> Batch:
        """From memory, else from the cache, else computed and stored in both (in memory only if `keep`).

        Raises:
            UserError: the cache has lost it since training began.
        """
        place = part + key
        with self._lock:
            if place in self._memory:
                self._memory.move_to_end(place)
                return self._memory[place]
        if self._cached:
            found = self._from_disk(self._stores[part], key, compute)
        else:
            with torch.no_grad():
                found = compute()
        if keep:
            with self._lock:
                if place not in self._memory:
                    self._memory_bytes += _bytes(found)
                self._memory[place] = found
                while self._memory_bytes > MEMORY_BYTES:
                    self._memory_bytes -= _bytes(self._memory.popitem(last=False)[1])
        return found

    def _from_disk(self, store: Store, key: str, compute: Callable[[], Batch]) -> Batch:
        try:
            return store.get(key)
        except KeyError as error:
            if self.sealed:
                raise UserError(
                    "a part of the cache was lost or damaged while the run used it",
                    where=str(store.folder),
                    remedy="resume with --resume: what is missing is computed again",
                ) from error
        with torch.no_grad():
            store.put(key, compute())
        return store.get(key)


def _bytes(batch: Batch) -> int:
    return sum(tensor.nbytes + TENSOR_BYTES for tensor in batch.values())
