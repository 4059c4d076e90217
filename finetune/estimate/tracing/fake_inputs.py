"""Tokenizer and scheduler for pipelines without weights, where values cannot be read."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from transformers import BatchEncoding

LETTERS_A_TOKEN = 4  # approximately, in English


@final
class FakeTokenizer:
    """A tokenizer that returns the maximum number of tokens for every text."""

    model_max_length = 77
    padding_side = "right"

    def __call__(self, text: str | list[str], max_length: int = 1, **_: Any) -> BatchEncoding:
        texts = 1 if isinstance(text, str) else len(text)
        ids = torch.zeros(texts, max_length, dtype=torch.int64)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def encode(self, text: str) -> list[int]:
        return [0] * (len(text) // LETTERS_A_TOKEN)

    def decode(self, ids: object) -> str:
        return "?"

    def tokenize(self, text: str) -> list[str]:
        """No tokens are learned."""
        return []

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return messages[0]["content"]

    @property
    def backend_tokenizer(self) -> FakeTokenizer:
        return self

    def to_str(self) -> str:
        return ""


@final
class FakeScheduler:
    """A flow-matching scheduler whose steps are a few operators on latents and read no values."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self, config: Any) -> None:
        self.config = config

    def set_timesteps(
        self, steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        self.timesteps = torch.empty(steps or len(sigmas))

    def set_begin_index(self, index: int) -> None:
        """All steps are alike."""

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return latents

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, **_: Any) -> tuple[Tensor]:
        return ((latents.float() + 0.5 * prediction).to(prediction.dtype),)
