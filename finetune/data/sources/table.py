"""`Rows`: rows of JSON values in an anonymous temporary file, so that a million take a few megabytes of memory."""

from __future__ import annotations

import json
import tempfile
import threading
import weakref
from array import array
from typing import Any, final

IN_MEMORY_BYTES = 16 << 20  # rows are kept in memory up to this size, and on disk beyond it


@final
class Rows:
    """An append-only sequence of rows. Thread-safe; can be pickled and sent to the other processes of a run."""

    def __init__(self) -> None:
        self._ends = array("Q", [0])
        self._open(b"")

    def _open(self, written: bytes) -> None:
        # Closed together with this object.
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, prefix="ft-rows-")  # noqa: SIM115
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)
        self._file.write(written)

    def __getstate__(self) -> tuple[array[int], bytes]:
        with self._lock:
            self._file.seek(0)
            return self._ends, self._file.read()

    def __setstate__(self, state: tuple[array[int], bytes]) -> None:
        self._ends, written = state
        self._open(written)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, row: list[Any]) -> None:
        """Add a row of JSON values at the end."""
        written = json.dumps(row).encode()
        with self._lock:
            self._file.seek(self._ends[-1])
            self._file.write(written)
            self._ends.append(self._ends[-1] + len(written))

    def __getitem__(self, place: int) -> Any:
        """Row number `place`, from 0."""
        start, end = self._ends[place], self._ends[place + 1]
        with self._lock:
            self._file.seek(start)
            return json.loads(self._file.read(end - start))
