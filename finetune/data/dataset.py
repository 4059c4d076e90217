"""`Dataset`: encoded training examples by step and batch position, and held-out examples for validation."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy
import torch

from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch, Encoder, stack
from finetune.data.caption_length import long_captions
from finetune.data.decoding import geometry
from finetune.data.encoding import ExampleEncoder, Progress
from finetune.data.prefetch import Prefetcher, threads
from finetune.data.sampler import Order
from finetune.errors import UserError
from finetune.planning import Plan
from finetune.rng import Draw, mix

AHEAD_STEPS = threads() + 1  # batches prepared while a step computes


class Dataset:
    """The examples of an audit, encoded.

    Args:
        plan: sets the order, the seeds and the cache.
        audit: the examples to encode.
        encoder: the family's encoder. Not used after `encode` returns, unless its `cached` is False.
    """

    def __init__(self, plan: Plan, audit: Audit, encoder: Encoder) -> None:
        recipe = plan.recipe
        self.plan, self.encoder, self.images = plan, encoder, audit.images
        self._weighted = recipe.prior is not None or any(source.weight != 1 for source in recipe.data.sources)
        self._masked = recipe.data.masks is not None
        if self._masked and encoder.mask_factor is None:
            raise UserError("this family's loss does not support masks", where="data.masks", remedy="remove data.masks")
        self.order = Order(_examples_by_bucket(audit), plan.global_batch, plan.steps, recipe.train.seed)
        self._held_out = numpy.flatnonzero(self.images.held_out).tolist()
        self._encoding = ExampleEncoder(plan, encoder, audit.background)
        self._prefetcher: Prefetcher[tuple[int, tuple[int, ...]], Batch] = Prefetcher()

    def long_captions(self) -> str:
        """A sentence about captions that the model truncates, with the names of their images; "" if there are none.

        Raises:
            UserError: there are such captions, and `data.long_captions` is "stop".
        """
        return long_captions(self.images, self.encoder.caption_tokens, self.plan.recipe.data.long_captions)

    def encode(self, progress: Progress | None = None, share: tuple[int, int] | None = None) -> None:
        """Encode the examples that are not in the cache; see `ExampleEncoder.encode_all`."""
        self._encoding.encode_all(self.images, self._masked, progress, share)

    @property
    def has_validation(self) -> bool:
        """Whether any examples are held out for validation."""
        return len(self._held_out) > 0

    @property
    def held_out_count(self) -> int:
        """Number of examples held out for validation."""
        return len(self._held_out)

    def names(self, step: int) -> list[str]:
        """The names of a step's examples, for messages."""
        return [self.images[index].name for index in self.order.batch(step)]

    def batch(self, step: int, places: Sequence[int], draw: Draw) -> Batch:
        """The examples at positions `places` of the global batch of `step`, stacked: [B, …] each.

        Meanwhile, threads prepare the same positions of the next steps.
        """
        own = tuple(places)
        later = range(step + 1, min(step + 1 + AHEAD_STEPS, self.plan.steps))
        return self._prefetcher.get(
            (step, own),
            functools.partial(self._batch, step, own, draw),
            {(n, own): functools.partial(self._batch, n, own, draw.of_step(n)) for n in later},
            lambda key: key[0] >= step,
        )

    def _batch(self, step: int, places: Sequence[int], draw: Draw) -> Batch:
        order = self.order.batch(step)
        return self._examples([order[place] for place in places], draw, self.plan.recipe.data.caption_dropout)

    def validation(self, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Batch, Draw]]:
        """Yield this process's held-out examples in batches of one, with the same random numbers at every validation.

        Example i belongs to process i mod `ranks`. Sharded models need every process to run the same number of batches,
        so processes with fewer examples repeat the last one.
        """
        seed, count = self.plan.recipe.train.seed, len(self._held_out)
        for start in range(0, count, ranks):
            place = min(start + rank, count - 1)
            draw = Draw(mix(seed, "validation"), 0, [place], self.plan.machine.device)
            yield self._examples([self._held_out[place]], draw, 0.0), draw

    def _examples(self, indices: Sequence[int], draw: Draw, dropout: float) -> Batch:
        variants = draw.integers("variant", len(self._encoding.variants)).tolist()
        dropped = (draw.uniform("caption dropout") < dropout).tolist()
        encoded = []
        for index, variant, drop in zip(indices, variants, dropped, strict=True):
            example, mirror = self.images[index], self._encoding.variants[variant]
            encoded.append(
                {
                    **self._encoding.parts(example, mirror, "" if drop else example.caption),
                    "geometry": geometry(example.crop),
                    **({"weight": torch.tensor(example.weight)} if self._weighted else {}),
                    **(self._encoding.mask(example, mirror) if self._masked else {}),
                }
            )
        return stack(encoded)


def _examples_by_bucket(audit: Audit) -> list[numpy.ndarray]:
    """For each bucket the indices into `audit.images` of its training examples, each as often as it repeats.

    Buckets are sorted by their first example.
    """
    trains, repeats = ~audit.images.held_out, audit.images.repeats
    by_shape: dict[object, list[numpy.ndarray]] = {}
    for crop, places in audit.images.crops.items():
        by_shape.setdefault(crop.shape, []).append(places[trains[places]])
    buckets = [numpy.sort(numpy.concatenate(parts)) for parts in by_shape.values()]
    return [
        numpy.repeat(bucket, repeats[bucket])
        for bucket in sorted((b for b in buckets if len(b)), key=lambda b: int(b[0]))
    ]
