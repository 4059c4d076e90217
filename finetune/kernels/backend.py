"""What kernels ask of the machine they run on.

The estimate overrides it to trace a step as another device would run it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.kernels import enabled, report_missing


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast computes products in; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def uses_onednn(weight: Tensor) -> bool:
    """Whether `weight` is a real float32 parameter on a CPU for which oneDNN has a prepacked convolution."""
    real = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
    if not (real and torch.backends.mkldnn.is_available() and enabled("onednn_conv")):
        return False
    operators = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
    missing = [name for name in operators if not hasattr(torch.ops.mkldnn, name)]
    if missing:
        report_missing("onednn_conv", AttributeError(f"this PyTorch has no torch.ops.mkldnn.{missing[0]}"))
    return not missing


def pack(weight: Tensor, padding: tuple[int, ...], inputs: Tensor) -> Any:
    """`onednn_conv.PackedConv`."""
    from finetune.kernels.onednn_conv import PackedConv

    return PackedConv(weight, padding, inputs)


@dataclass(frozen=True)
class Backend:
    """The functions above, or others in their place."""

    autocast_dtype: Callable[[str], torch.dtype | None] = autocast_dtype
    uses_onednn: Callable[[Tensor], bool] = uses_onednn
    pack: Callable[[Tensor, tuple[int, ...], Tensor], Any] = pack


_backends = [Backend()]


def current() -> Backend:
    """The backend in use."""
    return _backends[-1]


@contextlib.contextmanager
def override(**functions: Callable[..., Any]) -> Iterator[None]:
    """Use other functions, by the names in `Backend`, inside this context."""
    _backends.append(dataclasses.replace(current(), **functions))
    try:
        yield
    finally:
        _backends.pop()
