"""What the loop draws from: the encoded pictures and captions of an audit, by step and place in the global batch."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy
import torch
from torch import Tensor

from finetune.data.cache import Store
from finetune.data.order import Order
from finetune.data.pictures import Crop, apply, decode
from finetune.data.places import cache_folder
from finetune.data.scan import Audit, Picture
from finetune.engine.draw import Draw
from finetune.errors import UserError
from finetune.models.turn import Batch, Encoders, stack
from finetune.planning import Plan
from finetune.seeds import key_of, mix

MEMORY_BYTES = 2 << 30  # tensors kept in memory; what does not fit is read again from the cache, or decoded again

Progress = Callable[[str, int, int], None]


class Dataset:
    """The pictures of one split, encoded.

    Args:
        plan: for the order, seeds and cache.
        audit: what to encode.
        encoders: the family's; not used any more once `encode` has returned, unless it says `cached = False`.
    """

    def __init__(self, plan: Plan, audit: Audit, encoders: Encoders) -> None:
        self.plan, self.encoders = plan, encoders
        self.background = audit.background
        self.pictures = audit.training + audit.held_out
        self._variants = (False, True) if plan.recipe.data.flip else (False,)
        examples: dict[object, list[int]] = {}
        for index, picture in enumerate(audit.training):
            examples.setdefault(picture.crop.bucket, []).extend([index] * picture.repeats)
        self.order = Order(list(examples.values()), plan.global_batch, plan.steps, plan.recipe.train.seed)
        self._validation = range(len(audit.training), len(self.pictures))
        self._stores: dict[str, Store] = {}
        self._memory: OrderedDict[str, Batch] = OrderedDict()
        self._memory_bytes = 0

    def long_captions(self) -> str:
        """Which captions are longer than the model reads, in one sentence that names pictures; "" if none is.

        Raises:
            UserError: some are, and `data.long_captions` is stop.
        """
        tokens = {caption: self.encoders.caption_tokens(caption) for caption in sorted({p.caption for p in self.pictures})}
        counts = [(p.name, found) for p in self.pictures if (found := tokens[p.caption]) is not None and found[0] > found[1]]
        if not counts:
            return ""
        named = ", ".join(f"{name}: {count} tokens" for name, (count, _) in counts[:5]) + (f", and {len(counts) - 5} more" if len(counts) > 5 else "")
        said = f"captions longer than the {counts[0][1][1]} tokens that this model reads: {len(counts)} of {len(self.pictures)}"
        if self.plan.recipe.data.long_captions == "truncate":
            return f"{said}, their ends are not read ({named})"
        raise UserError(said, where=named, remedy="shorten them, or set data.long_captions: truncate")

    def encode(self, progress: Progress | None = None) -> None:
        """Compute what the cache lacks. Each picture and caption is encoded alone, so that nothing depends on its company.

        Raises:
            UserError: the cache cannot be written, or a picture has changed since the audit.
        """
        if self.encoders.cached:
            # Only now: a process that waited for the first one to encode finds what that one wrote.
            folder = cache_folder(self.plan.recipe.data.cache)
            self._stores = {key: Store(folder / key_of(key)[:24]) for key in {self.encoders.picture_key, self.encoders.caption_key} if key}
        try:
            captions = sorted({"", *(p.caption for p in self.pictures)})
            for number, caption in enumerate(captions):
                if progress is not None:
                    progress("captions", number, len(captions))
                self._caption(caption)
            wanted = [(p, mirrored) for p in self.pictures for mirrored in self._variants] if self.encoders.cached else []
            for number, (picture, mirrored) in enumerate(wanted):
                if progress is not None:
                    progress("pictures", number, len(wanted))
                self._picture(picture, mirrored)
        finally:  # what was encoded before Ctrl-C is kept too
            for store in self._stores.values():
                store.flush()
        if self.encoders.cached:
            self.encoders.release()

    @property
    def has_validation(self) -> bool:
        return len(self._validation) > 0

    def names(self, step: int) -> list[str]:
        """The pictures of a step, for messages."""
        return [self.pictures[index].name for index in self.order.batch(step)]

    def batch(self, step: int, places: Sequence[int], draw: Draw) -> Batch:
        """The examples at `places` of the global batch of `step`, stacked: [B, …] each."""
        order = self.order.batch(step)
        return self._examples([order[place] for place in places], draw, self.plan.recipe.data.caption_dropout)

    def validation(self) -> list[tuple[Batch, Draw]]:
        """The held-out pictures, one a batch, with draws that are the same at every validation."""
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
            picture = self.pictures[index]
            found.append(
                {
                    **self._picture(picture, self._variants[variant]),
                    **self._caption("" if drop else picture.caption),
                    "geometry": geometry(picture.crop),
                }
            )
        return stack(found)

    def _picture(self, picture: Picture, mirrored: bool) -> Batch:
        crop = picture.crop
        key = key_of(picture.digest, repr(crop), int(mirrored), self.background)

        def compute() -> Batch:
            image = apply(decode(_unchanged(picture), self.background), replace(crop, mirrored=mirrored))
            return _finite(self.encoders.encode_picture(to_tensor(numpy.asarray(image))), picture)

        return self._kept(self.encoders.picture_key, key, compute)

    def _caption(self, caption: str) -> Batch:
        if not self.encoders.caption_key:
            return {}
        return self._kept(self.encoders.caption_key, key_of(caption), lambda: self.encoders.encode_caption(caption))

    def _kept(self, encoder: str, key: str, compute: Callable[[], Batch]) -> Batch:
        """From memory, else from the cache, else computed; kept in both."""
        place = encoder + key
        if place in self._memory:
            self._memory.move_to_end(place)
            return self._memory[place]
        if self.encoders.cached:
            store = self._stores[encoder]
            if key not in store:
                with torch.no_grad():
                    store.put(key, compute())
            found = store.get(key)
        else:
            found = compute()
        self._memory[place] = found
        self._memory_bytes += _bytes(found)
        while self._memory_bytes > MEMORY_BYTES:
            self._memory_bytes -= _bytes(self._memory.popitem(last=False)[1])
        return found


def _finite(encoded: Batch, picture: Picture) -> Batch:
    """What an encoder made of a picture: a NaN would be kept in the cache, and would stop every run that draws it."""
    for name, tensor in encoded.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"the VAE makes {name} of the picture that are not finite",
                where=picture.name,
                remedy="the VAE's weights are damaged or not made for this: give another model.vae; nothing of this picture was kept",
            )
    return encoded


def _unchanged(picture: Picture) -> bytes:
    """The bytes that the audit saw: others would be kept in the cache under a digest that is not theirs."""
    try:
        content = picture.read()
    except OSError as error:
        raise UserError(
            f"the picture cannot be read any more: {error.strerror}", where=picture.name, remedy="put it back, and start again"
        ) from error
    if hashlib.sha256(content).hexdigest() != picture.digest:
        raise UserError("the picture has changed since the run began", where=picture.name, remedy="start again; this run did not see the new one")
    return content


def to_tensor(pixels: numpy.ndarray) -> Tensor:
    """[H, W, 3] uint8 → [3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def geometry(crop: Crop) -> Tensor:
    """SDXL's size conditions, [6] float32: original height and width, crop's top and left, target height and width.

    All in pixels (Podell et al. 2023, arXiv:2307.01952, §2.2); the crop's corner is measured after scaling.
    """
    width, height = crop.original
    return torch.tensor([height, width, crop.top, crop.left, crop.bucket.height, crop.bucket.width], dtype=torch.float32)


def _bytes(batch: Batch) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
