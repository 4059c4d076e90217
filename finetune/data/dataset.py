"""What the loop draws from: the encoded images and captions of an audit, by step and place in the global batch."""

from __future__ import annotations

import functools
import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy
import torch
from torch import Tensor

from finetune.data.audit.audit import Audit, ImageRecord
from finetune.data.batch import Batch, Encoder, stack
from finetune.data.buckets import Crop
from finetune.data.cache_dir import cache_folder
from finetune.data.latent_cache import Store
from finetune.data.media.image import apply, decode
from finetune.data.prefetch import ahead, threads
from finetune.data.sampler import Order
from finetune.data.sources import masks
from finetune.errors import UserError
from finetune.planning import Plan
from finetune.rng import Draw, key_of, mix

AHEAD_STEPS = threads() + 1  # batches got ready while a step computes
PIXELS = "pixels"  # the store of images as they are, of sources that cannot be asked again and again
TENSOR_BYTES = 1024  # of memory, that a tensor takes besides its elements
MEMORY_BYTES = 2 << 30  # tensors kept in memory; what does not fit is read again from the cache, or decoded again

Progress = Callable[[str, int, int], None]


class Dataset:
    """The images of one split, encoded.

    Args:
        plan: for the order, seeds and cache.
        audit: what to encode.
        encoder: the family's; not used any more once `encode` has returned, unless it says `cached = False`.
    """

    def __init__(self, plan: Plan, audit: Audit, encoder: Encoder) -> None:
        self.plan, self.encoder = plan, encoder
        self.background = audit.background
        keys = {part.roles: part.key for part in encoder.parts}
        self._image_key_of_encoder, self._caption_key = keys["target",], keys.get(("caption",), "")
        self.images = audit.images
        self._weighted = plan.recipe.prior is not None or any(source.weight != 1 for source in plan.recipe.data.sources)
        self._masked = plan.recipe.data.masks is not None
        if self._masked and encoder.mask_factor is None:
            raise UserError(
                "the loss of this family has no places that a mask could weigh",
                where="data.masks",
                remedy="remove data.masks",
            )
        self._variants = (False, True) if plan.recipe.data.flip else (False,)
        self.order = Order(_examples_by_bucket(audit), plan.global_batch, plan.steps, plan.recipe.train.seed)
        self._validation = numpy.flatnonzero(self.images.held_out).tolist()
        self._stores: dict[str, Store] = {}
        self._memory: OrderedDict[str, Batch] = OrderedDict()
        self._memory_bytes = 0
        self._memory_lock = threading.Lock()
        self._encoder_lock = threading.Lock()  # tokenizers do not bear two callers at once
        self._released = False
        self._streamed = plan.recipe.data.streaming
        self._coming: dict[tuple[int, tuple[int, ...]], Future[Batch]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def long_captions(self) -> str:
        """Which captions are longer than the model reads, in one sentence that names images; "" if none is.

        Raises:
            UserError: some are, and `data.long_captions` is stop.
        """
        tokens = functools.lru_cache(1024)(self.encoder.caption_tokens)
        count, longest, named = 0, 0, list[str]()
        for image in self.images:
            found = tokens(image.caption)
            if found is None:
                return ""
            if found[0] > found[1]:
                count, longest = count + 1, found[1]
                named += [f"{image.name}: {found[0]} tokens"] if count <= 5 else []
        if not count:
            return ""
        names = ", ".join(named) + (f", and {count - 5} more" if count > 5 else "")
        said = f"captions longer than the {longest} tokens that this model reads: {count} of {len(self.images)}"
        if self.plan.recipe.data.long_captions == "truncate":
            return f"{said}, their ends are not read ({names})"
        raise UserError(said, where=names, remedy="shorten them, or set data.long_captions: truncate")

    def encode(self, progress: Progress | None = None, share: tuple[int, int] | None = None) -> None:
        """Compute what the cache lacks. Each image and caption is encoded alone, so that nothing depends on its company.

        Args:
            progress: called with (what, number of it, of how many).
            share: (this process's number, processes): only its share of what is lacking, and the encoder is kept.

        Raises:
            UserError: the cache cannot be written, or an image has changed since the audit.
        """
        if not (self.encoder.cached or self._streamed):
            return
        # Opened anew: a process that waited finds what others wrote.
        folder = cache_folder(self.plan.recipe.data.cache)
        keys = {part.key for part in self.encoder.parts} if self.encoder.cached else {PIXELS}
        self._stores = {key: Store(folder / key_of(key)[:24]) for key in keys if key}
        number, processes = share or (0, 1)
        mine = range(len(self.images) * number // processes, len(self.images) * (number + 1) // processes)
        try:
            if self.encoder.cached:
                self._encode_captions(mine, progress)
            self._encode_images(mine, progress)
            for place, mirrored in itertools.product(mine if self._masked else (), self._variants):
                self._mask(self.images[place], mirrored, keep=False)
        finally:  # what was encoded before Ctrl-C is kept too
            for store in self._stores.values():
                store.flush()
        if share is None and self.encoder.cached:
            self.encoder.release()
            self._released = True

    def _encode_captions(self, places: range, progress: Progress | None) -> None:
        for number, caption in enumerate(itertools.chain([""], (self.images[place].caption for place in places))):
            if progress is not None:
                progress("captions", number, len(places) + 1)
            self._caption(caption, keep=False)

    def _encode_images(self, places: range, progress: Progress | None) -> None:
        store = self._stores[self._image_key_of_encoder if self.encoder.cached else PIXELS]

        def lacking() -> Iterator[tuple[str, ImageRecord, bool]]:
            for number, (place, mirrored) in enumerate(itertools.product(places, self._variants)):
                if progress is not None:
                    progress("images", number, len(places) * len(self._variants))
                image = self.images[place]
                if (key := self._image_key(image, mirrored)) not in store:
                    yield key, image, mirrored

        for key, image, pixels in ahead(lambda wanted: (*wanted[:2], self._pixels(*wanted[1:])), lacking()):
            if key not in store:  # a copy of an image just encoded is
                with torch.no_grad():
                    kept = (
                        _finite(self.encoder.encode({"target": pixels}), image)
                        if self.encoder.cached
                        else {PIXELS: to_bytes(pixels)}
                    )
                store.put(key, kept)

    @property
    def has_validation(self) -> bool:
        """Whether images are held out to validate on."""
        return len(self._validation) > 0

    def names(self, step: int) -> list[str]:
        """The images of a step, for messages."""
        return [self.images[index].name for index in self.order.batch(step)]

    def batch(self, step: int, places: Sequence[int], draw: Draw) -> Batch:
        """The examples at `places` of the global batch of `step`, stacked: [B, …] each.

        What is asked of one step will be asked of the next: threads get it ready meanwhile.
        """
        self._coming = {wanted: future for wanted, future in self._coming.items() if wanted[0] >= step}
        self._pool = self._pool or ThreadPoolExecutor(threads(), thread_name_prefix="ft-data")
        for later in range(step + 1, min(step + 1 + AHEAD_STEPS, self.plan.steps)):
            if (later, tuple(places)) not in self._coming:
                self._coming[later, tuple(places)] = self._pool.submit(
                    self._batch, later, tuple(places), draw.of_step(later)
                )
        ready = self._coming.get((step, tuple(places)))
        return ready.result() if ready is not None else self._batch(step, places, draw)

    def _batch(self, step: int, places: Sequence[int], draw: Draw) -> Batch:
        order = self.order.batch(step)
        return self._examples([order[place] for place in places], draw, self.plan.recipe.data.caption_dropout)

    def validation(self) -> list[tuple[Batch, Draw]]:
        """The held-out images, one a batch, with draws that are the same at every validation."""
        seed = self.plan.recipe.train.seed
        found = []
        for place, index in enumerate(self._validation):
            draw = Draw(mix(seed, "validation"), 0, [place], self.plan.machine.device)
            found.append((self._examples([index], draw, 0.0), draw))
        return found

    def _examples(self, indices: Sequence[int], draw: Draw, dropout: float) -> Batch:
        variants = draw.integers("variant", len(self._variants)).tolist()
        dropped = (draw.uniform("caption dropout") < dropout).tolist()
        found = []
        for index, variant, drop in zip(indices, variants, dropped, strict=True):
            image = self.images[index]
            found.append(
                {
                    **self._image(image, self._variants[variant]),
                    **self._caption("" if drop else image.caption),
                    "geometry": geometry(image.crop),
                    **({"weight": torch.tensor(image.weight)} if self._weighted else {}),
                    **(self._mask(image, self._variants[variant]) if self._masked else {}),
                }
            )
        return stack(found)

    def _image_key(self, image: ImageRecord, mirrored: bool) -> str:
        return key_of(image.digest, image.crop.key, int(mirrored), self.background)

    def _pixels(self, image: ImageRecord, mirrored: bool) -> Tensor:
        """What the model sees of an image, [3, H, W] float32 in [-1, 1]."""
        pixels = apply(decode(_unchanged(image), self.background), replace(image.crop, mirrored=mirrored))
        return to_tensor(numpy.asarray(pixels))

    def _image(self, image: ImageRecord, mirrored: bool) -> Batch:
        def compute() -> Batch:
            key = self._image_key(image, mirrored)
            kept = not self.encoder.cached and self._streamed and key in self._stores[PIXELS]
            pixels = to_floats(self._stores[PIXELS].get(key)[PIXELS]) if kept else self._pixels(image, mirrored)
            with self._encoder_lock:
                return _finite(self.encoder.encode({"target": pixels}), image)

        return self._kept(self._image_key_of_encoder, self._image_key(image, mirrored), compute)

    def _mask(self, image: ImageRecord, mirrored: bool, keep: bool = True) -> Batch:
        """Where the loss of an image counts and how much, [1, h, w] float32: the mask's mean over each place that has a loss."""
        factor, outside = self.encoder.mask_factor or 1, self.plan.recipe.data.unmasked_weight

        def compute() -> Batch:
            bucket = image.crop.shape
            if image.mask is None:
                return {"mask": torch.ones(1, bucket.height // factor, bucket.width // factor)}
            seen = torch.from_numpy(masks.read(image, mirrored))
            return {"mask": outside + (1 - outside) * torch.nn.functional.avg_pool2d(seen[None], factor)}

        key = key_of("mask", image.mask_digest, image.crop.key, int(mirrored), f"{outside} {factor}")
        return self._kept(self._image_key_of_encoder, key, compute, keep)

    def _caption(self, caption: str, keep: bool = True) -> Batch:
        def compute() -> Batch:
            with self._encoder_lock:
                return self.encoder.encode({"caption": caption})

        return self._kept(self._caption_key, key_of(caption), compute, keep) if self._caption_key else {}

    def _kept(self, encoder: str, key: str, compute: Callable[[], Batch], keep: bool = True) -> Batch:
        """From memory, else from the cache, else computed; kept in both.

        Raises:
            UserError: the cache has lost it since training began.
        """
        place = encoder + key
        with self._memory_lock:
            if place in self._memory:
                self._memory.move_to_end(place)
                return self._memory[place]
        if self.encoder.cached:
            found = self._from_cache(self._stores[encoder], key, compute)
        else:
            with torch.no_grad():
                found = compute()
        if keep:
            with self._memory_lock:
                if place not in self._memory:
                    self._memory_bytes += _bytes(found)
                self._memory[place] = found
                while self._memory_bytes > MEMORY_BYTES:
                    self._memory_bytes -= _bytes(self._memory.popitem(last=False)[1])
        return found

    def _from_cache(self, store: Store, key: str, compute: Callable[[], Batch]) -> Batch:
        try:
            return store.get(key)
        except KeyError as error:
            if self._released:
                raise UserError(
                    "a part of the cache was lost or damaged while the run used it",
                    where=str(store.folder),
                    remedy="go on with --resume: what is lacking is computed again",
                ) from error
        with torch.no_grad():
            store.put(key, compute())
        return store.get(key)


def _examples_by_bucket(audit: Audit) -> list[numpy.ndarray]:
    """For each bucket, by its first image, the places in `audit.images` of its examples: images that train, repeated."""
    trains, repeats = ~audit.images.held_out, audit.images.repeats
    found: dict[object, list[numpy.ndarray]] = {}
    for crop, places in audit.images.crops.items():
        found.setdefault(crop.shape, []).append(places[trains[places]])
    buckets = [numpy.sort(numpy.concatenate(parts)) for parts in found.values()]
    return [
        numpy.repeat(bucket, repeats[bucket])
        for bucket in sorted((b for b in buckets if len(b)), key=lambda b: int(b[0]))
    ]


def _finite(encoded: Batch, image: ImageRecord) -> Batch:
    """What an encoder made of an image: a NaN would be kept in the cache, and would stop every run that draws it."""
    for name, tensor in encoded.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"the VAE makes {name} of the image that are not finite",
                where=image.name,
                remedy="the VAE's weights are damaged or not made for this: give another model.vae; nothing of this image was kept",
            )
    return encoded


def _unchanged(image: ImageRecord) -> bytes:
    """The bytes that the audit saw: others would be kept in the cache under a digest that is not theirs."""
    try:
        content = image.read()
    except OSError as error:
        raise UserError(
            f"the image cannot be read any more: {error.strerror}",
            where=image.name,
            remedy="put it back, and start again",
        ) from error
    if hashlib.sha256(content).hexdigest() != image.digest:
        raise UserError(
            "the image has changed since the run began",
            where=image.name,
            remedy="start again; this run did not see the new one",
        )
    return content


def to_tensor(pixels: numpy.ndarray) -> Tensor:
    """[H, W, 3] uint8 → [3, H, W] float32 in [-1, 1]."""
    return to_floats(torch.from_numpy(pixels.copy()).permute(2, 0, 1))


def to_floats(pixels: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """The uint8 that `to_floats` makes these of."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8)


def geometry(crop: Crop) -> Tensor:
    """SDXL's size conditions, [6] float32: original height and width, crop's top and left, target height and width.

    All in pixels (Podell et al. 2023, arXiv:2307.01952, §2.2); the crop's corner is measured after scaling.
    """
    width, height = crop.original
    return torch.tensor([height, width, crop.top, crop.left, crop.shape.height, crop.shape.width], dtype=torch.float32)


def _bytes(batch: Batch) -> int:
    return sum(tensor.nbytes + TENSOR_BYTES for tensor in batch.values())
