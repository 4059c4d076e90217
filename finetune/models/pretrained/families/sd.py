"""Stable Diffusion 1.x and 2.x (and the embedded base, the same in miniature): one CLIP text encoder, a UNet, ε or v."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch
from finetune.models.base import Model
from finetune.models.pretrained.family import ClipFamily
from finetune.models.pretrained.model import TextToImage
from finetune.planning import Plan


class StableDiffusion(ClipFamily):
    pipeline = "StableDiffusionPipeline"
    objective = "noise"

    def embed(self, encoders: Mapping[str, nn.Module], ids: Batch) -> Batch:
        """The last hidden state after the final layer norm, [B, length, width], as the pipeline's `encode_prompt`."""
        return {"prompt_embeds": encoders["text_encoder"](ids["tokenizer"])[0]}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        found: Tensor = denoiser(noisy, timestep, batch["prompt_embeds"].to(noisy.dtype), return_dict=False)[0]
        return found


FAMILY = StableDiffusion()


def build(plan: Plan, audit: Audit) -> Model:
    return TextToImage(plan, audit, FAMILY)
