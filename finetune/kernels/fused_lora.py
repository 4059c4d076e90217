"""LoRA layers in fewer launches than PEFT's: the same weights by the same names, the same numbers but for rounding.

At batch 1 a step of a large net waits for the host, and a LoRA layer of PEFT's launches some twenty kernels beside its base's three:
the input goes to float32 and back, A and B are cast one by one, the product is scaled and added, and the backward pass mirrors all
that. Here layers that read one tensor (an attention's q, k and v) share one cast of it and one product with their A's, laid side by
side; scale · B and the sum are part of one product; gradients of the input add up inside products.

Of a convolution's layer, PEFT's B is a 1×1 convolution, which torch lays out anew on a CPU (im2col). Here it is a product as well, into
the base's output, as channels lie last in memory; and where the base's own convolution is 1×1, all of the layer is products of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, final

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn
from torch.nn import functional

from finetune.kernels.onednn_conv import Geometry, packed
from finetune.kernels.unet_blocks import straighten

NAME = "default"  # what diffusers and transformers call an adapter that is given no name
# Layers of an attention that read the same tensor; of a cross-attention, q reads another.
ATTENTION = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"), ("q_proj", "k_proj", "v_proj"))
CROSS_ATTENTION = (("to_q",), ("to_k", "to_v"))


def fuse(net: nn.Module) -> None:
    """Let the plain LoRA layers of `net` go together, in place, and straighten its blocks. Others (DoRA's, quantized ones) stay PEFT's."""
    straighten(net)
    for module in net.modules():
        if _plain_convolution(module):
            module.__class__ = FusedConv2d  # the same layer, with another `forward`
            cast(Any, module).lora_A.to(memory_format=torch.channels_last)  # as it is read, and as its gradient comes
    for parent in net.modules():
        groups = CROSS_ATTENTION if getattr(parent, "is_cross_attention", False) else ATTENTION
        children = {name: child for name, child in parent.named_children() if _plain(child)}
        for child in children.values():
            child.__class__ = FusedLinear
        together = [[children[name] for name in names if name in children] for names in groups]
        alone = [[child] for name, child in children.items() if not any(name in names for names in groups)]
        for layers in filter(None, together + alone):
            group = Group(cast(list[FusedLinear], layers))
            for layer in layers:
                cast(FusedLinear, layer).group = group


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast has products computed in now; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _plain(module: Any) -> bool:
    return (
        type(module) is Linear
        and type(module.base_layer) is nn.Linear
        and not module.lora_variant
        and not module.lora_bias.get(NAME)
    )


def _plain_convolution(module: Any) -> bool:
    if (
        type(module) is not Conv2d
        or type(module.base_layer) is not nn.Conv2d
        or module.lora_variant
        or module.lora_bias.get(NAME)
    ):
        return False
    base = module.base_layer
    return base.groups == 1 and base.padding_mode == "zeros" and not isinstance(base.padding, str)


@final
class FusedLinear(Linear):  # type: ignore[misc]
    """PEFT's layer, whose output its group computes, where nothing but base and LoRA is wanted."""

    group: Group

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not usual(self, x.device.type):
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        return self.group.output(self, x)


def usual(layer: Any, device: str) -> bool:
    """Whether nothing but base and LoRA is wanted of PEFT's `layer`, now."""
    weight = layer.base_layer.weight
    if layer.disable_adapters or layer.merged or layer.active_adapters != [NAME] or weight.requires_grad:
        return False
    if autocast_dtype(device) not in (None, weight.dtype):
        return False  # whoever computes in another precision than the base's does it by PEFT
    return isinstance(layer.lora_dropout[NAME], nn.Identity) or not layer.training


@final
class Group:
    """Layers that read the same tensor. The first one asked computes for all; a layer that is asked about another tensor computes alone."""

    def __init__(self, layers: Sequence[FusedLinear]) -> None:
        self._layers = list(layers)
        self._input: Tensor | None = None
        self._waiting: dict[FusedLinear, Tensor] = {}

    def output(self, layer: FusedLinear, values: Tensor) -> Tensor:
        """What `layer` makes of `values`, […, in] → […, out]."""
        if layer in self._waiting and values is self._input:
            found = self._waiting.pop(layer)
        else:
            layers = self._layers if layer is self._layers[0] else [layer]
            self._waiting = dict(zip(layers, _together(layers, values), strict=True))
            found = self._waiting.pop(layer)
        self._input = values if self._waiting else None
        return found


def _together(layers: Sequence[FusedLinear], values: Tensor) -> tuple[Tensor, ...]:
    weights, biases = [layer.base_layer.weight for layer in layers], [layer.base_layer.bias for layer in layers]
    downs, ups = [layer.lora_A[NAME].weight for layer in layers], [layer.lora_B[NAME].weight for layer in layers]
    return products(values, [float(layer.scaling[NAME]) for layer in layers], weights, biases, downs, ups)


def products(
    values: Tensor,
    scales: list[float],
    weights: list[Tensor],
    biases: list[Tensor | None],
    downs: list[Tensor],
    ups: list[Tensor],
) -> tuple[Tensor, ...]:
    """`values` […, in] → x Wᵀ + b + s (x Aᵀ) Bᵀ […, out] by each W, b, A (`downs`) and B (`ups`)."""
    found: tuple[Tensor, ...] = _Products.apply(values, scales, *weights, *biases, *downs, *ups)  # type: ignore[no-untyped-call]
    return found


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype, joined: int) -> tuple[Tensor, list[Tensor]]:
    """The first `joined` of `tensors` one below the other, and each of the others, in `dtype`; all by one launch."""
    rows = [tensor.shape[0] for tensor in tensors[:joined]]
    if all(tensor.dtype == dtype for tensor in tensors):
        return (torch.cat(tuple(tensors[:joined])) if joined > 1 else tensors[0]), list(tensors[joined:])
    below = tensors[0].new_empty(sum(rows), tensors[0].shape[1], dtype=dtype)
    others = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors[joined:]]
    torch._foreach_copy_([*below.split(rows), *others], list(tensors))
    return below, others


