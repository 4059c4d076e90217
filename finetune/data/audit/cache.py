"""The audit's cache: inspections of images, kept between runs, so that a second start decodes nothing.

One SQLite file in the cache folder has two tables: stamp of a file → digest of its bytes, and digest → inspection of
these bytes. A stamp is a hash of path, device, inode, size, mtime and ctime. The kernel sets the ctime, so every
edit is detected. A file that was just written is not cached, since it could change again within one tick of the clock.
Without a usable cache, the audit only takes longer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
from pathlib import Path

from finetune.data.audit import inspect
from finetune.data.audit.inspect import Inspection

SETTLED_SECONDS = 2.0  # the coarsest clock of a common file system (FAT)
PENDING = 2048  # inspections written in one transaction
_TABLES = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS files (stamp BLOB PRIMARY KEY, digest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS looks (key BLOB PRIMARY KEY, found TEXT NOT NULL) WITHOUT ROWID;
"""


class AuditCache:
    """The cache of inspections.

    Args:
        folder: of the cache; created if missing.
        background: CSS color behind transparent images; inspections depend on it.
    """

    def __init__(self, folder: Path, background: str) -> None:
        import PIL

        self._settings = f"{inspect.VERSION} {PIL.__version__} {background}".encode()
        self._lock = threading.Lock()
        self._pending: list[tuple[bytes | None, bytes, str]] = []
        self._connection: sqlite3.Connection | None = None
        path = folder / "audit.sqlite"
        for attempt in range(2):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._connection = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
                self._connection.executescript(_TABLES)
                return
            except sqlite3.DatabaseError as error:
                self.close()
                if attempt == 0 and not isinstance(error, sqlite3.OperationalError):  # not a database, or damaged
                    with contextlib.suppress(OSError):
                        os.replace(path, path.with_suffix(".damaged"))
            except OSError:
                return

    def find(self, stamp: bytes | None) -> tuple[bytes, Inspection | str] | None:
        """(digest, inspection or the reason why there is none) of the file with this stamp; None if not cached."""
        row = self._one("SELECT digest FROM files WHERE stamp = ?", stamp) if stamp is not None else None
        outcome = self.find_digest(row) if isinstance(row, bytes) else None
        return (row, outcome) if isinstance(row, bytes) and outcome is not None else None

    def find_digest(self, digest: bytes) -> Inspection | str | None:
        """The inspection of the bytes with this digest, or the reason why there is none; None if not cached."""
        row = self._one("SELECT found FROM looks WHERE key = ?", self._key(digest))
        try:
            values = json.loads(row) if isinstance(row, str) else None
            if isinstance(values, str):
                return values
            return Inspection(tuple(values[0]), tuple(values[1]), bytes.fromhex(values[2])) if values else None
        except (ValueError, LookupError, TypeError):  # the row is damaged
            return None

    def keep(self, stamp: bytes | None, digest: bytes, outcome: Inspection | str) -> None:
        """Add an inspection to the cache; written to disk in batches and by `close`."""
        values = outcome if isinstance(outcome, str) else [outcome.size, outcome.traits, outcome.fingerprint.hex()]
        with self._lock:
            self._pending.append((stamp, digest, json.dumps(values)))
            if len(self._pending) >= PENDING:
                self._write()

    def close(self) -> None:
        """Write pending inspections, and close the file."""
        with self._lock:
            self._write()
            if self._connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.close()
            self._connection = None

    def _key(self, digest: bytes) -> bytes:
        return hashlib.sha256(self._settings + digest).digest()[:16]

    def _one(self, query: str, key: bytes) -> object:
        with self._lock:
            if self._connection is None:
                return None
            try:
                row = self._connection.execute(query, (key,)).fetchone()
            except sqlite3.Error:
                return None
        return row[0] if row else None

    def _write(self) -> None:
        if self._connection is not None and self._pending:
            with contextlib.suppress(sqlite3.Error):  # such as a full disk
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    files = [(stamp, digest) for stamp, digest, _ in self._pending if stamp is not None]
                    self._connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?)", files)
                    inspections = [(self._key(digest), outcome) for _, digest, outcome in self._pending]
                    self._connection.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?)", inspections)
                    self._connection.execute("COMMIT")
                except sqlite3.Error:
                    self._connection.execute("ROLLBACK")
        self._pending.clear()


def stamp_of(path: str | Path) -> bytes | None:
    """The current stamp of a file; None if it does not exist or was written moments ago."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if time.time() - max(status.st_mtime, status.st_ctime) < SETTLED_SECONDS:
        return None
    parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return hashlib.sha256(os.fsencode(os.path.abspath(path)) + b"\0" + repr(parts).encode()).digest()[:16]
