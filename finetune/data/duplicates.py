"""Pictures that are there more than once: the same bytes, or nearly the same picture. Near linear in their number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from finetune.data.looks import FINGERPRINT_BYTES, HASH_BYTES

if TYPE_CHECKING:
    import numpy

# Two pictures are near when their hashes differ in at most so many of 128 bits and no quarter's colour by more.
# With 8 bands of 16 bits, hashes at most 7 bits apart are equal in at least one band: so only those are compared.
NEAR_BITS = 7
NEAR_COLOUR = 16
COMPARED = 512  # with at most so many that share a band: bounds the work where very many pictures resemble each other


def groups(labels: numpy.ndarray) -> Iterator[list[int]]:
    """Places in `labels` [N] that hold the same number, each group of two or more; by their first place."""
    import numpy

    order = numpy.argsort(labels, kind="stable")
    starts = numpy.flatnonzero(numpy.r_[True, numpy.diff(labels[order]) != 0])
    ends = numpy.r_[starts[1:], len(labels)]
    several = [(int(order[start]), start, end) for start, end in zip(starts, ends, strict=True) if end - start > 1]
    for _, start, end in sorted(several):
        yield order[start:end].tolist()


def equal(values: bytes, size: int) -> numpy.ndarray:
    """Labels [N] of N values of `size` bytes each: equal exactly for equal values."""
    import numpy

    if not values:
        return numpy.zeros(0, numpy.int64)
    labels: numpy.ndarray = numpy.unique(numpy.frombuffer(values, f"V{size}"), return_inverse=True)[1]
    return labels


def near(fingerprints: bytes) -> numpy.ndarray:
    """Labels [N] of N fingerprints: equal for those that are near each other, directly or by others between them."""
    import numpy

    if not fingerprints:
        return numpy.zeros(0, numpy.int64)
    same = equal(fingerprints, FINGERPRINT_BYTES)
    first = numpy.zeros(same.max() + 1, numpy.int64)
    first[same[::-1]] = numpy.arange(len(same))[::-1]  # one picture for each fingerprint: copies add nothing
    rows = numpy.frombuffer(fingerprints, numpy.uint8).reshape(-1, FINGERPRINT_BYTES)[first]
    hashes = numpy.ascontiguousarray(rows[:, :HASH_BYTES])
    labels = numpy.arange(len(first))
    for band in hashes.view(numpy.uint16).T:
        for left, right in _pairs(band):
            apart = numpy.bitwise_count(hashes.view(numpy.uint64)[left] ^ hashes.view(numpy.uint64)[right]).sum(1, dtype=numpy.int64)
            left, right = left[apart <= NEAR_BITS], right[apart <= NEAR_BITS]
            colours = numpy.abs(rows[left, HASH_BYTES:].astype(numpy.int16) - rows[right, HASH_BYTES:]).max(1, initial=0)
            _join(labels, left[colours <= NEAR_COLOUR], right[colours <= NEAR_COLOUR])
    found: numpy.ndarray = _roots(labels)[same]
    return found


def _pairs(band: numpy.ndarray) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """Pairs of places whose values in `band` [M] are equal, each place with at most `COMPARED` others."""
    import numpy

    order = numpy.argsort(band, kind="stable")
    ends = numpy.searchsorted(band[order], band[order], side="right")  # where the run of equals ends, for each place
    places = numpy.arange(len(order))
    for distance in range(1, COMPARED + 1):
        places = places[places + distance < ends[places]]
        if not len(places):
            return
        yield order[places], order[places + distance]


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
    """The label that stands for each of `places` (all, if not given): labels point at labels until one points at itself."""
    found = labels if places is None else labels[places]
    while (found != labels[found]).any():
        found = labels[found]
    return found