@final
class _Products(torch.autograd.Function):
    """y_i = x W_iᵀ + b_i + s_i (x A_iᵀ) B_iᵀ for layers i, in the dtype of W; A and B are usually float32, and so are their gradients.

    With g_i the gradient of y_i: h_i = s_i g_i B_i, ∂A_i = h_iᵀ x, ∂B_i = s_i g_iᵀ (x A_iᵀ), ∂x = Σ (g_i W_i + h_i A_i).
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
            found = [functional.linear(flat, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            for output, share, up, scale in zip(found, inner.split(ranks, 1), ups, scales, strict=True):
                output.addmm_(share, up.t(), alpha=scale)
        ctx.save_for_backward(flat, inner, down, *ups, *weights)
        ctx.scales, ctx.ranks, ctx.shape, ctx.dtypes = scales, ranks, values.shape, (values.dtype, trained[0].dtype)
        return tuple(output.view(*values.shape[:-1], -1) for output in found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count, ranks = len(ctx.scales), ctx.ranks
        flat, inner, down, *rest = ctx.saved_tensors
        ups, weights = rest[:count], rest[count:]
        given = [gradient.reshape(-1, gradient.shape[-1]).to(flat.dtype) for gradient in gradients]
        back = torch.empty_like(inner)
        of_ups = [torch.empty_like(up) for up in ups]
        for gradient, up, of_up, share, into, scale in zip(
            given, ups, of_ups, inner.split(ranks, 1), back.split(ranks, 1), ctx.scales, strict=True
        ):  # β = 0: what stands in the new tensors is not read
            into.addmm_(gradient, up, beta=0, alpha=scale)
            of_up.addmm_(gradient.t(), share, beta=0, alpha=scale)
        of_downs = (back.t() @ flat).split(ranks)
        trained = list(of_downs) + of_ups
        if ctx.dtypes[1] != flat.dtype:
            exact = [torch.empty_like(tensor, dtype=ctx.dtypes[1]) for tensor in trained]
            torch._foreach_copy_(exact, trained)
            trained = exact
        of_values = None
        if ctx.needs_input_grad[0]:
            of_values = given[0] @ weights[0]
            for gradient, weight in zip(given[1:], weights[1:], strict=True):
                of_values.addmm_(gradient, weight)
            of_values = of_values.addmm_(back, down).view(ctx.shape).to(ctx.dtypes[0])
        return (of_values, None, *[None] * (2 * count), *trained)


@final
class FusedConv2d(Conv2d):  # type: ignore[misc]
    """PEFT's layer, [B, in, H, W] → [B, out, H', W'], in fewer operators where nothing but base and LoRA is wanted."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; a 1×1 convolution is products of pixels, another has its LoRA's B as one."""
        if args or kwargs or not usual(self, x.device.type):
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        base, down, up, scale = (
            self.base_layer,
            self.lora_A[NAME].weight,
            self.lora_B[NAME].weight,
            float(self.scaling[NAME]),
        )
        geometry: Geometry = (base.stride, base.padding, base.dilation)
        if base.kernel_size == (1, 1) and geometry[:2] == ((1, 1), (0, 0)):
            pixels = _last(x).permute(0, 2, 3, 1)
            (output,) = products(
                pixels, [scale], [base.weight.flatten(1)], [base.bias], [down.flatten(1)], [up.flatten(1)]
            )
            return output.permute(0, 3, 1, 2)
        return cast(Tensor, _Convolution.apply(x, scale, geometry, base.weight, base.bias, down, up))  # type: ignore[no-untyped-call]


def _last(pixels: Tensor) -> Tensor:
    return pixels.contiguous(memory_format=torch.channels_last)


def _rows(pixels: Tensor) -> Tensor:
    """[B, C, H, W] whose channels lie last in memory → [B · H · W, C], the same memory."""
    return pixels.permute(0, 2, 3, 1).view(-1, pixels.shape[1])


@final
class _Convolution(torch.autograd.Function):
    """y = W * x + b + s B (A * x), with * a convolution and B a matrix at each pixel, in the dtype of W.

    With g the gradient of y and h = s Bᵀ g: ∂B = s Σ g (A * x)ᵀ over the pixels, ∂A that of A * x for h, and ∂x those of W * x for g and
    of A * x for h.
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
            inputs, kernel, matrix = _last(values.to(dtype)), _last(down.to(dtype)), up.flatten(1).to(dtype)
            inner, base = _last(functional.conv2d(inputs, kernel, None, *geometry)), packed(weight, geometry, inputs)
            found = _last(functional.conv2d(inputs, weight, bias, *geometry) if base is None else base(inputs, bias))
            _rows(found).addmm_(_rows(inner), matrix.t(), alpha=scale)
        ctx.save_for_backward(inputs, weight, kernel, matrix, inner)
        ctx.base, ctx.scale, ctx.geometry, ctx.dtypes = base, scale, geometry, (values.dtype, down.dtype)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, kernel, matrix, inner = ctx.saved_tensors
        given = _last(gradient.to(inputs.dtype))
        back, of_matrix = torch.empty_like(inner), torch.empty_like(matrix)
        # β = 0: what stands in the new tensors is not read
        _rows(back).addmm_(_rows(given), matrix, beta=0, alpha=ctx.scale)
        of_matrix.addmm_(_rows(given).t(), _rows(inner), beta=0, alpha=ctx.scale)
        of_values, of_kernel = _gradients(ctx, back, inputs, kernel, (ctx.needs_input_grad[0], True))
        if of_values is not None:
            if ctx.base is None:
                of_values.add_(cast(Tensor, _gradients(ctx, given, inputs, weight, (True, False))[0]))
            else:
                of_values = _last(of_values)
                ctx.base.add_back(of_values, given)
            of_values = of_values.to(ctx.dtypes[0])
        trained = [cast(Tensor, one).to(ctx.dtypes[1]) for one in (of_kernel, of_matrix[..., None, None])]
        return (of_values, None, None, None, None, *trained)


def _gradients(
    ctx: Any, gradient: Tensor, inputs: Tensor, kernel: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of the input and the kernel of a convolution, as `wanted`."""
    found: tuple[Tensor | None, Tensor | None, None] = torch.ops.aten.convolution_backward(
        gradient, inputs, kernel, None, *ctx.geometry, False, [0, 0], 1, [*wanted, False]
    )
    return found[:2]
