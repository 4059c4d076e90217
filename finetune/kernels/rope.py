"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) of FLUX.1 and FLUX.2 as one complex product each way.

diffusers rotates queries and keys with real numbers: a negation, a stack, two products and a sum, and as many
operators in the backward pass, twice in every block. It also leaves them in float32, where autocast's norms put them,
until attention casts them; attention's output is then cast back to float32, concatenated with the MLP's values, and
rounded again by the next layer. Here queries and keys are rounded as soon as they are rotated. Results are equal: the
rotation up to float32 rounding, the earlier cast exactly.
"""

from __future__ import annotations

import functools
import inspect
from types import FunctionType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from finetune.kernels import KERNELS, Unavailable, _parts, backend, enabled

_rotations = (
    WeakIdKeyDictionary()
)  # cosines of a step → its rotations, forward and back, for as long as the cosines live


def patch(network: nn.Module) -> None:
    """Make the attention processors of `network` rotate by complex products, in place.

    Raises:
        Unavailable: `network` has no processor of the expected class, or diffusers rotates in another way.
    """
    kernel = KERNELS["rope"]
    processors = list(_parts(network, kernel.parts))
    if not processors and not any(_is_patched(module) for module in network.modules()):
        raise Unavailable(f"{type(network).__name__} has none of {', '.join(kernel.parts)}")
    kinds: list[Any] = [type(processor) for processor in processors]
    classes = [_rotating(kind) for kind in kinds]
    for processor, kind in zip(processors, classes, strict=True):
        processor.__class__ = kind


def _is_patched(module: nn.Module) -> bool:
    return isinstance(getattr(module, "processor", None), _Rotating)


class _Rotating:
    """Marks the classes that `_rotating` makes."""


@functools.cache
def _rotating(kind: Any) -> type:
    """A processor class with the code of `kind`, in which `apply_rotary_emb` is `rotated`."""
    call = kind.__call__
    original = call.__globals__.get("apply_rotary_emb")
    if "apply_rotary_emb" not in call.__code__.co_names or original is None:
        raise Unavailable(f"{kind.__name__} does not call apply_rotary_emb")
    if not {"x", "freqs_cis", "sequence_dim"} <= inspect.signature(original).parameters.keys():
        raise Unavailable("diffusers' apply_rotary_emb has another signature")
    names = call.__globals__ | {"apply_rotary_emb": rotated}
    function = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    function.__kwdefaults__ = call.__kwdefaults__
    return type(kind.__name__, (kind, _Rotating), {"__call__": function})


def rotated(values: Tensor, tables: tuple[Tensor, Tensor], sequence_dim: int) -> Tensor:
    """Rotate each pair of channels (2i, 2i + 1) by its angle at its position, in the dtype that attention computes in.

    Args:
        values: [B, S, heads, D], or [B, heads, S, D] if `sequence_dim` is 2.
        tables: cosines and sines, [S, D], each value repeated for both channels of a pair.
    """
    cosine, sine = tables
    if cosine not in _rotations:
        forward = torch.complex(cosine[:, ::2].float(), sine[:, ::2].float())
        _rotations[cosine] = forward, forward.conj().resolve_conj()
    forward, back = (table.to(values.device) for table in _rotations[cosine])
    if sequence_dim == 1:
        forward, back = forward[:, None], back[:, None]
    output: Tensor = _Rotation.apply(values, forward, back, attention_dtype(values))  # type: ignore[no-untyped-call]
    return output


def attention_dtype(values: Tensor) -> torch.dtype:
    """The dtype to which attention will cast `values`. Autocast leaves float64 alone."""
    computed = backend.current().autocast_dtype(values.device.type) if enabled("rope.cast") else None
    return values.dtype if computed is None or values.dtype == torch.float64 else computed


@final
class _Rotation(torch.autograd.Function):
    """y = z e^{iθ} in `dtype`; with g the gradient of y, ∂z = g e^{-iθ}.

    Autograd of the plain product would copy the gradient, which attention returns transposed, and conjugate the
    rotations each time.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, forward: Tensor, back: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(back)
        ctx.dtype = values.dtype
        return _product(values, forward).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return _product(gradient, back).to(ctx.dtype), None, None, None


def _product(values: Tensor, rotations: Tensor) -> Tensor:
    """Pairs of channels as complex numbers, times `rotations`, in at least float32."""
    exact = values if values.dtype == torch.float64 else values.float()
    if exact.stride(-1) != 1:  # an expanded gradient, for example
        exact = exact.contiguous()
    return torch.view_as_real(torch.view_as_complex(exact.unflatten(-1, (-1, 2))) * rotations).flatten(-2)
