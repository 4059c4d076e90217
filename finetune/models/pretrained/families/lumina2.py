"""Lumina-Image 2.0 (Qin et al. 2025, arXiv:2503.21758): one stream of image and text, read by Gemma 2 after a system prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch
from finetune.models.base import Model
from finetune.models.pretrained.family import Family
from finetune.models.pretrained.model import TextToImage
from finetune.planning import Plan


class Lumina2(Family):
    pipeline = "Lumina2Pipeline"
    objective = "flow"
    tokens = 256

    def written(self, pipeline: Any, caption: str) -> str:
        return f"{pipeline.system_prompt} <Prompt Start> {caption}"

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """The last states but one and which of them are no padding, [1, 256, …]; a negative prompt has no system prompt before it."""
        found = pipeline.encode_prompt(caption, negative, caption, device=device, max_sequence_length=self.tokens)
        embeddings, mask = found[2:] if negative else found[:2]
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """The net counts time from noise, 0, to image, 1, and predicts against it."""
        found: Tensor = denoiser(
            hidden_states=noisy,
            timestep=1 - timestep / 1000,
            encoder_hidden_states=batch["prompt_embeds"].to(noisy.dtype),
            encoder_attention_mask=batch["prompt_attention_mask"],
            return_dict=False,
        )[0]
        return -found


FAMILY = Lumina2()


def build(plan: Plan, audit: Audit) -> Model:
    return TextToImage(plan, audit, FAMILY)
