"""A transformer over sequences of tokens, one after the other: transformers' ImageGPT (Chen et al. 2020), and how it draws."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling
from transformers.cache_utils import DynamicCache

from finetune.errors import UserError


@final
class TokenTransformer(nn.Module):
    """p(token | tokens before it, class), over `length` tokens of `vocabulary` values.

    A sequence starts with the token of its class, or of none: those follow the vocabulary, `vocabulary + class`.
    """

    def __init__(
        self, vocabulary: int, length: int, classes: int, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        if width % heads:
            raise UserError(
                f"{heads} heads cannot share a width of {width} evenly",
                where="net.heads",
                remedy="make net.width a multiple of it",
            )
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
        """tokens [B, N ≤ length] int64 → the logits of each given those before it, [B, N, vocabulary] float32."""
        before = torch.cat([self.starts(len(tokens), classes, tokens.device), tokens[:, :-1]], 1)
        result: Tensor = self.gpt(before, use_cache=False).logits[:, :, : self.vocabulary].float()
        return result

    def log_prob(self, tokens: Tensor, classes: Tensor | None) -> Tensor:
        """In nats, of each sequence, [B]."""
        return self(tokens, classes).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).sum(1)  # type: ignore[no-any-return]

    def generate(self, uniform: Tensor, classes: Tensor | None) -> Tensor:
        """uniform [B, length] → tokens [B, length]; keys and values of what is drawn are kept."""
        cache = DynamicCache(config=self.gpt.config)
        result = [self.starts(len(uniform), classes, uniform.device)]
        for place in range(self.length):
            logits = self.gpt(result[-1], past_key_values=cache, use_cache=True).logits[:, -1, : self.vocabulary]
            result.append(chosen(logits, uniform[:, place])[:, None])
        return torch.cat(result[1:], 1)

    def generate_uncached(self, uniform: Tensor, classes: Tensor | None) -> Tensor:
        """The same by a whole pass a token: what `draw` is tested and timed against."""
        result = self.starts(len(uniform), classes, uniform.device)
        for place in range(self.length):
            logits = self.gpt(result, use_cache=False).logits[:, -1, : self.vocabulary]
            result = torch.cat([result, chosen(logits, uniform[:, place])[:, None]], 1)
        return result[:, 1:]


def chosen(logits: Tensor, uniform: Tensor) -> Tensor:
    """logits [..., V], uniform [...] → the value where the cumulative probability passes it, [...] int64."""
    cumulative = logits.float().softmax(-1).cumsum(-1)
    return (uniform[..., None] > cumulative[..., :-1]).sum(-1)
