"""A transformer over the codes of a VQ autoencoder in raster order (Esser et al. 2021, arXiv:2012.09841, §3.2)."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from finetune.config import nets
from finetune.config.nets.vq_transformer import Net
from finetune.data.audit.audit import Audit
from finetune.models.base import Model
from finetune.models.scratch.autoregressive.transformer import TokenTransformer
from finetune.models.scratch.base import PixelModel, Space
from finetune.models.scratch.vq.code_prior import Prior, SecondStage, built, restored
from finetune.models.scratch.vq.vqvae import VqVae
from finetune.planning import Plan


@final
class SequencePrior(Prior):
    """A transformer over codes as a sequence."""

    def __init__(self, transformer: TokenTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def log_prob(self, codes: Tensor, classes: Tensor | None) -> Tensor:
        return self.transformer.log_prob(codes.flatten(1), classes)

    def generate(self, uniform: Tensor, classes: Tensor | None) -> Tensor:
        return self.transformer.generate(uniform.flatten(1), classes).view(uniform.shape)

    def generate_uncached(self, uniform: Tensor, classes: Tensor | None) -> Tensor:
        return self.transformer.generate_uncached(uniform.flatten(1), classes).view(uniform.shape)


@final
class VqTransformer(SecondStage):
    """A transformer prior."""

    def prior(self, space: Space, section: Net, first: VqVae) -> Prior:
        codes, (height, width) = len(first.net.quantiser.book), first.net.grid
        net = (section.width, section.layers, section.heads, section.dropout)
        return SequencePrior(TokenTransformer(codes, height * width, len(space.classes), *net))


def build(plan: Plan, audit: Audit) -> Model:
    """Build the prior on the first stage that `model.vae` names."""
    return built(plan, audit, VqTransformer)


def restore(space: Space, section: nets.Section, config: dict[str, Any]) -> PixelModel:
    """Build the model of a saved configuration."""
    return restored(space, section, config, VqTransformer)
