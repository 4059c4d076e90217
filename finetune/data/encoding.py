"""`ExampleEncoder`: encodes examples part by part, in a pass before training or when a batch needs them."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from finetune.data.batch import Batch, Encoder, Inputs, Part
from finetune.data.cache_dir import cache_folder
from finetune.data.decoding import decode_role, to_bytes, to_floats
from finetune.data.example import Example
from finetune.data.example_store import ExampleStore
from finetune.data.prefetch import ahead
from finetune.data.sources import masks
from finetune.errors import UserError
from finetune.planning import Plan
from finetune.rng import key_of

PIXELS = "pixels"  # the cache of decoded images from streams, which have no random access

Progress = Callable[[str, int, int], None]


class ExampleEncoder:
    """Encodes examples and caches the tensors.

    Args:
        encoder: the family's encoder. Not used after `encode_all` without `share`, unless its `cached` is False.
        background: CSS color behind transparent images.
    """

    def __init__(self, plan: Plan, encoder: Encoder, background: str) -> None:
        self.encoder = encoder
        self._plan, self._background = plan, background
        self._parts = encoder.parts
        self._target = next(part for part in self._parts if "target" in part.roles)
        self._streamed = plan.recipe.data.streaming
        self._store = ExampleStore(encoder.cached)
        self._lock = threading.Lock()  # tokenizers are not thread-safe
        self.variants = (False, True) if plan.recipe.data.flip else (False,)

    # -- the encoding pass ----------------------------------------------------------------------------------------

    def encode_all(
        self, examples: Sequence[Example], masked: bool, progress: Progress | None, share: tuple[int, int] | None
    ) -> None:
        """Encode the examples that are not in the cache, one at a time, so that no result depends on other examples.

        Args:
            masked: whether there are masks to encode too.
            progress: called with (what is encoded, its number, their count).
            share: (rank, number of processes): encode only this process's share, and do not release the encoder.

        Raises:
            UserError: the cache cannot be written, or a file has changed since the audit.
        """
        cached = self.encoder.cached
        if not (cached or self._streamed):
            return
        keys = {part.key for part in self._parts} if cached else {PIXELS}
        self._store.open(cache_folder(self._plan.recipe.data.cache), keys)
        number, processes = share or (0, 1)
        mine = range(len(examples) * number // processes, len(examples) * (number + 1) // processes)
        try:
            if cached:
                for part in self._parts:
                    if part.roles == ("caption",):
                        self._encode_captions(examples, mine, part, progress)
                for part in self._parts:
                    if part.roles != ("caption",):
                        self._encode_part(examples, mine, part, progress)
            else:
                self._keep_pixels(examples, mine, progress)
            for place, mirror in itertools.product(mine if masked else (), self.variants):
                self.mask(examples[place], mirror, keep=False)
        finally:  # keep what was encoded before Ctrl-C
            self._store.flush()
        if share is None and cached:
            self.encoder.release()
            self._store.sealed = True

    def _encode_captions(
        self, examples: Sequence[Example], places: range, part: Part, progress: Progress | None
    ) -> None:
        for number, caption in enumerate(itertools.chain([""], (examples[place].caption for place in places))):
            if progress is not None:
                progress("captions", number, len(places) + 1)
            compute = functools.partial(self._encode, caption=caption)
            self._store.get(part.key, key_of(caption), compute, keep=False)

    def _encode_part(self, examples: Sequence[Example], places: range, part: Part, progress: Progress | None) -> None:
        store, dropped = self._store.on_disk(part.key), "caption" in part.roles

        def missing() -> Iterator[tuple[str, Example, bool, str]]:
            """Examples that are not in the cache, with their caption and, if the part reads it, with an empty one."""
            for number, (place, mirror) in enumerate(itertools.product(places, self.variants)):
                if progress is not None:
                    progress("images", number, len(places) * len(self.variants))
                example = examples[place]
                for caption in dict.fromkeys((example.caption, "")) if dropped else (example.caption,):
                    if (key := self._key(part, example, mirror, caption)) not in store:
                        yield key, example, mirror, caption

        def decoded(wanted: tuple[str, Example, bool, str]) -> tuple[str, Example, Inputs]:
            return wanted[0], wanted[1], self._inputs(part, *wanted[1:])

        for key, example, inputs in ahead(decoded, missing()):
            if key not in store:  # unless a copy of this example was just encoded
                with torch.no_grad():
                    store.put(key, _finite(self.encoder.encode(inputs), example))

    def _keep_pixels(self, examples: Sequence[Example], places: range, progress: Progress | None) -> None:
        store = self._store.on_disk(PIXELS)

        def missing() -> Iterator[tuple[str, Example, bool]]:
            for number, (place, mirror) in enumerate(itertools.product(places, self.variants)):
                if progress is not None:
                    progress("images", number, len(places) * len(self.variants))
                if (key := self._key(self._target, examples[place], mirror)) not in store:
                    yield key, examples[place], mirror

        for key, pixels in ahead(lambda wanted: (wanted[0], self._pixels(*wanted[1:])), missing()):
            if key not in store:
                store.put(key, {PIXELS: to_bytes(pixels)})

    # -- one example ----------------------------------------------------------------------------------------------

    def parts(self, example: Example, mirror: bool, caption: str) -> Batch:
        """The tensors of every part of an example, with `caption` as its text."""
        tensors: Batch = {}
        for part in self._parts:
            if not part.key:
                continue

            def compute(part: Part = part) -> Batch:
                inputs = self._inputs(part, example, mirror, caption)
                with self._lock:
                    encoded = self.encoder.encode(inputs)
                return encoded if part.roles == ("caption",) else _finite(encoded, example)

            tensors |= self._store.get(part.key, self._key(part, example, mirror, caption), compute)
        return tensors

    def mask(self, example: Example, mirror: bool, keep: bool = True) -> Batch:
        """Loss weight of each position, [1, h, w] float32: the mean of the mask over the pixels of the position."""
        factor, outside = self.encoder.mask_factor or 1, self._plan.recipe.data.unmasked_weight
        asset = example.others.get("mask")

        def compute() -> Batch:
            shape = example.crop.shape
            if asset is None:
                return {"mask": torch.ones(1, shape.height // factor, shape.width // factor)}
            weights = torch.from_numpy(masks.read(example, mirror))
            return {"mask": outside + (1 - outside) * torch.nn.functional.avg_pool2d(weights[None], factor)}

        digest = asset.digest if asset is not None else ""
        key = key_of("mask", digest, example.crop.key, int(mirror), f"{outside} {factor}")
        return self._store.get(self._target.key, key, compute, keep)

    def _encode(self, **inputs: Tensor | str) -> Batch:
        with self._lock:
            return self.encoder.encode(inputs)

    def _key(self, part: Part, example: Example, mirror: bool, caption: str = "") -> str:
        """Cache key of a part. Keys of images and captions alone are the same as in version 0.1."""
        if part.roles == ("caption",):
            return key_of(caption)
        place = (example.crop.key, int(mirror), self._background)
        if part.roles == ("target",):
            return key_of(example.digest, *place)
        assets = example.assets
        contents = [
            f"{role}:{caption if role == 'caption' else assets[role].digest if role in assets else ''}"
            for role in part.roles
        ]
        return key_of("part", *contents, *place)

    def _inputs(self, part: Part, example: Example, mirror: bool, caption: str) -> Inputs:
        """The decoded roles of a part, without optional roles that the example does not have."""
        assets = example.assets
        return {
            role: caption if role == "caption" else self._decoded(example, role, mirror)
            for role in part.roles
            if role in assets
        }

    def _decoded(self, example: Example, role: str, mirror: bool) -> Tensor:
        if role != "target" or self.encoder.cached or not self._streamed:
            return decode_role(example, role, self._background, mirror)
        key, store = self._key(self._target, example, mirror), self._store.on_disk(PIXELS)
        return to_floats(store.get(key)[PIXELS]) if key in store else self._pixels(example, mirror)

    def _pixels(self, example: Example, mirror: bool) -> Tensor:
        return decode_role(example, "target", self._background, mirror)


def _finite(encoded: Batch, example: Example) -> Batch:
    """Return the tensors if they are finite, else raise: NaN in the cache would stop every run that uses it."""
    for name, tensor in encoded.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"the VAE encodes this image to non-finite {name}",
                where=example.name,
                remedy="the VAE's weights are damaged or do not fit the model: set another model.vae",
            )
    return encoded
