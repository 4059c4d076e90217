"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): two text encoders, size and crop conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch
from finetune.models.base import Model
from finetune.models.pretrained.family import ClipFamily
from finetune.models.pretrained.model import TextToImage
from finetune.planning import Plan


class StableDiffusionXL(ClipFamily):
    pipeline = "StableDiffusionXLPipeline"
    objective = "noise"
    encoders = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))

    def embed(self, encoders: Mapping[str, nn.Module], ids: Batch) -> Batch:
        """Both encoders' last hidden state but one, side by side, and the second's pooled projection."""
        first = encoders["text_encoder"](ids["tokenizer"], output_hidden_states=True)
        second = encoders["text_encoder_2"](ids["tokenizer_2"], output_hidden_states=True)
        both = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"prompt_embeds": both, "pooled_prompt_embeds": second.text_embeds}

    def unread_text(self, encoders: Mapping[str, nn.Module]) -> list[nn.Module]:
        """The first encoder's last layer and norm. The second's feed its pooled projection."""
        first: Any = encoders["text_encoder"]
        transformer = getattr(first, "text_model", first)  # transformers before 5 put one more name between
        return [transformer.encoder.layers[-1], transformer.final_layer_norm]

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        added = {
            "text_embeds": batch["pooled_prompt_embeds"].to(noisy.dtype),
            "time_ids": batch["geometry"].to(noisy.dtype),
        }
        found: Tensor = denoiser(
            noisy, timestep, batch["prompt_embeds"].to(noisy.dtype), added_cond_kwargs=added, return_dict=False
        )[0]
        return found


FAMILY = StableDiffusionXL()


def build(plan: Plan, audit: Audit) -> Model:
    return TextToImage(plan, audit, FAMILY)
