"""FLUX.2 klein (Black Forest Labs 2025–26), its base of 4 B and larger ones: FLUX.1's streams, read by Qwen3, latents in patches already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch
from finetune.models.base import Model
from finetune.models.pretrained.family import Family, chat
from finetune.models.pretrained.model import TextToImage
from finetune.models.pretrained.vae import grid, sequence
from finetune.planning import Plan


class Flux2Klein(Family):
    pipeline = "Flux2KleinPipeline"
    objective = "flow"
    tokens = 512
    patch = 1  # the latents themselves are patches

    def written(self, pipeline: Any, caption: str) -> str:
        return chat(pipeline.tokenizer, caption, enable_thinking=False)

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """Three of Qwen3's layers beside each other, padding and all, [1, 512, 3 · width]."""
        embeddings, _ids = pipeline.encode_prompt(caption, device=device, max_sequence_length=self.tokens)
        return {"prompt_embeds": embeddings}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """As in `Family`: latents, already in patches, go in as a sequence, each with its place."""
        embeddings = batch["prompt_embeds"].to(noisy.dtype)
        images, height, width = len(noisy), noisy.shape[2], noisy.shape[3]
        # Four axes: time, row, column, place in the text.
        of_image = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1))
        of_text = torch.cartesian_prod(
            torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(embeddings.shape[1])
        )
        velocity: Tensor = denoiser(
            hidden_states=sequence(noisy),
            timestep=timestep / 1000,
            guidance=batch.get("guidance"),
            encoder_hidden_states=embeddings,
            txt_ids=of_text.to(noisy.device).expand(images, -1, -1),
            img_ids=of_image.to(noisy.device).expand(images, -1, -1),
            return_dict=False,
        )[0]
        return grid(velocity, height, width)


FAMILY = Flux2Klein()


def build(plan: Plan, audit: Audit) -> Model:
    return TextToImage(plan, audit, FAMILY)
