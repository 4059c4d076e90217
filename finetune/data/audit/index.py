"""`Index`: all examples of an audit, as a sequence that takes tens of megabytes of memory for a million examples."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from abc import abstractmethod
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final, overload

from finetune.data.audit import duplicates
from finetune.data.buckets import Crop
from finetune.data.example import Asset, Example
from finetune.data.sources.table import Rows

if TYPE_CHECKING:
    import numpy

DIGEST_BYTES = hashlib.sha256().digest_size


_FIELDS = tuple(f.name for f in dataclasses.fields(Example) if f.name != "others")


def held_out_of(share: float, different: int) -> int:
    """How many of `different` images are held out: at least one, and at least one trains."""
    return min(max(1, round(share * different)), different - 1) if share and different else 0


class Images(Sequence[Example]):
    """A sequence whose slices are tuples."""

    @abstractmethod
    def image(self, place: int) -> Example:
        """Image number `place`, from 0."""

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, place: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(place, slice):
            return tuple(self.image(number) for number in range(len(self))[place])
        return self.image(range(len(self))[place])


@final
class Index(Images):
    """The examples of an audit, on disk. Values needed for all of them at once are kept in arrays in memory.

    It can be pickled and sent to the other processes of a run.
    """

    def __init__(self) -> None:
        self._rows = Rows()
        self._shared: list[Any] = []  # crops and functions that several images have in common
        self._place_of: dict[Any, int] = {}
        self._crops, self._repeats = array("I"), array("I")
        self._digests = bytearray()
        self._held_out = bytearray()

    def append(self, image: Example) -> None:
        """Add an image at the end."""
        others = [[role, a.medium, a.digest, self._plain(a.read)] for role, a in image.others.items()]
        self._rows.append([*(self._plain(getattr(image, name)) for name in _FIELDS), others])
        self._crops.append(self._place(image.crop))
        self._repeats.append(image.repeats)
        self._digests += bytes.fromhex(image.digest)
        self._held_out.append(image.held_out)

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, place: int) -> Example:
        """Image number `place`, from 0, created from its row."""
        *row, others = self._rows[place]
        values: dict[str, Any] = {name: self._rich(value) for name, value in zip(_FIELDS, row, strict=True)}
        assets = {role: Asset(medium, digest, self._read(read)) for role, medium, digest, read in others}
        return Example(**values | {"held_out": bool(self._held_out[place]), "others": assets})

    def hold_out(self, share: float) -> None:
        """Hold out `share` of the images: those with the smallest digests, regardless of names and order.

        At least one image is held out, and one is left for training. Copies of an image stay together.
        """
        if not share or not len(self):
            return
        ranks = self.copies()
        different = int(ranks.max()) + 1
        self._held_out[:] = (ranks < held_out_of(share, different)).tobytes()

    def part(self, held_out: bool) -> Part:
        """The held-out images, or the training images."""
        import numpy

        return Part(self, numpy.flatnonzero(self.held_out == held_out))

    @property
    def held_out(self) -> numpy.ndarray:
        """Whether each image is held out, [N] bool."""
        import numpy

        return numpy.array(self._held_out, numpy.bool_)

    @property
    def crops(self) -> dict[Crop, numpy.ndarray]:
        """Crop → the indices of its images."""
        import numpy

        numbers = numpy.frombuffer(self._crops, numpy.uint32)
        order = numpy.argsort(numbers, kind="stable")
        used, starts = numpy.unique(numbers[order], return_index=True)
        ends = [*starts, len(order)][1:]
        return {self._shared[number]: order[start:end] for number, start, end in zip(used, starts, ends, strict=True)}

    @property
    def repeats(self) -> numpy.ndarray:
        """Repeats of each image, [N] uint32."""
        import numpy

        return numpy.frombuffer(self._repeats, numpy.uint32)

    def copies(self) -> numpy.ndarray:
        """Labels [N] int32: equal for images with the same bytes, and ordered like their digests."""
        return duplicates.equal(self._digests, DIGEST_BYTES)

    def _plain(self, value: object) -> object:
        """The JSON form: scalars unchanged, other values as [index in `_shared`], partials followed by arguments."""
        if value is None or isinstance(value, str | int | float):
            return value
        if (
            isinstance(value, functools.partial)
            and not value.keywords
            and all(isinstance(a, str | int) for a in value.args)
        ):
            return [self._place(value.func), *value.args]
        return [self._place(value)]

    def _rich(self, value: Any) -> object:
        if not isinstance(value, list):
            return value
        shared = self._shared[value[0]]
        return functools.partial(shared, *value[1:]) if len(value) > 1 else shared

    def _read(self, value: Any) -> Callable[[], bytes]:
        function: Callable[[], bytes] = self._rich(value)  # type: ignore[assignment]
        return function

    def _place(self, value: Any) -> int:
        place = self._place_of.setdefault(value, len(self._shared))
        if place == len(self._shared):
            self._shared.append(value)
        return place


@final
class Part(Images):
    """Some images of an index.

    Attributes:
        places: their indices in it, [N].
    """

    def __init__(self, index: Index, places: numpy.ndarray) -> None:
        self._index, self.places = index, places

    def __len__(self) -> int:
        return len(self.places)

    def image(self, place: int) -> Example:
        """Image number `place` of the part, from 0."""
        return self._index.image(int(self.places[place]))
