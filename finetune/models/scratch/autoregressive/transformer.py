"""An autoregressive transformer over token sequences: transformers' ImageGPT (Chen et al. 2020), with sampling."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling
from transformers.cache_utils import DynamicCache


@final
class TokenTransformer(nn.Module):
    """p(token | previous tokens, class) over `length` tokens of `vocabulary` values.

    A sequence starts with the token of its class (or of "no class"), whose index is `vocabulary + class`.
    """

    def __init__(
        self, vocabulary: int, length: int, classes: int, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.vocabulary, self.length, self._classes = vocabulary, length, classes
        self.gpt = ImageGPTForCausalImageModeling(
            ImageGPTConfig(
                vocab_size=vocabulary + classes + 1,
                n_positions=length,
                n_embd=width,
                n_layer=layers,
                n_head=heads,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
            )
        )

    def starts(self, count: int, classes: Tensor | None, device: torch.device) -> Tensor:
        """The first token of each of `count` sequences, [B, 1]."""
        if classes is None:
            classes = torch.full((count,), self._classes, device=device)
        return (self.vocabulary + classes)[:, None]

    def forward(self, tokens: Tensor, classes: Tensor | None) -> Tensor:
        """Tokens [B, N ≤ length] int64 → logits of each given the previous ones, [B, N, vocabulary] float32."""
        before = torch.cat([self.starts(len(tokens), classes, tokens.device), tokens[:, :-1]], 1)
        result: Tensor = self.gpt(before, use_cache=False).logits[:, :, : self.vocabulary].float()
        return result

    def log_prob(self, tokens: Tensor, classes: Tensor | None) -> Tensor:
        """The log-probability of each sequence in nats, [B]."""
        logits: Tensor = self(tokens, classes)
        return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).sum(1)

    def generate(self, uniform: Tensor, classes: Tensor | None) -> Tensor:
        """Sample tokens [B, length] from uniform values [B, length], with cached keys and values."""
        cache = DynamicCache(config=self.gpt.config)
        result = [self.starts(len(uniform), classes, uniform.device)]
        for place in range(self.length):
            logits = self.gpt(result[-1], past_key_values=cache, use_cache=True).logits[:, -1, : self.vocabulary]
            result.append(chosen(logits, uniform[:, place])[:, None])
        return torch.cat(result[1:], 1)

    def generate_uncached(self, uniform: Tensor, classes: Tensor | None) -> Tensor:
        """Sample the same tokens with a full pass per token (the reference for tests and benchmarks)."""
        result = self.starts(len(uniform), classes, uniform.device)
        for place in range(self.length):
            logits = self.gpt(result, use_cache=False).logits[:, -1, : self.vocabulary]
            result = torch.cat([result, chosen(logits, uniform[:, place])[:, None]], 1)
        return result[:, 1:]


def chosen(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample categorically by inverting the CDF: logits [..., V], uniform values [...] → indices [...] int64."""
    cumulative = logits.float().softmax(-1).cumsum(-1)
    return (uniform[..., None] > cumulative[..., :-1]).sum(-1)
