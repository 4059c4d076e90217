"""−log p of images under a model that says it, exactly or by a bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from finetune.data.audit.audit import ImageRecord
from finetune.data.batch import Batch
from finetune.models.scratch.base import LikelihoodModel
from finetune.rng import Draw

BATCH = 128


def batches(model: LikelihoodModel, images: Sequence[ImageRecord], background: str) -> Iterator[Batch]:
    """The images as `model` sees them, in order."""
    for start in range(0, len(images), BATCH):
        yield model.batch_of(images[start : start + BATCH], background)


@torch.no_grad()
def nats(
    model: LikelihoodModel, images: Sequence[ImageRecord], background: str = "white", particles: int = 1, seed: int = 0
) -> Tensor:
    """−log p (or an upper bound on it) of each image in nats, [N] float64.

    Args:
        particles: draws an image of what a bound draws; more are tighter.
        seed: of those draws; an image's are its place's.
    """
    found, place = [], 0
    for batch in batches(model, images, background):
        size = len(batch["pixels"])
        found.append(
            model.nats(batch, Draw(seed, "likelihood", range(place, place + size), model.device), particles)
            .double()
            .cpu()
        )
        place += size
    return torch.cat(found)
