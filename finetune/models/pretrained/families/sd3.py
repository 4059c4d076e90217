"""Stable Diffusion 3 and 3.5 medium (Esser et al. 2024, arXiv:2403.03206): two streams, two CLIPs and a T5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.models.pretrained.family import Family
from finetune.models.spec import FamilySpec, ModelSpec, Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from finetune.data.batch import Batch

SPEC = FamilySpec(
    slug="sd3",
    title="Stable Diffusion 3, 3.5 medium",
    implementation=f"{__name__}:StableDiffusion3",
    paper="2403.03206",
    pipeline="StableDiffusion3Pipeline",
    objective="flow",
    denoiser_class="SD3Transformer2DModel",
    variants={
        "sd3-medium": Variant(
            hub=("stabilityai/stable-diffusion-3-medium-diffusers",),
            resolution=1024,
            released="2024-06",
            license="Stability AI Community",
            preference=55,
            commercial="below $1M a year",
        ),
        "sd35-medium": Variant(
            hub=("stabilityai/stable-diffusion-3.5-medium",),
            resolution=1024,
            released="2024-10",
            license="Stability AI Community",
            preference=50,
            commercial="below $1M a year",
        ),
    },
    single_file_keys=("joint_blocks.0.context_block.adaLN_modulation.1.bias",),
    lora_formats={"comfyui": ""},
    lora_original="finetune.adapters.formats.key_maps:SD3",
    modelspec={"": ModelSpec("sd3_m", "stable-diffusion-3-5-medium")},
)


class StableDiffusion3(Family):
    spec = SPEC
    encoders = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"), ("tokenizer_3", "text_encoder_3"))
    reader, tokens = "tokenizer_3", 256  # the CLIPs read 77

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """Hidden states of the CLIPs side by side, then T5's: [1, 77 + 256, width]; and pooled projections."""
        encoded = pipeline.encode_prompt(
            caption, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=self.tokens
        )
        return {"prompt_embeds": encoded[0], "pooled_prompt_embeds": encoded[2]}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        predicted: Tensor = denoiser(
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=batch["prompt_embeds"].to(noisy.dtype),
            pooled_projections=batch["pooled_prompt_embeds"].to(noisy.dtype),
            return_dict=False,
        )[0]
        return predicted

    def untrained(self, denoiser: Any) -> list[nn.Module]:
        """Text queries of the last block: their result is not used."""
        attention = denoiser.transformer_blocks[-1].attn
        return [part for part in (attention.add_q_proj, attention.norm_added_q) if part is not None]
