"""PixArt-Σ (Chen et al. 2024, arXiv:2403.04692): a transformer that predicts the noise, and a variance that nobody reads, read by T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch
from finetune.models.base import Model
from finetune.models.pretrained.family import Family
from finetune.models.pretrained.model import TextToImage
from finetune.planning import Plan


class PixArtSigma(Family):
    pipeline = "PixArtSigmaPipeline"
    objective = "noise"
    tokens = 300
    arguments: ClassVar[Mapping[str, Any]] = {
        "negative_prompt": None,
        "use_resolution_binning": False,
        "clean_caption": False,
    }

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """T5's states and which of them are no padding, [1, 300, …]."""
        found = pipeline.encode_prompt(caption, False, device=device, max_sequence_length=self.tokens)
        return {"prompt_embeds": found[0], "prompt_attention_mask": found[1]}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """The noise alone: samplers do not read the variance that the net learned beside it."""
        found: Tensor = denoiser(
            noisy,
            encoder_hidden_states=batch["prompt_embeds"].to(noisy.dtype),
            encoder_attention_mask=batch["prompt_attention_mask"],
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return found[:, : noisy.shape[1]]


FAMILY = PixArtSigma()


def build(plan: Plan, audit: Audit) -> Model:
    return TextToImage(plan, audit, FAMILY)
