"""Lumina-Image 2.0 (Qin et al. 2025, arXiv:2503.21758): one stream of image and text, Gemma 2 as text encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.models.pretrained.family import Family
from finetune.models.spec import FamilySpec, ModelSpec, Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from finetune.data.batch import Batch

SPEC = FamilySpec(
    slug="lumina2",
    title="Lumina-Image 2.0",
    implementation=f"{__name__}:Lumina2",
    paper="2503.21758",
    pipeline="Lumina2Pipeline",
    objective="flow",
    denoiser_class="Lumina2Transformer2DModel",
    variants={
        "lumina2": Variant(
            hub=("Alpha-VLLM/Lumina-Image-2.0",),
            resolution=1024,
            released="2025-01",
            license="Apache-2.0",
            preference=70,
        )
    },
    single_file_keys=("cap_embedder.0.weight", "layers.0.adaLN_modulation.1.weight"),
    # diffusers reads a ComfyUI file of this family only where every linear layer is adapted.
    lora_formats={"comfyui": "finetune.adapters.formats.key_maps:LUMINA2"},
    lora_targets={"mlp": (r"feed_forward\.(w|linear_)[123]",)},
    modelspec={"": ModelSpec("lumina2", "lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0")},
)


class Lumina2(Family):
    spec = SPEC
    tokens = 256

    def written(self, pipeline: Any, caption: str) -> str:
        return f"{pipeline.system_prompt} <Prompt Start> {caption}"

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """Second-to-last hidden states and the mask of padding, [1, 256, …]. A negative prompt has no system prompt."""
        encoded = pipeline.encode_prompt(caption, negative, caption, device=device, max_sequence_length=self.tokens)
        embeddings, mask = encoded[2:] if negative else encoded[:2]
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """As in `Family`. The network's time runs from noise, 0, to image, 1, so its velocity has the opposite sign."""
        predicted: Tensor = denoiser(
            hidden_states=noisy,
            timestep=1 - timestep / 1000,
            encoder_hidden_states=batch["prompt_embeds"].to(noisy.dtype),
            encoder_attention_mask=batch["prompt_attention_mask"],
            return_dict=False,
        )[0]
        return -predicted
