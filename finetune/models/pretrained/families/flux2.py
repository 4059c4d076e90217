"""FLUX.2 [klein] (2026), base models: FLUX.1's streams, Qwen3 as text encoder, latents that are patches already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.models.pretrained.family import Family, chat
from finetune.models.pretrained.packing import grid, sequence
from finetune.models.spec import FamilySpec, ModelSpec, Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from finetune.data.batch import Batch

SPEC = FamilySpec(
    slug="flux2",
    title="FLUX.2 [klein]",
    implementation=f"{__name__}:Flux2Klein",
    pipeline="Flux2KleinPipeline",
    objective="flow",
    denoiser_class="Flux2Transformer2DModel",
    variants={
        "flux2-klein-4b": Variant(
            hub=("black-forest-labs/FLUX.2-klein-base-4B",),
            resolution=1024,
            released="2026-01",
            license="Apache-2.0",
            preference=40,
        )
    },
    single_file_keys=("single_stream_modulation.lin.weight",),
    lora_formats=dict.fromkeys(("kohya", "comfyui"), "finetune.adapters.formats.key_maps:FLUX2"),
    # The single blocks compute attention and MLP in two layers that cannot be told apart; they count as attention.
    lora_targets={"attention": ("to_qkv_mlp_proj",), "mlp": (r"ff(_context)?\.linear_(in|out)",)},
    modelspec={"": ModelSpec("flux2", "Flux.2-klein-4b", "https://github.com/black-forest-labs/flux2")},
)


class Flux2Klein(Family):
    spec = SPEC
    tokens = 512
    patch = 1  # the latents themselves are patches

    def written(self, pipeline: Any, caption: str) -> str:
        return chat(pipeline.tokenizer, caption, enable_thinking=False)

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """Hidden states of three of Qwen3's layers, concatenated, including padding: [1, 512, 3 · width]."""
        embeddings, _ids = pipeline.encode_prompt(caption, device=device, max_sequence_length=self.tokens)
        return {"prompt_embeds": embeddings}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """As in `Family`. Latents are a sequence of patches, each with its position."""
        import torch

        embeddings = batch["prompt_embeds"].to(noisy.dtype)
        images, height, width = len(noisy), noisy.shape[2], noisy.shape[3]
        # Four axes: time, row, column, position in the text.
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
