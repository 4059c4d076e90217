"""−log p of pictures under a model that says it, exactly or by a bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from finetune.data.audit.audit import Picture
from finetune.data.batch import Batch
from finetune.models.scratch.base import LikelihoodModel
from finetune.rng import Draw

BATCH = 128


def batches(model: LikelihoodModel, pictures: Sequence[Picture], background: str) -> Iterator[Batch]:
    """The pictures as `model` sees them, in order."""
    for start in range(0, len(pictures), BATCH):
        yield model.batch_of(pictures[start : start + BATCH], background)


@torch.no_grad()
def nats(
    model: LikelihoodModel, pictures: Sequence[Picture], background: str = "white", particles: int = 1, seed: int = 0
) -> Tensor:
    """−log p (or an upper bound on it) of each picture in nats, [N] float64.

    Args:
        particles: draws a picture of what a bound draws; more are tighter.
        seed: of those draws; a picture's are its place's.
    """
    found, place = [], 0
    for batch in batches(model, pictures, background):
        size = len(batch["pixels"])
        found.append(
            model.nats(batch, Draw(seed, "likelihood", range(place, place + size), model.device), particles)
            .double()
            .cpu()
        )
        place += size
    return torch.cat(found)
