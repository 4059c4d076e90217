"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): two text encoders, size and crop conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune.models.pretrained.family import ClipFamily
from finetune.models.spec import FamilySpec, ModelSpec, Variant

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.data.batch import Batch

SPEC = FamilySpec(
    slug="sdxl",
    title="Stable Diffusion XL",
    implementation=f"{__name__}:StableDiffusionXL",
    paper="2307.01952",
    pipeline="StableDiffusionXLPipeline",
    objective="noise",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    variants={
        "sdxl": Variant(
            hub=("stabilityai/stable-diffusion-xl-base-1.0",),
            resolution=1024,
            released="2023-07",
            license="CreativeML Open RAIL++-M",
            preference=60,
            text_width=2048,
            padding={"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},  # CLIP's own and OpenCLIP's
        )
    },
    one_architecture=True,
    lora_formats={"kohya": "", "comfyui": ""},
    modelspec={
        "": ModelSpec(
            "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models"
        )
    },
)


class StableDiffusionXL(ClipFamily):
    spec = SPEC
    encoders = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))

    def embed(self, encoders: Mapping[str, nn.Module], ids: Batch) -> Batch:
        """Second-to-last hidden states of both encoders, side by side, and the pooled projection of the second."""
        import torch

        first = encoders["text_encoder"](ids["tokenizer"], output_hidden_states=True)
        second = encoders["text_encoder_2"](ids["tokenizer_2"], output_hidden_states=True)
        both = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"prompt_embeds": both, "pooled_prompt_embeds": second.text_embeds}

    def untrained_text(self, encoders: Mapping[str, nn.Module]) -> list[nn.Module]:
        """Last layer and norm of the first encoder. Those of the second feed its pooled projection."""
        first: Any = encoders["text_encoder"]
        transformer = getattr(first, "text_model", first)  # transformers before version 5 has one more level
        return [transformer.encoder.layers[-1], transformer.final_layer_norm]

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        added = {
            "text_embeds": batch["pooled_prompt_embeds"].to(noisy.dtype),
            "time_ids": batch["geometry"].to(noisy.dtype),
        }
        predicted: Tensor = denoiser(
            noisy, timestep, batch["prompt_embeds"].to(noisy.dtype), added_cond_kwargs=added, return_dict=False
        )[0]
        return predicted
