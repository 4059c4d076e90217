"""The negative log-likelihood of images under models that have one, exact or an upper bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from finetune.data.batch import Batch
from finetune.data.example import Example
from finetune.models.scratch.base import LikelihoodModel
from finetune.rng import Draw

BATCH = 128


def batches(model: LikelihoodModel, images: Sequence[Example], background: str) -> Iterator[Batch]:
    """Yield the images as batches for `model`, in order."""
    for start in range(0, len(images), BATCH):
        yield model.batch_of(images[start : start + BATCH], background)


@torch.no_grad()
def nats(
    model: LikelihoodModel, images: Sequence[Example], background: str = "white", particles: int = 1, seed: int = 0
) -> Tensor:
    """Compute −log p of each image, or an upper bound on it, in nats: [N] float64.

    Args:
        model: a model with a likelihood.
        images: the images.
        background: the color that transparent images are laid over.
        particles: latent samples per image for a bound; more give a tighter bound.
        seed: of those samples, which also depend on the image's index.
    """
    values, start = [], 0
    for batch in batches(model, images, background):
        size = len(batch["pixels"])
        values.append(
            model.nats(batch, Draw(seed, "likelihood", range(start, start + size), model.device), particles)
            .double()
            .cpu()
        )
        start += size
    return torch.cat(values)
