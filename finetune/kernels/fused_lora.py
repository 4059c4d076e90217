"""LoRA layers in fewer kernel launches than PEFT's: same weights, same names, same results up to rounding.

At batch 1 a step of a large network waits for the host, and a LoRA layer of PEFT launches some twenty kernels beside
its base layer's three: the input is cast to float32 and back, A and B are cast one by one, the product is scaled and
added, and the backward pass mirrors all that. Here layers that read the same tensor (q, k and v of an attention)
share one cast of it and one product with their A's, which are concatenated; scale · B and the sum are part of one
product; gradients of the input are accumulated inside products.

For a convolution, PEFT's B is a 1×1 convolution, for which PyTorch rearranges memory on a CPU (im2col). Here it is a
matrix product that adds to the base's output, since channels are last in memory; where the base convolution is 1×1 as
well, the whole layer is matrix products of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, final

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.nn import functional

from finetune.kernels import ADAPTER_NAME, backend, enabled
from finetune.kernels.onednn_conv import Geometry, packed

# Layers of an attention that read the same tensor; in a cross-attention, q reads another one.
ATTENTION = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"), ("q_proj", "k_proj", "v_proj"))
CROSS_ATTENTION = (("to_q",), ("to_k", "to_v"))


def patch(network: nn.Module) -> None:
    """Replace the plain LoRA layers of `network` in place. Others (DoRA, quantized layers) keep PEFT's code."""
    for module in network.modules():
        if _is_plain_conv(module):
            module.__class__ = FusedConv2d
            # The layout in which the weight is read and its gradient arrives.
            cast(Any, module).lora_A.to(memory_format=torch.channels_last)
    for parent in network.modules():
        groups = _groups(parent)
        children = {name: child for name, child in parent.named_children() if _is_plain(child)}
        for child in children.values():
            child.__class__ = FusedLinear
        shared = [[children[name] for name in names if name in children] for names in groups]
        single = [[child] for name, child in children.items() if not any(name in names for names in groups)]
        for layers in filter(None, shared + single):
            group = Group(cast(list[FusedLinear], layers))
            for layer in layers:
                cast(FusedLinear, layer).group = group


