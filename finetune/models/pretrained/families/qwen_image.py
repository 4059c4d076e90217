"""Qwen-Image (Wu et al. 2025, arXiv:2508.02324): two streams, Qwen2.5-VL as text encoder, a video model's VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.models.pretrained.family import Family
from finetune.models.pretrained.packing import grid, patchify, sequence, unpatchify
from finetune.models.spec import FamilySpec, ModelSpec, Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from finetune.data.batch import Batch

SPEC = FamilySpec(
    slug="qwen-image",
    title="Qwen-Image",
    implementation=f"{__name__}:QwenImage",
    aliases=("qwen_image",),
    paper="2508.02324",
    pipeline="QwenImagePipeline",
    objective="flow",
    denoiser_class="QwenImageTransformer2DModel",
    variants={
        "qwen-image": Variant(
            hub=("Qwen/Qwen-Image",), resolution=1024, released="2025-08", license="Apache-2.0", preference=10
        )
    },
    single_file_keys=("transformer_blocks.0.img_mlp.net.0.proj.weight",),
    lora_formats={"kohya": "", "comfyui": ""},
    lora_targets={"mlp": (r"(img_mlp|txt_mlp)\.net\.(0\.proj|2)",)},
    modelspec={"": ModelSpec("qwen_image", "Qwen-Image", "https://github.com/QwenLM/Qwen-Image")},
)

TEMPLATE_TOKENS = 34  # of the pipeline's template before the caption; their states are removed
READ = 512  # tokens after them: the pipeline's `max_sequence_length`


class QwenImage(Family):
    spec = SPEC
    tokens = TEMPLATE_TOKENS + READ
    guidance = "true_cfg_scale"

    def written(self, pipeline: Any, caption: str) -> str:
        return str(pipeline.prompt_template_encode.format(caption))

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """Last hidden states after the template's beginning, [1, length, width], without padding.

        As `encode_prompt` for one prompt, which removes padding by a mask (fake tensors cannot) and also computes the
        logits of every token.
        """
        import torch

        ids = pipeline.tokenizer(
            self.written(pipeline, caption), max_length=self.tokens, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        read = pipeline.text_encoder(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, logits_to_keep=1
        )
        return {"prompt_embeds": read.hidden_states[-1][:, TEMPLATE_TOKENS:]}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """As in `Family`. Latents are a sequence of 2×2 patches."""
        import torch

        patches, embeddings = patchify(noisy), batch["prompt_embeds"].to(noisy.dtype)
        height, width = patches.shape[2:]
        lengths = batch.get("prompt_embeds.lengths")  # only if captions have several lengths
        mask = None if lengths is None else torch.arange(embeddings.shape[1], device=noisy.device) < lengths[:, None]
        velocity: Tensor = denoiser(
            hidden_states=sequence(patches),
            timestep=timestep / 1000,
            guidance=batch.get("guidance"),
            encoder_hidden_states_mask=mask,
            encoder_hidden_states=embeddings,
            img_shapes=[[(1, height, width)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpatchify(grid(velocity, height, width))

    def untrained(self, denoiser: Any) -> list[nn.Module]:
        """Parts of the last block that only the text's own output would need."""
        block = denoiser.transformer_blocks[-1]
        return [block.attn.add_q_proj, block.attn.norm_added_q, block.attn.to_add_out, block.txt_mlp]

    def call(self, positive: Batch, negative: Batch, guidance: float) -> dict[str, Any]:
        """With masks of ones: without them the pipeline warns about possible padding."""
        import torch

        arguments = super().call(positive, negative, guidance)
        masks = {
            f"{name}_mask": torch.ones(arguments[name].shape[:2], dtype=torch.int64, device=arguments[name].device)
            for name in list(arguments)
            if "embeds" in name
        }
        return arguments | masks
