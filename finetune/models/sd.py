"""Stable Diffusion 1.x and 2.x (and the embedded base, the same in miniature): one CLIP text encoder, a UNet, ε or v."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from finetune.data.scan import Audit
from finetune.models.text_to_image import Family, TextToImage
from finetune.models.turn import Batch, Model
from finetune.planning import Plan


class StableDiffusion(Family):
    pipeline = "StableDiffusionPipeline"

    def conditions(self, encoders: Mapping[str, nn.Module], ids: Batch) -> Batch:
        """The last hidden state after the final layer norm, [B, length, width], as the pipeline's `encode_prompt`."""
        return {"embeddings": encoders["text_encoder"](ids["tokenizer"])[0]}

    def unread(self, encoders: Mapping[str, nn.Module]) -> list[nn.Module]:
        return []

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        found: Tensor = denoiser(noisy, timestep, batch["embeddings"].to(noisy.dtype), return_dict=False)[0]
        return found

    def prompt(self, positive: Batch, negative: Batch) -> dict[str, Tensor]:
        return {"prompt_embeds": positive["embeddings"], "negative_prompt_embeds": negative["embeddings"]}


def build(plan: Plan, audit: Audit) -> Model:
    return TextToImage(plan, audit, StableDiffusion())
