"""Qwen-Image (Wu et al. 2025, arXiv:2508.02324): two streams of 60 blocks, read by Qwen2.5-VL, under the VAE of a video model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch
from finetune.models.base import Model
from finetune.models.pretrained.family import Family
from finetune.models.pretrained.model import TextToImage
from finetune.models.pretrained.vae import grid, patchify, sequence, unpatchify
from finetune.planning import Plan

TEMPLATE_TOKENS = 34  # of the pipeline's template before the caption; their states are left out
READ = 512  # tokens after them: the pipeline's `max_sequence_length`


class QwenImage(Family):
    pipeline = "QwenImagePipeline"
    objective = "flow"
    tokens = TEMPLATE_TOKENS + READ
    guidance = "true_cfg_scale"

    def written(self, pipeline: Any, caption: str) -> str:
        return str(pipeline.prompt_template_encode.format(caption))

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """The last states of what follows the template's beginning, [1, length, width], not padded.

        As `encode_prompt` does for one prompt; but that picks states by a mask, which no fake tensor can do, and computes what word
        would follow every token.
        """
        ids = pipeline.tokenizer(
            self.written(pipeline, caption), max_length=self.tokens, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        read = pipeline.text_encoder(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, logits_to_keep=1
        )
        return {"prompt_embeds": read.hidden_states[-1][:, TEMPLATE_TOKENS:]}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """As in `Family`: latents go in as a sequence of 2×2 patches."""
        patches, embeddings = patchify(noisy), batch["prompt_embeds"].to(noisy.dtype)
        height, width = patches.shape[2:]
        lengths = batch.get("prompt_embeds.lengths")  # only where captions of several lengths meet
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

    def unread(self, denoiser: Any) -> list[nn.Module]:
        """Of the last block all that only the text's own states would need."""
        block = denoiser.transformer_blocks[-1]
        return [block.attn.add_q_proj, block.attn.norm_added_q, block.attn.to_add_out, block.txt_mlp]

    def call(self, positive: Batch, negative: Batch, guidance: float) -> dict[str, Any]:
        """With masks of ones: without them the pipeline warns that there might be padding."""
        found = super().call(positive, negative, guidance)
        masks = {
            f"{name}_mask": torch.ones(found[name].shape[:2], dtype=torch.int64, device=found[name].device)
            for name in list(found)
            if "embeds" in name
        }
        return found | masks


FAMILY = QwenImage()


def build(plan: Plan, audit: Audit) -> Model:
    return TextToImage(plan, audit, FAMILY)
