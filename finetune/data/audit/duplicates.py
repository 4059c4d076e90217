"""Images that are there more than once: the same bytes, or nearly the same image. Near linear in their number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from finetune.data.audit.inspect import FINGERPRINT_BYTES, HASH_BYTES

if TYPE_CHECKING:
    import numpy

# Two images are near when their hashes differ in at most so many of 128 bits and no quarter's color by more.
# With 8 bands of 16 bits, hashes at most 7 bits apart are equal in at least one band: so only those are compared.
NEAR_BITS = 7
NEAR_COLOR = 16
COMPARED = 512  # with at most so many that share a band: bounds the work where very many images resemble each other
BLOCK = 1 << 16  # pairs compared at once: bounds the memory


def groups(labels: numpy.ndarray) -> Iterator[list[int]]:
    """Places in `labels` [N] that hold the same number, each group of two or more; by their first place."""
    import numpy

    places = numpy.flatnonzero(numpy.bincount(labels)[labels] > 1)
    order = places[numpy.argsort(labels[places], kind="stable")]
    bounds = [*numpy.flatnonzero(numpy.diff(labels[order], prepend=-1)), len(order)]
    for start, end in sorted(itertools.pairwise(bounds), key=lambda group: int(order[group[0]])):
        yield order[start:end].tolist()


def equal(values: bytes | bytearray, size: int) -> numpy.ndarray:
    """Labels [N] int32 of N values of `size` bytes each: equal exactly for equal values, and in their order."""
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
    """Labels [N] of N fingerprints: equal for those that are near each other, directly or by others between them."""
    import numpy

    if not fingerprints:
        return numpy.zeros(0, numpy.int32)
    same = equal(fingerprints, FINGERPRINT_BYTES)
    first = numpy.zeros(same.max() + 1, numpy.int32)
    first[same[::-1]] = numpy.arange(len(same), dtype=numpy.int32)[
        ::-1
    ]  # one image for each fingerprint: copies add nothing
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
    found: numpy.ndarray = _roots(labels)[same]
    return found


def _pairs(band: numpy.ndarray) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """Yield pairs of places with equal values in `band` [M], at most `COMPARED` for each place, `BLOCK` pairs at a time."""
    import numpy

    order = numpy.argsort(band, kind="stable").astype(numpy.int32)
    ends = numpy.searchsorted(band[order], band[order], side="right").astype(
        numpy.int32
    )  # where the run of equals ends, for each place
    places = numpy.arange(len(order), dtype=numpy.int32)
    for distance in range(1, COMPARED + 1):
        places = places[places + distance < ends[places]]
        if not len(places):
            return
        for start in range(0, len(places), BLOCK):
            block = places[start : start + BLOCK]
            yield order[block], order[block + distance]


def _join(labels: numpy.ndarray, left: numpy.ndarray, right: numpy.ndarray) -> None:
    """Give each pair one label, the smaller; in place."""
    import numpy

    while len(left):
        ours, theirs = _roots(labels, left), _roots(labels, right)
        apart = ours != theirs
        left, right, ours, theirs = left[apart], right[apart], ours[apart], theirs[apart]
        # Of several that want the same root changed, the last wins here; the others are tried again.
        labels[numpy.maximum(ours, theirs)] = numpy.minimum(ours, theirs)


def _roots(labels: numpy.ndarray, places: numpy.ndarray | None = None) -> numpy.ndarray:
    """The root of each of `places` (default: all): labels point at labels until one points at itself."""
    found = labels if places is None else labels[places]
    while (found != labels[found]).any():
        found = labels[found]
    return found
