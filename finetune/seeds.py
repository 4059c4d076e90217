"""Seeds and keys derived from names and numbers."""

from __future__ import annotations

import hashlib


def mix(*parts: int | str) -> int:
    """A 63-bit seed that is a function of `parts` alone: the same on every machine, unrelated for unequal parts."""
    return int(key_of(*parts)[:16], 16) >> 1


def key_of(*parts: int | str) -> str:
    """A content address: the SHA-256 of `parts`, in hexadecimal."""
    return hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode()).hexdigest()
