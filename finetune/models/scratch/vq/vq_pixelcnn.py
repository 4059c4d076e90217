"""A PixelCNN over the codes of a vector-quantized autoencoder (van den Oord et al. 2017, arXiv:1711.00937, §3.3)."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from finetune.config import nets
from finetune.config.nets.vq_pixelcnn import Net
from finetune.data.audit.audit import Audit
from finetune.models.base import Model
from finetune.models.scratch.autoregressive.pixelcnnpp import PixelCnn
from finetune.models.scratch.autoregressive.transformer import chosen
from finetune.models.scratch.base import PixelModel, Space, class_embedding
from finetune.models.scratch.vq.code_prior import Prior, SecondStage, built, restored
from finetune.models.scratch.vq.vqvae import VqVae
from finetune.planning import Plan


@final
class GridPrior(Prior):
    """A PixelCNN with embedded codes as input and a categorical distribution over codes as output."""

    def __init__(self, codes: int, space: Space, section: Net) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, section.embedding_dim)
        self.classes = class_embedding(space, section.width)
        self.cnn = PixelCnn(section.embedding_dim, codes, section, section.width if space.classes else 0)

    def _condition(self, classes: Tensor | None) -> Tensor | None:
        return None if self.classes is None else self.classes(classes)

    def _read(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] → embeddings [B, embedding, h, w]."""
        result: Tensor = self.embedding(codes).movedim(-1, 1)
        return result

    def _logits(self, codes: Tensor, classes: Tensor | None) -> Tensor:
        """Logits [B, h, w, codes]."""
        result: Tensor = self.cnn(self._read(codes), self._condition(classes)).movedim(1, -1).float()
        return result

    def log_prob(self, codes: Tensor, classes: Tensor | None) -> Tensor:
        return self._logits(codes, classes).log_softmax(-1).gather(-1, codes[..., None]).flatten(1).sum(1)

    def generate(self, uniform: Tensor, classes: Tensor | None) -> Tensor:
        """Sample codes [B, h, w] int64 from uniform values of this shape, with cached convolutions."""
        codes = torch.zeros_like(uniform, dtype=torch.long)

        def pick(parameters: Tensor, y: int, x: int) -> Tensor:
            codes[:, y, x] = chosen(parameters[:, :, 0, 0], uniform[:, y, x])
            return self._read(codes[:, y : y + 1, x : x + 1])

        self.cnn.generate(torch.zeros_like(self._read(codes)), self._condition(classes), pick)
        return codes

    def generate_uncached(self, uniform: Tensor, classes: Tensor | None) -> Tensor:
        codes = torch.zeros_like(uniform, dtype=torch.long)
        for y in range(codes.shape[1]):
            for x in range(codes.shape[2]):
                codes[:, y, x] = chosen(self._logits(codes, classes)[:, y, x], uniform[:, y, x])
        return codes


@final
class VqPixelCnn(SecondStage):
    """A PixelCNN prior."""

    def prior(self, space: Space, section: Net, first: VqVae) -> Prior:
        return GridPrior(len(first.net.quantiser.book), space, section)


def build(plan: Plan, audit: Audit) -> Model:
    """Build the prior on the first stage that `model.vae` names."""
    return built(plan, audit, VqPixelCnn)


def restore(space: Space, section: nets.Section, config: dict[str, Any]) -> PixelModel:
    """Build the model of a saved configuration."""
    return restored(space, section, config, VqPixelCnn)
