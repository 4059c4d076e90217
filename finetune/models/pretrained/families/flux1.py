"""FLUX.1 [dev] (2024; training: arXiv:2506.15742, §2): two streams that merge, packed latents, embedded guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.models.pretrained.family import Family
from finetune.models.pretrained.packing import grid, patchify, places, sequence, unpatchify
from finetune.models.spec import FamilySpec, ModelSpec, Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from finetune.data.batch import Batch

SPEC = FamilySpec(
    slug="flux1",
    title="FLUX.1 [dev]",
    implementation=f"{__name__}:Flux",
    aliases=("flux",),
    paper="2506.15742",
    pipeline="FluxPipeline",
    objective="flow",
    denoiser_class="FluxTransformer2DModel",
    variants={
        "flux1-dev": Variant(
            hub=("black-forest-labs/FLUX.1-dev",),
            resolution=1024,
            released="2024-08",
            license="FLUX.1 [dev] Non-Commercial",
            preference=30,
            commercial="no",
        )
    },
    single_file_keys=("vector_in.in_layer.weight",),
    lora_formats={"kohya": "finetune.adapters.formats.key_maps:FLUX", "comfyui": ""},
    lora_targets={"mlp": ("proj_mlp", r"single_transformer_blocks\.\d+\.proj_out")},
    modelspec={"": ModelSpec("flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux")},
)


class Flux(Family):
    spec = SPEC
    encoders = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    reader, tokens = "tokenizer_2", 512  # CLIP, of which only the pooled state is used, reads 77

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """Hidden states of T5 including padding, [1, 512, width], and the pooled state of CLIP."""
        embeddings, pooled, _ids = pipeline.encode_prompt(caption, device=device, max_sequence_length=self.tokens)
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """As in `Family`. Latents are a sequence of 2×2 patches, each with its position."""
        import torch

        patches, embeddings = patchify(noisy), batch["prompt_embeds"].to(noisy.dtype)
        height, width = patches.shape[2:]
        velocity: Tensor = denoiser(
            hidden_states=sequence(patches),
            timestep=timestep / 1000,
            guidance=batch.get("guidance"),
            pooled_projections=batch["pooled_prompt_embeds"].to(noisy.dtype),
            encoder_hidden_states=embeddings,
            txt_ids=torch.zeros(embeddings.shape[1], 3, device=noisy.device),
            img_ids=places(height, width, noisy.device),
            return_dict=False,
        )[0]
        return unpatchify(grid(velocity, height, width))
