"""Blocks of diffusers' frozen U-Nets without operators that change nothing: same results, fewer kernel launches.

While training, diffusers makes the input of a residual block's shortcut contiguous, so that the gradients of the
shortcut's weights have the weights' layout; and always the output of an attention block. In a channels-last network,
the next layer converts them back, and so does the backward pass. diffusers also divides sums by factors that are 1,
and every attention inspects the signature of its processor at each call.
"""

from __future__ import annotations

import inspect
from typing import Any, final

from diffusers.models import attention_processor, resnet
from diffusers.models.transformers import transformer_2d
from torch import Tensor, nn
from torch.nn import functional

from finetune.kernels import Unavailable

PLAIN = attention_processor.AttnProcessor2_0  # attention by PyTorch's kernel and nothing else


def patch(network: nn.Module) -> None:
    """Replace the plain blocks of `network` in place. Blocks that do more keep diffusers' code.

    The classes keep their names, since FSDP and offloading find blocks by name.

    Raises:
        Unavailable: the installed diffusers has other signatures or attributes; `network` is left as it is.
    """
    _check_signatures()
    kinds: tuple[Any, ...] = (ResnetBlock2D, Attention, Transformer2DModel)
    replaced = [
        (module, kind)
        for module in network.modules()
        for kind in kinds
        if type(module) is kind.__base__ and kind.fits(module)
    ]
    for module, kind in replaced:
        module.__class__ = kind


def _check_signatures() -> None:
    expected = {
        resnet.ResnetBlock2D.forward: ["input_tensor", "temb"],
        attention_processor.Attention.forward: ["hidden_states", "encoder_hidden_states", "attention_mask"],
        transformer_2d.Transformer2DModel._get_output_for_continuous_inputs: [
            "hidden_states", "residual", "batch_size", "height", "width", "inner_dim"
        ],
    }  # fmt: skip
    for function, names in expected.items():
        parameters = inspect.signature(function).parameters.values()
        plain = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        if plain[1:] != names:
            raise Unavailable(f"diffusers' {function.__qualname__} has another signature")


@final
class ResnetBlock2D(resnet.ResnetBlock2D):  # type: ignore[misc]
    """y = S x + f(g(x) + t), with the shortcut S, and f and g each a norm, SiLU and a convolution."""

    @staticmethod
    def fits(block: Any) -> bool:
        """Whether diffusers' `block` computes no more than this class."""
        plain = (
            block.upsample is None
            and block.downsample is None
            and block.time_embedding_norm == "default"
            and not block.skip_time_act
        )
        return plain and block.time_emb_proj is not None and block.output_scale_factor == 1

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """[B, in, H, W] and a time embedding [B, D] → [B, out, H, W]."""
        hidden: Tensor = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden))))
        shortcut: Tensor = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return shortcut + hidden


@final
class Attention(attention_processor.Attention):  # type: ignore[misc]
    """Self- or cross-attention by PyTorch's kernel. diffusers computes whatever else is asked for."""

    @staticmethod
    def fits(block: Any) -> bool:
        """Whether diffusers' `block` computes no more than this class."""
        norms = (block.spatial_norm, block.group_norm, block.norm_q, block.norm_k, block.norm_cross)
        return not any(norms) and not block.residual_connection and block.rescale_output_factor == 1

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """[B, S, D], and for cross-attention [B, T, D'] → [B, S, D]."""
        output: Tensor
        if attention_mask is not None or more or type(self.processor) is not PLAIN:
            output = super().forward(hidden_states, encoder_hidden_states, attention_mask, **more)
            return output
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected)
        output = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        for layer in self.to_out:
            output = layer(output)
        return output


@final
class Transformer2DModel(transformer_2d.Transformer2DModel):  # type: ignore[misc]
    """Attention blocks over the pixels of [B, C, H, W], whose output is channels-last."""

    @staticmethod
    def fits(block: Any) -> bool:
        """Whether diffusers' `block` computes no more than this class."""
        return bool(block.is_input_continuous)

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        output: Tensor = self.proj_out(hidden_states) if self.use_linear_projection else hidden_states
        output = output.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return (output if self.use_linear_projection else self.proj_out(output)) + residual
