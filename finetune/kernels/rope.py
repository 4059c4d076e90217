"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) of FLUX.1 and FLUX.2 in one product each way, as of complex numbers.

diffusers turns queries and keys by real numbers: a negation, a stack, two products and a sum, and as many in the backward pass, twice in
every block. And it leaves them in float32, to which autocast's norms took them, until attention casts them; what attention returns is then
cast back to that, laid beside the MLP's values in float32, and rounded again by the next layer. Here they are rounded when they are turned.
Both are the same numbers: the first but for float32's rounding, the second exactly.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any, final

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from finetune.kernels import fused_lora

PROCESSORS: tuple[type, ...] = (FluxAttnProcessor, Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor)
_turns = WeakIdKeyDictionary()  # a step's cosines → its turns, there and back: they last as long as the cosines


def rotate_at_once(net: nn.Module) -> None:
    """Let the attentions of `net` turn by complex products, in place. Nets of other families, and other nets of these, stay as they are."""
    for module in net.modules():
        processor: Any = getattr(module, "processor", None)
        kind: Any = type(processor)
        if kind in PROCESSORS:
            processor.__class__ = _rotating(kind)


@functools.cache
def _rotating(kind: Any) -> type:
    """A processor with the code of `kind`, in which `apply_rotary_emb` means `rotated`."""
    call = kind.__call__
    names = call.__globals__ | {"apply_rotary_emb": rotated}
    return type(
        kind.__name__,
        (kind,),
        {"__call__": FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)},
    )


def rotated(values: Tensor, tables: tuple[Tensor, Tensor], sequence_dim: int) -> Tensor:
    """Each pair of channels (2i, 2i + 1) turned by its angle at its place, in the dtype in which attention reads it.

    Args:
        values: [B, S, heads, D], or with `sequence_dim` 2 [B, heads, S, D].
        tables: cosines and sines, [S, D], each standing twice.
    """
    cosine, sine = tables
    if cosine not in _turns:
        there = torch.complex(cosine[:, ::2].float(), sine[:, ::2].float())
        _turns[cosine] = there, there.conj().resolve_conj()
    there, back = (table.to(values.device) for table in _turns[cosine])
    if sequence_dim == 1:
        there, back = there[:, None], back[:, None]
    found: Tensor = _Rotation.apply(values, there, back, read_in(values))  # type: ignore[no-untyped-call]
    return found


def read_in(values: Tensor) -> torch.dtype:
    """The dtype in which attention will read `values`: autocast leaves float64 alone."""
    computed = fused_lora.autocast_dtype(values.device.type)
    return values.dtype if computed is None or values.dtype == torch.float64 else computed


@final
class _Rotation(torch.autograd.Function):
    """y = z e^{iθ} in `dtype`; with g the gradient of y, ∂z = g e^{-iθ}.

    Of the product itself autograd would copy what attention's backward pass gives, which is transposed, and conjugate the turns each time.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, there: Tensor, back: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(back)
        ctx.dtype = values.dtype
        return _product(values, there).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return _product(gradient, back).to(ctx.dtype), None, None, None


def _product(values: Tensor, turns: Tensor) -> Tensor:
    """Pairs of channels as complex numbers, times `turns`: at least float32."""
    exact = values if values.dtype == torch.float64 else values.float()
    if exact.stride(-1) != 1:  # a gradient that was expanded, say
        exact = exact.contiguous()
    return torch.view_as_real(torch.view_as_complex(exact.unflatten(-1, (-1, 2))) * turns).flatten(-2)