def _groups(attention: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of the layers of `attention` that read the same tensor."""
    if not enabled("fused_lora.shared_input"):
        return ()
    return CROSS_ATTENTION if getattr(attention, "is_cross_attention", False) else ATTENTION


def _is_plain(module: Any) -> bool:
    return (
        type(module) is Linear
        and type(module.base_layer) is nn.Linear
        and not module.lora_variant
        and not module.lora_bias.get(ADAPTER_NAME)
    )


def _is_plain_conv(module: Any) -> bool:
    if (
        type(module) is not Conv2d
        or type(module.base_layer) is not nn.Conv2d
        or module.lora_variant
        or module.lora_bias.get(ADAPTER_NAME)
    ):
        return False
    base = module.base_layer
    return base.groups == 1 and base.padding_mode == "zeros" and not isinstance(base.padding, str)


@final
class FusedLinear(Linear):  # type: ignore[misc]
    """PEFT's layer; its group computes the output, unless more than base and LoRA is asked for."""

    group: Group

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[…, in] → […, out]."""
        if args or kwargs or not _computes_base_and_lora(self, x.device.type):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return self.group.output(self, x)


def _computes_base_and_lora(layer: Any, device: str) -> bool:
    """Whether PEFT's `layer` would now compute its base and its LoRA, nothing else, in the base's dtype."""
    weight = layer.base_layer.weight
    if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER_NAME] or weight.requires_grad:
        return False
    if backend.current().autocast_dtype(device) not in (None, weight.dtype):
        return False
    return isinstance(layer.lora_dropout[ADAPTER_NAME], nn.Identity) or not layer.training


@final
class Group:
    """Layers that read the same tensor.

    The first layer called computes for all; a layer called with another tensor, alone.
    """

    def __init__(self, layers: Sequence[FusedLinear]) -> None:
        self._layers = list(layers)
        self._input: Tensor | None = None
        self._pending: dict[FusedLinear, Tensor] = {}

    def output(self, layer: FusedLinear, values: Tensor) -> Tensor:
        """The output of `layer` for `values`, […, in] → […, out]."""
        if layer in self._pending and values is self._input:
            output = self._pending.pop(layer)
        else:
            layers = self._layers if layer is self._layers[0] else [layer]
            self._pending = dict(zip(layers, _outputs(layers, values), strict=True))
            output = self._pending.pop(layer)
        self._input = values if self._pending else None
        return output


def _outputs(layers: Sequence[FusedLinear], values: Tensor) -> tuple[Tensor, ...]:
    weights, biases = [layer.base_layer.weight for layer in layers], [layer.base_layer.bias for layer in layers]
    downs = [layer.lora_A[ADAPTER_NAME].weight for layer in layers]
    ups = [layer.lora_B[ADAPTER_NAME].weight for layer in layers]
    return products(values, [float(layer.scaling[ADAPTER_NAME]) for layer in layers], weights, biases, downs, ups)


def products(
    values: Tensor,
    scales: list[float],
    weights: list[Tensor],
    biases: list[Tensor | None],
    downs: list[Tensor],
    ups: list[Tensor],
) -> tuple[Tensor, ...]:
    """`values` […, in] → x Wᵀ + b + s (x Aᵀ) Bᵀ […, out] for each W, b, A (`downs`) and B (`ups`)."""
    outputs: tuple[Tensor, ...] = _Products.apply(values, scales, *weights, *biases, *downs, *ups)  # type: ignore[no-untyped-call]
    return outputs


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype, joined: int) -> tuple[Tensor, list[Tensor]]:
    """The first `joined` of `tensors` concatenated by rows, and the others, in `dtype`, by one kernel launch."""
    rows = [tensor.shape[0] for tensor in tensors[:joined]]
    if all(tensor.dtype == dtype for tensor in tensors):
        return (torch.cat(tuple(tensors[:joined])) if joined > 1 else tensors[0]), list(tensors[joined:])
    stacked = tensors[0].new_empty(sum(rows), tensors[0].shape[1], dtype=dtype)
    others = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors[joined:]]
    torch._foreach_copy_([*stacked.split(rows), *others], list(tensors))
    return stacked, others


@final
class _Products(torch.autograd.Function):
    """y_i = x W_iᵀ + b_i + s_i (x A_iᵀ) B_iᵀ for layers i, in the dtype of W.

    A and B are usually float32, and so are their gradients. With g_i the gradient of y_i: h_i = s_i g_i B_i, ∂A_i =
    h_iᵀ x, ∂B_i = s_i g_iᵀ (x A_iᵀ), ∂x = Σ (g_i W_i + h_i A_i).
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, scales: list[float], *parts: Tensor | None) -> tuple[Tensor, ...]:
        count = len(scales)
        weights, biases = cast(tuple[Tensor, ...], parts[:count]), parts[count : 2 * count]
        trained = cast(tuple[Tensor, ...], parts[2 * count :])
        dtype, ranks = weights[0].dtype, [tensor.shape[0] for tensor in trained[:count]]
        with torch.autocast(values.device.type, enabled=False):
            flat = values.reshape(-1, values.shape[-1]).to(dtype)
            down, ups = _cast(trained, dtype, count)
            inner = flat @ down.t()
            outputs = [functional.linear(flat, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            for output, part, up, scale in zip(outputs, inner.split(ranks, 1), ups, scales, strict=True):
                output.addmm_(part, up.t(), alpha=scale)
        ctx.save_for_backward(flat, inner, down, *ups, *weights)
        ctx.scales, ctx.ranks, ctx.shape, ctx.dtypes = scales, ranks, values.shape, (values.dtype, trained[0].dtype)
        return tuple(output.view(*values.shape[:-1], -1) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count, ranks = len(ctx.scales), ctx.ranks
        flat, inner, down, *rest = ctx.saved_tensors
        ups, weights = rest[:count], rest[count:]
        outer = [gradient.reshape(-1, gradient.shape[-1]).to(flat.dtype) for gradient in gradients]
        inner_gradient = torch.empty_like(inner)
        up_gradients = [torch.empty_like(up) for up in ups]
        for gradient, up, up_gradient, part, target, scale in zip(
            outer, ups, up_gradients, inner.split(ranks, 1), inner_gradient.split(ranks, 1), ctx.scales, strict=True
        ):  # beta=0: the uninitialized values are not read
            target.addmm_(gradient, up, beta=0, alpha=scale)
            up_gradient.addmm_(gradient.t(), part, beta=0, alpha=scale)
        down_gradients = (inner_gradient.t() @ flat).split(ranks)
        trained = list(down_gradients) + up_gradients
        if ctx.dtypes[1] != flat.dtype:
            exact = [torch.empty_like(tensor, dtype=ctx.dtypes[1]) for tensor in trained]
            torch._foreach_copy_(exact, trained)
            trained = exact
        input_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = outer[0] @ weights[0]
            for gradient, weight in zip(outer[1:], weights[1:], strict=True):
                input_gradient.addmm_(gradient, weight)
            input_gradient = input_gradient.addmm_(inner_gradient, down).view(ctx.shape).to(ctx.dtypes[0])
        return (input_gradient, None, *[None] * (2 * count), *trained)


@final
class FusedConv2d(Conv2d):  # type: ignore[misc]
    """PEFT's layer in fewer operators, unless more than base and LoRA is asked for."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, in, H, W] → [B, out, H', W']. A 1×1 convolution becomes matrix products; of another one, only B does."""
        if args or kwargs or not _computes_base_and_lora(self, x.device.type):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        base, scale = self.base_layer, float(self.scaling[ADAPTER_NAME])
        down, up = self.lora_A[ADAPTER_NAME].weight, self.lora_B[ADAPTER_NAME].weight
        geometry: Geometry = (base.stride, base.padding, base.dilation)
        if base.kernel_size == (1, 1) and geometry[:2] == ((1, 1), (0, 0)):
            pixels = _channels_last(x).permute(0, 2, 3, 1)
            (output,) = products(
                pixels, [scale], [base.weight.flatten(1)], [base.bias], [down.flatten(1)], [up.flatten(1)]
            )
            return output.permute(0, 3, 1, 2)
        return cast(Tensor, _Convolution.apply(x, scale, geometry, base.weight, base.bias, down, up))  # type: ignore[no-untyped-call]


def _channels_last(pixels: Tensor) -> Tensor:
    return pixels.contiguous(memory_format=torch.channels_last)


def _rows(pixels: Tensor) -> Tensor:
    """A view of channels-last [B, C, H, W] as [B · H · W, C]."""
    return pixels.permute(0, 2, 3, 1).view(-1, pixels.shape[1])


@final
class _Convolution(torch.autograd.Function):
    """y = W * x + b + s B (A * x), with * a convolution and B a matrix at each pixel, in the dtype of W.

    With g the gradient of y and h = s Bᵀ g: ∂B = s Σ g (A * x)ᵀ over the pixels, ∂A is the gradient of A * x for h,
    and ∂x the sum of those of W * x for g and of A * x for h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        scale: float,
        geometry: Geometry,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
    ) -> Tensor:
        dtype = weight.dtype
        with torch.autocast(values.device.type, enabled=False):
            inputs, kernel = _channels_last(values.to(dtype)), _channels_last(down.to(dtype))
            matrix = up.flatten(1).to(dtype)
            inner = _channels_last(functional.conv2d(inputs, kernel, None, *geometry))
            base = packed(weight, geometry, inputs)
            output = _channels_last(
                functional.conv2d(inputs, weight, bias, *geometry) if base is None else base(inputs, bias)
            )
            _rows(output).addmm_(_rows(inner), matrix.t(), alpha=scale)
        ctx.save_for_backward(inputs, weight, kernel, matrix, inner)
        ctx.base, ctx.scale, ctx.geometry, ctx.dtypes = base, scale, geometry, (values.dtype, down.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, kernel, matrix, inner = ctx.saved_tensors
        outer = _channels_last(gradient.to(inputs.dtype))
        inner_gradient, up_gradient = torch.empty_like(inner), torch.empty_like(matrix)
        # beta=0: the uninitialized values are not read
        _rows(inner_gradient).addmm_(_rows(outer), matrix, beta=0, alpha=ctx.scale)
        up_gradient.addmm_(_rows(outer).t(), _rows(inner), beta=0, alpha=ctx.scale)
        input_gradient, down_gradient = _gradients(ctx, inner_gradient, inputs, kernel, (ctx.needs_input_grad[0], True))
        if input_gradient is not None:
            if ctx.base is None:
                input_gradient.add_(cast(Tensor, _gradients(ctx, outer, inputs, weight, (True, False))[0]))
            else:
                input_gradient = _channels_last(input_gradient)
                ctx.base.add_input_gradient(input_gradient, outer)
            input_gradient = input_gradient.to(ctx.dtypes[0])
        trained = [cast(Tensor, tensor).to(ctx.dtypes[1]) for tensor in (down_gradient, up_gradient[..., None, None])]
        return (input_gradient, None, None, None, None, *trained)


def _gradients(
    ctx: Any, gradient: Tensor, inputs: Tensor, kernel: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a convolution's input and kernel, as far as `wanted`."""
    gradients: tuple[Tensor | None, Tensor | None, None] = torch.ops.aten.convolution_backward(
        gradient, inputs, kernel, None, *ctx.geometry, False, [0, 0], 1, [*wanted, False]
    )
    return gradients[:2]
