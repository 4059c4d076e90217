"""Z-Image (Tongyi-MAI 2025, arXiv:2511.22699), base model: one stream of image and text; Qwen3 reads the text.

Do not train Turbo, which is distilled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.models.pretrained.family import Family, chat
from finetune.models.spec import FamilySpec, ModelSpec, Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from finetune.data.batch import Batch

SPEC = FamilySpec(
    slug="z-image",
    title="Z-Image",
    implementation=f"{__name__}:ZImage",
    aliases=("z_image",),
    paper="2511.22699",
    pipeline="ZImagePipeline",
    objective="flow",
    denoiser_class="ZImageTransformer2DModel",
    variants={
        "z-image": Variant(
            hub=("Tongyi-MAI/Z-Image",), resolution=1024, released="2025-11", license="Apache-2.0", preference=20
        )
    },
    single_file_keys=("layers.0.adaLN_modulation.0.weight",),
    lora_formats={"comfyui": ""},  # ComfyUI reads no Z-Image LoRA with kohya's names
    lora_original="finetune.adapters.formats.key_maps:Z_IMAGE",
    lora_targets={"mlp": (r"feed_forward\.(w|linear_)[123]",)},
    modelspec={"": ModelSpec("zimage", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image")},
)


class ZImage(Family):
    spec = SPEC
    tokens = 512

    def written(self, pipeline: Any, caption: str) -> str:
        return chat(pipeline.tokenizer, caption, enable_thinking=True)

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """Second-to-last hidden states, [1, length, width], without padding.

        As `encode_prompt`, which pads and then removes the padding by a mask, which fake tensors cannot do.
        """
        import torch

        ids = pipeline.tokenizer(
            self.written(pipeline, caption), max_length=self.tokens, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        read = pipeline.text_encoder(
            input_ids=ids, attention_mask=torch.ones_like(ids).bool(), output_hidden_states=True
        )
        return {"prompt_embeds": read.hidden_states[-2]}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """As in `Family`. The network's time runs from noise, 0, to image, 1, so its velocity has the opposite sign."""
        import torch

        captions = batch["prompt_embeds"].to(noisy.dtype).unbind()
        if "prompt_embeds.lengths" in batch:  # the network pads to multiples of 32 tokens with a learned one
            captions = tuple(
                caption[:length]
                for caption, length in zip(captions, batch["prompt_embeds.lengths"].tolist(), strict=True)
            )
        predicted = denoiser(list(noisy[:, :, None].unbind()), 1 - timestep / 1000, list(captions), return_dict=False)[
            0
        ]
        return -torch.stack(predicted)[:, :, 0]

    def argument(self, condition: Tensor) -> Any:
        return list(condition.unbind())
