"""What is peculiar to one family of text-to-image models; what families share is in `text_to_image`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from finetune.data.batch import Batch
from finetune.models.objectives.flow_matching import Sampling
from finetune.models.registry import load_module


class Family(ABC):
    """How a family's captions become conditions and how its denoiser is called.

    Conditions have the names of the pipeline's arguments (`prompt_embeds`, …), with a batch dimension of 1 as `conditions` gives
    them. `pipeline` and `objective` are also read without importing the module (`finetune.models.pretrained.check`): write each on its line.
    """

    pipeline: ClassVar[str]
    objective: ClassVar[Literal["noise", "flow"]]
    denoiser: ClassVar[str] = "transformer"
    encoders: ClassVar[tuple[tuple[str, str], ...]] = (
        ("tokenizer", "text_encoder"),
    )  # (tokenizer, text encoder), by their names in the pipeline
    reader: ClassVar[str] = "tokenizer"  # the tokenizer whose encoder reads most of a caption
    tokens: ClassVar[int]  # of what `written` gives, so many are read
    patch: ClassVar[int] = 2  # latent pixels a token of the denoiser, along one side
    sampling: ClassVar[Sampling] = "logit_normal"  # how noise levels were drawn in its training; for flows
    guidance: ClassVar[str] = "guidance_scale"  # the pipeline's argument
    arguments: ClassVar[Mapping[str, Any]] = {}  # more of the pipeline's, the same for every image

    @abstractmethod
    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """What the pipeline's own call makes of a caption: of a prompt, or (also for an empty caption) of a negative prompt."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """What the objective's target is compared with, [B, C, h, w], by the net called as the pipeline calls it.

        Args:
            noisy: [B, C, h, w] in the net's dtype.
            timestep: [B] as the scheduler counts.
            batch: `conditions`, `geometry` [B, 6], and `guidance` [B] for nets that embed it.
        """

    def unread(self, denoiser: Any) -> list[nn.Module]:
        """Parts of the denoiser that its output does not depend on: no gradient reaches them, so they do not train."""
        return []

    def written(self, pipeline: Any, caption: str) -> str:
        """The text that the tokenizer sees for a caption."""
        return caption

    def caption_tokens(self, pipeline: DiffusionPipeline, caption: str) -> tuple[int, int]:
        """(tokens of what is written for a caption, most that are read)."""
        tokenizer = getattr(pipeline, self.reader)
        return len(tokenizer(self.written(pipeline, caption), verbose=False).input_ids), self.tokens

    def call(self, positive: Batch, negative: Batch, guidance: float) -> dict[str, Any]:
        """Conditions and guidance as arguments of the pipeline's call."""
        found = {name: self.argument(tensor) for name, tensor in positive.items()}
        found |= {f"negative_{name}": self.argument(tensor) for name, tensor in negative.items()}
        return found | {self.guidance: guidance} | dict(self.arguments)

    def argument(self, condition: Tensor) -> Any:
        """A condition as the pipeline takes it."""
        return condition


class ClipFamily(Family):
    """A family whose text encoders may train: conditions come from token ids, with gradients."""

    objective = "noise"
    denoiser = "unet"
    patch = 1

    @abstractmethod
    def embed(self, encoders: Mapping[str, nn.Module], ids: Batch) -> Batch:
        """Token ids, {tokenizer: [B, length] int64} → conditions."""

    def unread_text(self, encoders: Mapping[str, nn.Module]) -> list[nn.Module]:
        """Parts of the text encoders that `embed` does not depend on."""
        return []

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        ids = {name: tensor[None].to(device) for name, tensor in self.token_ids(pipeline, caption).items()}
        return self.embed({name: getattr(pipeline, name) for _, name in self.encoders}, ids)

    def token_ids(self, pipeline: Any, caption: str) -> Batch:
        """{tokenizer: [length] int64}, padded and cut to the tokenizer's length."""
        found = {}
        for name, _ in self.encoders:
            tokenizer = getattr(pipeline, name)
            # A new word of several vectors is spelled out, as the pipeline's own call does.
            found[name] = tokenizer(
                pipeline.maybe_convert_prompt(caption, tokenizer),
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids[0]
        return found

    def caption_tokens(self, pipeline: DiffusionPipeline, caption: str) -> tuple[int, int]:
        tokenizer = getattr(pipeline, self.reader)
        return len(
            tokenizer(pipeline.maybe_convert_prompt(caption, tokenizer), verbose=False).input_ids
        ), tokenizer.model_max_length


def chat(tokenizer: Any, caption: str, **template: Any) -> str:
    """A caption as what a user says, by the tokenizer's own template of a conversation, up to where the answer would begin."""
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, **template
        )
    )


def family_of(name: str) -> Family:
    """The family that a recipe's `model.family` names: `FAMILY` in its module."""
    found: Family = load_module(name).FAMILY
    return found
