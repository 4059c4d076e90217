"""SHA-256 of large files, computed once: a digest is kept in the cache until the file changes. Torch-free."""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path

from finetune.data.audit.cache import stamp_of
from finetune.data.sources.files import write_aside

_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256_of(path: Path, cache: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    The cache key is a hash of path, device, inode, size, mtime and ctime. The kernel sets the ctime, so every edit
    changes the key. Files of the Hugging Face cache that are named by their SHA-256 are not read.

    Args:
        path: the file.
        cache: the project's cache folder; digests are kept in its subfolder `digests/`.

    Raises:
        OSError: the file cannot be read.
    """
    path = path.resolve()
    if path.parent.name == "blobs" and _SHA256.fullmatch(path.name):
        return path.name
    stamp = stamp_of(path)
    kept = cache / "digests" / stamp.hex() if stamp is not None else None
    if kept is not None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            known = kept.read_text(encoding="ascii")
            if _SHA256.fullmatch(known):
                return known
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if kept is not None and stamp == stamp_of(path):
        with contextlib.suppress(OSError):  # a full disk, or a cache that cannot be written
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_aside(kept, found.encode())
    return found
