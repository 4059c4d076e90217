"""Blocks of diffusers' frozen U-Nets without what changes nothing: the same numbers from fewer operators.

While it trains, diffusers lays the input of a residual block's shortcut out anew, channels first, lest the gradients of its weights lie
otherwise than they do; and always the output of an attention block. In a net whose channels lie last, they are turned back by what reads
them, and so are their gradients. Sums are divided by factors that are 1, and each attention asks by introspection what its processor takes.
"""

from __future__ import annotations

from typing import Any, final

from diffusers.models import attention_processor, resnet
from diffusers.models.transformers import transformer_2d
from torch import Tensor, nn
from torch.nn import functional


def straighten(net: nn.Module) -> None:
    """Let the blocks of `net` leave out what changes nothing, in place. Blocks that do more than a plain one stay as they are.

    They keep their names, by which nets are cut into parts.
    """
    for module in net.modules():
        for kind in (ResnetBlock2D, Attention, Transformer2DModel):
            if type(module) is kind.__base__ and kind.fits(module):
                module.__class__ = kind


@final
class ResnetBlock2D(resnet.ResnetBlock2D):  # type: ignore[misc]
    """y = S x + f(g(x) + t), with the shortcut S, and f and g a norm, SiLU and a convolution."""

    @staticmethod
    def fits(block: Any) -> bool:
        plain = (
            block.upsample is None
            and block.downsample is None
            and block.time_embedding_norm == "default"
            and not block.skip_time_act
        )
        return plain and block.time_emb_proj is not None and block.output_scale_factor == 1

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """[B, in, H, W] and an embedding of time [B, D] → [B, out, H, W]."""
        hidden: Tensor = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden))))
        kept: Tensor = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return kept + hidden


@final
class Attention(attention_processor.Attention):  # type: ignore[misc]
    """Attention of tokens to themselves or to others, by torch's kernel. What is asked for beyond that, diffusers does."""

    @staticmethod
    def fits(block: Any) -> bool:
        norms = (block.spatial_norm, block.group_norm, block.norm_q, block.norm_k, block.norm_cross)
        return not any(norms) and not block.residual_connection and block.rescale_output_factor == 1

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """[B, S, D], and where it attends to others [B, T, D'] → [B, S, D]."""
        found: Tensor
        if attention_mask is not None or more or type(self.processor) is not attention_processor.AttnProcessor2_0:
            found = super().forward(hidden_states, encoder_hidden_states, attention_mask, **more)
            return found
        others = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        made = self.to_q(hidden_states), self.to_k(others), self.to_v(others)
        query, key, value = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in made)
        found = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        for layer in self.to_out:
            found = layer(found)
        return found


@final
class Transformer2DModel(transformer_2d.Transformer2DModel):  # type: ignore[misc]
    """Attention blocks over the pixels of [B, C, H, W], whose output has its channels last."""

    @staticmethod
    def fits(block: Any) -> bool:
        return bool(block.is_input_continuous)

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        found: Tensor = self.proj_out(hidden_states) if self.use_linear_projection else hidden_states
        found = found.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return (found if self.use_linear_projection else self.proj_out(found)) + residual
