"""What is specific to one family of text-to-image models; what all families share is in `model`.

Importing this module imports no torch: a family's record (`SPEC`) lies in the same file as its implementation and is
read to list families, to check recipes and to estimate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from finetune.models import registry
from finetune.models.spec import FamilySpec

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from finetune.data.batch import Batch


class Family(ABC):
    """How a family's captions become conditions and how its denoiser is called.

    Conditions have the names of the pipeline's arguments (`prompt_embeds`, …). `conditions` gives them with a batch
    dimension of 1.
    """

    spec: ClassVar[FamilySpec]
    encoders: ClassVar[tuple[tuple[str, str], ...]] = (
        ("tokenizer", "text_encoder"),
    )  # (tokenizer, text encoder), by their names in the pipeline
    reader: ClassVar[str] = "tokenizer"  # the tokenizer whose encoder reads the most tokens
    tokens: ClassVar[int]  # the encoder reads at most this many tokens of `written`
    patch: ClassVar[int] = 2  # latent pixels per token of the denoiser, along one side
    guidance: ClassVar[str] = "guidance_scale"  # the pipeline's argument
    arguments: ClassVar[Mapping[str, Any]] = {}  # further arguments of the pipeline, the same for every image

    @abstractmethod
    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        """Encode a caption as the pipeline encodes a prompt, or a negative prompt (also for an empty caption)."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the denoiser as the pipeline does; returns what the objective compares with its target, [B, C, h, w].

        Args:
            noisy: [B, C, h, w] in the denoiser's dtype.
            timestep: [B] as the scheduler counts.
            batch: `conditions`, `geometry` [B, 6], and `guidance` [B] for networks that embed it.
        """

    def untrained(self, denoiser: Any) -> list[nn.Module]:
        """Parts of the denoiser that its output does not depend on. No gradient reaches them, so they do not train."""
        return []

    def written(self, pipeline: Any, caption: str) -> str:
        """The text that the tokenizer sees for a caption."""
        return caption

    def caption_tokens(self, pipeline: DiffusionPipeline, caption: str) -> tuple[int, int]:
        """(tokens of the text written for a caption, most tokens that are read)."""
        tokenizer = getattr(pipeline, self.reader)
        return len(tokenizer(self.written(pipeline, caption), verbose=False).input_ids), self.tokens

    def call(self, positive: Batch, negative: Batch, guidance: float) -> dict[str, Any]:
        """Conditions and guidance as arguments of the pipeline's call."""
        arguments = {name: self.argument(tensor) for name, tensor in positive.items()}
        arguments |= {f"negative_{name}": self.argument(tensor) for name, tensor in negative.items()}
        return arguments | {self.guidance: guidance} | dict(self.arguments)

    def argument(self, condition: Tensor) -> Any:
        """A condition as the pipeline takes it."""
        return condition


class ClipFamily(Family):
    """A family whose text encoders may train: conditions come from token ids, with gradients."""

    patch = 1

    @abstractmethod
    def embed(self, encoders: Mapping[str, nn.Module], ids: Batch) -> Batch:
        """Token ids, {tokenizer: [B, length] int64} → conditions."""

    def untrained_text(self, encoders: Mapping[str, nn.Module]) -> list[nn.Module]:
        """Parts of the text encoders that `embed` does not depend on."""
        return []

    def conditions(self, pipeline: Any, caption: str, negative: bool, device: torch.device) -> Batch:
        ids = {name: tensor[None].to(device) for name, tensor in self.token_ids(pipeline, caption).items()}
        return self.embed({name: getattr(pipeline, name) for _, name in self.encoders}, ids)

    def token_ids(self, pipeline: Any, caption: str) -> Batch:
        """{tokenizer: [length] int64}, padded and cut to the tokenizer's length."""
        ids = {}
        for name, _ in self.encoders:
            tokenizer = getattr(pipeline, name)
            # A new token of several vectors is spelled out, as the pipeline's own call does.
            ids[name] = tokenizer(
                pipeline.maybe_convert_prompt(caption, tokenizer),
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids[0]
        return ids

    def caption_tokens(self, pipeline: DiffusionPipeline, caption: str) -> tuple[int, int]:
        tokenizer = getattr(pipeline, self.reader)
        text = pipeline.maybe_convert_prompt(caption, tokenizer)
        return len(tokenizer(text, verbose=False).input_ids), tokenizer.model_max_length


def chat(tokenizer: Any, caption: str, **template: Any) -> str:
    """A caption as the user's turn in the tokenizer's chat template, up to where the answer would begin."""
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, **template
        )
    )


def family_of(name: str) -> Family:
    """The family that `model.family` of a recipe names."""
    found: Family = registry.load_implementation(name)()
    return found
