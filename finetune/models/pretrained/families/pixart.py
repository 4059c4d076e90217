"""PixArt-Σ (Chen et al. 2024, arXiv:2403.04692): a transformer that predicts the noise, T5 as text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from finetune.models.pretrained.family import Family
from finetune.models.spec import FamilySpec, Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from finetune.data.batch import Batch

SPEC = FamilySpec(
    slug="pixart",
    title="PixArt-Σ",
    implementation=f"{__name__}:PixArtSigma",
    paper="2403.04692",
    pipeline="PixArtSigmaPipeline",
    objective="noise",
    denoiser_class="PixArtTransformer2DModel",
    variants={
        "pixart-sigma": Variant(
            hub=("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",),
            resolution=1024,
            released="2024-04",
            license="CreativeML Open RAIL++-M",
            preference=90,
        )
    },
    single_file_keys=("blocks.0.cross_attn.q_linear.weight", "blocks.0.mlp.fc1.weight"),
    single_transformer=False,  # diffusers has no converter for it
    lora_formats={"comfyui": ""},  # the diffusers pipeline loads no LoRA; PEFT does
)


class PixArtSigma(Family):
    spec = SPEC
    tokens = 300
    arguments: ClassVar[Mapping[str, Any]] = {
        "negative_prompt": None,
        "use_resolution_binning": False,
        "clean_caption": False,
    }

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """Hidden states of T5 and the mask of padding, [1, 300, …]."""
        encoded = pipeline.encode_prompt(caption, False, device=device, max_sequence_length=self.tokens)
        return {"prompt_embeds": encoded[0], "prompt_attention_mask": encoded[1]}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """As in `Family`. Only the predicted noise: samplers do not use the predicted variance."""
        predicted: Tensor = denoiser(
            noisy,
            encoder_hidden_states=batch["prompt_embeds"].to(noisy.dtype),
            encoder_attention_mask=batch["prompt_attention_mask"],
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return predicted[:, : noisy.shape[1]]
