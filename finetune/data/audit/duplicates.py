"""Exact and near duplicates among images, in nearly linear time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from finetune.data.audit.inspect import FINGERPRINT_BYTES, HASH_BYTES

if TYPE_CHECKING:
    import numpy

# Two images are near duplicates if at most NEAR_BITS of their 128 hash bits differ, and no quadrant's color by more
# than NEAR_COLOR. Hashes at most 7 bits apart are equal in at least one of 8 bands of 16 bits: only those are compared.
NEAR_BITS = 7
NEAR_COLOR = 16
COMPARED = 512  # images sharing a band that each is compared with at most: bounds the work if very many are alike
BLOCK = 1 << 16  # pairs compared at once: bounds the memory


def groups(labels: numpy.ndarray) -> Iterator[list[int]]:
    """Yield groups of two or more indices into `labels` [N] with equal labels, sorted by their first index."""
    import numpy

    places = numpy.flatnonzero(numpy.bincount(labels)[labels] > 1)
    order = places[numpy.argsort(labels[places], kind="stable")]
    bounds = [*numpy.flatnonzero(numpy.diff(labels[order], prepend=-1)), len(order)]
    for start, end in sorted(itertools.pairwise(bounds), key=lambda group: int(order[group[0]])):
        yield order[start:end].tolist()


def equal(values: bytes | bytearray, size: int) -> numpy.ndarray:
    """Labels [N] int32 of N values of `size` bytes each: equal for equal values, and ordered like the values."""
    import numpy

    width = math.gcd(size, 8)
    words = numpy.frombuffer(values, f">u{width}").reshape(-1, size // width)
    order = numpy.lexsort(words.T[::-1])
    new = numpy.zeros(len(order), numpy.bool_)  # whether a value differs from the one before it
    for column in words.T:
        new[1:] |= numpy.diff(column[order]) != 0
    labels = numpy.empty(len(order), numpy.int32)
    labels[order] = numpy.cumsum(new, dtype=numpy.int32)
    return labels


def near(fingerprints: bytes | bytearray) -> numpy.ndarray:
    """Labels [N] of N fingerprints: equal for near duplicates, directly or through a chain of others."""
    import numpy

    if not fingerprints:
        return numpy.zeros(0, numpy.int32)
    same = equal(fingerprints, FINGERPRINT_BYTES)
    first = numpy.zeros(same.max() + 1, numpy.int32)  # one image for each different fingerprint
    first[same[::-1]] = numpy.arange(len(same), dtype=numpy.int32)[::-1]
    rows = numpy.frombuffer(fingerprints, numpy.uint8).reshape(-1, FINGERPRINT_BYTES)
    hashes = rows[first, :HASH_BYTES]
    labels = numpy.arange(len(first), dtype=numpy.int32)
    for band in hashes.view(numpy.uint16).T:
        for left, right in _pairs(band):
            apart = numpy.bitwise_count(hashes.view(numpy.uint64)[left] ^ hashes.view(numpy.uint64)[right]).sum(
                1, dtype=numpy.int64
            )
            left, right = left[apart <= NEAR_BITS], right[apart <= NEAR_BITS]
            colors = numpy.abs(
                rows[first[left], HASH_BYTES:].astype(numpy.int16) - rows[first[right], HASH_BYTES:]
            ).max(1, initial=0)
            _join(labels, left[colors <= NEAR_COLOR], right[colors <= NEAR_COLOR])
    roots: numpy.ndarray = _roots(labels)[same]
    return roots


def _pairs(band: numpy.ndarray) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """Yield pairs of indices with equal values in `band` [M]: at most `COMPARED` for each index, `BLOCK` at a time."""
    import numpy

    order = numpy.argsort(band, kind="stable").astype(numpy.int32)
    ends = numpy.searchsorted(band[order], band[order], side="right").astype(numpy.int32)  # end of each run of equals
    places = numpy.arange(len(order), dtype=numpy.int32)
    for distance in range(1, COMPARED + 1):
        places = places[places + distance < ends[places]]
        if not len(places):
            return
        for start in range(0, len(places), BLOCK):
            block = places[start : start + BLOCK]
            yield order[block], order[block + distance]


def _join(labels: numpy.ndarray, left: numpy.ndarray, right: numpy.ndarray) -> None:
    """Give both members of each pair the smaller of their labels, in place."""
    import numpy

    while len(left):
        ours, theirs = _roots(labels, left), _roots(labels, right)
        apart = ours != theirs
        left, right, ours, theirs = left[apart], right[apart], ours[apart], theirs[apart]
        # If several pairs change the same root, the last one wins; the others are tried again.
        labels[numpy.maximum(ours, theirs)] = numpy.minimum(ours, theirs)


def _roots(labels: numpy.ndarray, places: numpy.ndarray | None = None) -> numpy.ndarray:
    """The root of each of `places` (default: all): labels point to labels, and a root points to itself."""
    roots = labels if places is None else labels[places]
    while (roots != labels[roots]).any():
        roots = labels[roots]
    return roots
