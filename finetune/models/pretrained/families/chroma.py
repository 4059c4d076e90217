"""Chroma (https://huggingface.co/lodestones/Chroma1-HD): FLUX.1 without pooled text or embedded guidance."""

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
    slug="chroma",
    title="Chroma1",
    implementation=f"{__name__}:Chroma",
    pipeline="ChromaPipeline",
    objective="flow",
    denoiser_class="ChromaTransformer2DModel",
    variants={
        "chroma": Variant(
            hub=("lodestones/Chroma1-HD",), resolution=1024, released="2025-08", license="Apache-2.0", preference=75
        )
    },
    single_file_keys=("distilled_guidance_layer.in_proj.bias",),
    lora_formats={"kohya": "finetune.adapters.formats.key_maps:FLUX", "comfyui": ""},
    lora_targets={"mlp": ("proj_mlp", r"single_transformer_blocks\.\d+\.proj_out")},
    modelspec={"": ModelSpec("chroma", "chroma", "https://huggingface.co/lodestones/Chroma")},
)


class Chroma(Family):
    spec = SPEC
    tokens = 512

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """T5's states of the caption and one padding token, [1, length, width]: the network attends to no more."""
        from torch.nn.functional import pad

        ids = pipeline.tokenizer(caption, max_length=self.tokens, truncation=True, return_tensors="pt").input_ids
        padding, token = (0, int(ids.shape[1] < self.tokens)), pipeline.text_encoder.config.pad_token_id
        mask, ids = pad(ids.new_ones(ids.shape), padding), pad(ids, padding, value=token)
        return {"prompt_embeds": pipeline.text_encoder(ids.to(device), attention_mask=mask.to(device))[0]}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """See `Family`. Captions of different lengths run one by one: diffusers' checkpointing drops their mask."""
        import torch

        states, lengths = batch["prompt_embeds"].to(noisy.dtype), batch.get("prompt_embeds.lengths")
        if lengths is not None:
            cut = [{"prompt_embeds": one[None, :length]} for one, length in zip(states, lengths.tolist(), strict=True)]
            rows = zip(noisy.split(1), timestep.split(1), cut, strict=True)
            return torch.cat([self.predict(denoiser, *row) for row in rows])
        patches = patchify(noisy)
        height, width = patches.shape[2:]
        velocity: Tensor = denoiser(
            hidden_states=sequence(patches),
            timestep=timestep / 1000,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=noisy.device),
            img_ids=places(height, width, noisy.device),
            return_dict=False,
        )[0]
        return unpatchify(grid(velocity, height, width))

    def untrained(self, denoiser: Any) -> list[nn.Module]:
        """The layers that compute all modulations from the timestep: training them degrades the model."""
        return [denoiser.distilled_guidance_layer]

    def call(self, positive: Batch, negative: Batch, guidance: float) -> dict[str, Any]:
        """With masks of ones: nothing in the conditions is padding."""
        arguments = super().call(positive, negative, guidance)
        masks = {
            name.replace("embeds", "attention_mask"): states for name, states in arguments.items() if "embeds" in name
        }
        return arguments | {name: states.new_ones(states.shape[:2]).bool() for name, states in masks.items()}
