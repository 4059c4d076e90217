"""Quantized frozen linear layers, in 4 or 8 bits.

QLoRA: Dettmers et al. 2023, arXiv:2305.14314; LLM.int8(): Dettmers et al. 2022, arXiv:2208.07339.

The kernels are bitsandbytes'. Layers are replaced after loading, on any device (diffusers' own loader needs a GPU).
Only weights are rounded; products are computed in the run's precision, and gradients are exact for what was computed.

A quantized base differs from the base that the LoRA will be used with, so samples on it would look better than what
users get. Samples are therefore generated with the full weights (`whole_weights`), which are kept in host memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, final

import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes
import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.config.schema import Quantization

SMALLEST = 4096  # weights; quantizing smaller layers saves nothing
BLOCK = 64  # weights of NF4 that share a scale


def quantize(
    net: nn.Module, kind: Quantization, dtype: torch.dtype, device: torch.device | str = "cpu", keep_whole: bool = False
) -> list[str]:
    """Quantize the linear layers of a network's repeated blocks, in place; returns their names.

    Not quantized: layers outside the blocks (embeddings of patches, time and text, the last norm and projection),
    which every token passes through and which are a percent or two of the weights; convolutions, for which there are
    no kernels; layers with fewer than `SMALLEST` weights.

    Args:
        dtype: dtype of the products.
        device: where they are quantized and stay: a GPU takes milliseconds per layer, a CPU a second.
        keep_whole: also keep the original weights in host memory, for `whole_weights`.
    """
    names = quantizable(net)
    for name in names:
        layer: Any = net.get_submodule(name)
        net.set_submodule(name, QuantizedLinear(layer, kind, dtype, torch.device(device), keep_whole))
    return names


def quantizable(net: nn.Module) -> list[str]:
    """Names of the layers that `quantize` would replace. An adapter's own layers are never among them."""
    large = [
        name for name, layer in net.named_modules() if type(layer) is nn.Linear and layer.weight.numel() >= SMALLEST
    ]
    return [name for name in large if ".lora_" not in name and _in_blocks(net, name)]


def _in_blocks(net: nn.Module, name: str) -> bool:
    """Whether a layer is inside a list of blocks."""
    parts = name.split(".")
    return any(isinstance(net.get_submodule(".".join(parts[:end])), nn.ModuleList) for end in range(1, len(parts)))


@contextlib.contextmanager
def whole_weights(net: nn.Module) -> Iterator[None]:
    """Compute with the original weights inside this context.

    Each layer copies them from host memory while it computes.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, QuantizedLinear)]
    for layer in layers:
        layer.computes_whole = layer.whole is not None
    try:
        yield
    finally:
        for layer in layers:
            layer.computes_whole = False


def dtype_of(net: nn.Module) -> torch.dtype:
    """The dtype that a network computes in: that of its first floating-point parameter."""
    return next(parameter.dtype for parameter in net.parameters() if parameter.is_floating_point())


@final
class QuantizedLinear(nn.Linear):
    """A frozen, quantized linear layer.

    `weight` is int8: a row's weights divided by the largest of them, × 127; or two NF4 values per byte (as int8, by
    which other classes recognize quantized weights). `scales` are float32: one per row, or with NF4 one per `BLOCK`
    weights, 4.5 bits per weight in total. (8-bit scales, QLoRA's double quantization, would make that 4.13: a twelfth
    less memory for one more kernel at each use.)
    """

    weight: nn.Parameter
    scales: Tensor

    def __init__(
        self, layer: nn.Linear, kind: Quantization, dtype: torch.dtype, device: torch.device, keep_whole: bool
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, dtype
        whole = layer.weight.detach()
        weight, scales = _to_nf4(whole.to(device)) if kind == "nf4" else _to_int8(whole.to(device))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
        self.whole = whole.to("cpu") if keep_whole else None  # not a buffer: `.to` would move it
        self.computes_whole = False
        self.packed_away = whole.numel() - weight.numel()  # weights that it represents beyond its own elements

    def forward(self, values: Tensor) -> Tensor:
        """[…, in] → […, out] in the layer's dtype."""
        values = values.to(self.dtype)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        if self.computes_whole and self.whole is not None:
            return functional.linear(values, self.whole.to(values.device, self.dtype, copy=True), bias)
        shape = self.out_features, self.in_features
        output: Tensor = _Product.apply(values, bias, self.weight, self.scales, shape)  # type: ignore[no-untyped-call]
        return output

    def dequantize(self) -> Tensor:
        """The dequantized weights, [out, in]."""
        return dequantized(self.weight, self.scales, (self.out_features, self.in_features), self.dtype)

    @property
    def W_q(self) -> Tensor:  # noqa: N802 (PEFT looks for this name before it calls `dequantize`)
        return self.weight


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    packed, scales = torch.ops.bitsandbytes.quantize_4bit(weight.contiguous(), BLOCK, "nf4", torch.uint8)
    return packed.view(torch.int8), scales


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    packed, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
    return packed, scales


def dequantized(weight: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantize a layer's tensors to weights [out, in]. int8 has that shape; NF4 has two weights per byte."""
    if weight.shape == shape:
        return weight.to(dtype).mul_((scales / 127).unsqueeze(1))
    weights: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        weight.view(torch.uint8), scales, BLOCK, "nf4", list(shape), dtype
    )
    return weights


@final
class _Product(torch.autograd.Function):
    """values × weightᵀ + bias.

    It saves neither the input nor the dequantized weights; the backward pass computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, bias: Tensor | None, weight: Tensor, scales: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.shape = shape
        return functional.linear(values, dequantized(weight, scales, shape, values.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        return gradients[0] @ dequantized(weight, scales, ctx.shape, gradients[0].dtype), None, None, None, None
