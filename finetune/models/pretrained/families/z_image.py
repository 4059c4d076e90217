"""Z-Image (Tongyi-MAI 2025, arXiv:2511.22699), its base: one stream of image and text, read by Qwen3. Turbo is distilled and not for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch
from finetune.models.base import Model
from finetune.models.pretrained.family import Family, chat
from finetune.models.pretrained.model import TextToImage
from finetune.planning import Plan


class ZImage(Family):
    pipeline = "ZImagePipeline"
    objective = "flow"
    tokens = 512

    def written(self, pipeline: Any, caption: str) -> str:
        return chat(pipeline.tokenizer, caption, enable_thinking=True)

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """The last states but one, [1, length, width], not padded.

        As `encode_prompt`, which pads, and then picks what is no padding by a mask: no fake tensor can.
        """
        ids = pipeline.tokenizer(
            self.written(pipeline, caption), max_length=self.tokens, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        read = pipeline.text_encoder(
            input_ids=ids, attention_mask=torch.ones_like(ids).bool(), output_hidden_states=True
        )
        return {"prompt_embeds": read.hidden_states[-2]}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """The net counts time from noise, 0, to image, 1, and predicts against it."""
        captions = batch["prompt_embeds"].to(noisy.dtype).unbind()
        if "prompt_embeds.lengths" in batch:  # the net pads to multiples of 32 tokens, with a token that it has learned
            captions = tuple(
                caption[:length]
                for caption, length in zip(captions, batch["prompt_embeds.lengths"].tolist(), strict=True)
            )
        found = denoiser(list(noisy[:, :, None].unbind()), 1 - timestep / 1000, list(captions), return_dict=False)[0]
        return -torch.stack(found)[:, :, 0]

    def argument(self, condition: Tensor) -> Any:
        return list(condition.unbind())


FAMILY = ZImage()


def build(plan: Plan, audit: Audit) -> Model:
    return TextToImage(plan, audit, FAMILY)
