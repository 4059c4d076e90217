"""Stable Diffusion 3 and 3.5 medium (Esser et al. 2024, arXiv:2403.03206): a transformer of two streams, two CLIPs and a T5."""

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


class StableDiffusion3(Family):
    pipeline = "StableDiffusion3Pipeline"
    objective = "flow"
    encoders = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"), ("tokenizer_3", "text_encoder_3"))
    reader, tokens = "tokenizer_3", 256  # the CLIPs read 77 of them

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """Both CLIPs beside each other, T5 after them: [1, 77 + 256, width]; the CLIPs' pooled projections."""
        found = pipeline.encode_prompt(
            caption, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=self.tokens
        )
        return {"prompt_embeds": found[0], "pooled_prompt_embeds": found[2]}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        found: Tensor = denoiser(
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=batch["prompt_embeds"].to(noisy.dtype),
            pooled_projections=batch["pooled_prompt_embeds"].to(noisy.dtype),
            return_dict=False,
        )[0]
        return found

    def unread(self, denoiser: Any) -> list[nn.Module]:
        """The last block's queries of the text: what they find is not used."""
        attention = denoiser.transformer_blocks[-1].attn
        return [part for part in (attention.add_q_proj, attention.norm_added_q) if part is not None]


FAMILY = StableDiffusion3()


def build(plan: Plan, audit: Audit) -> Model:
    return TextToImage(plan, audit, FAMILY)
