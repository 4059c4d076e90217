"""Emulate CUDA's autocast rules and attention kernels on fake CPU tensors, for builds of torch without CUDA.

On fake CPU tensors, torch applies its CPU rules, which differ: CUDA's autocast computes norms, powers and losses in
float32, and its fused attention stores no matrix of scores. Both change the memory and the traffic of a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode

from finetune.kernels import backend
from finetune.replaceable import patched

# The lists of torch's ATen/autocast_mode.h (AT_FORALL_LOWER_PRECISION_FP, AT_FORALL_FP32, …_SET_OPT_DTYPE), by the
# names under which Python calls them. Python functions that wrap a listed one stand here by their own name: a function
# mode does not see inside.
LOWER = {
    *(
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "_convolution",
        "convolution",
        "conv_tbc",
    ),
    *(
        "linear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "einsum",
        "mm",
        "mv",
        "bmm",
        "baddbmm",
        "addbmm",
        "addmm",
        "addmv",
        "addr",
        "prelu",
    ),
    *("chain_matmul", "scaled_dot_product_attention", "multi_head_attention_forward"),
}
FLOAT32 = {
    *(
        "acos",
        "asin",
        "cosh",
        "erfinv",
        "exp",
        "expm1",
        "log",
        "log10",
        "log2",
        "log1p",
        "reciprocal",
        "rsqrt",
        "sinh",
        "tan",
    ),
    *(
        "pow",
        "__pow__",
        "__rpow__",
        "softplus",
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "group_norm",
        "cosine_similarity",
        "nll_loss",
    ),
    *(
        "kl_div",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "mse_loss",
        "cross_entropy",
        "binary_cross_entropy_with_logits",
        "logsumexp",
    ),
    *("interpolate", "upsample_nearest2d", "upsample_bilinear2d", "norm", "cdist", "dist"),
}
FLOAT32_RESULT = {
    "prod",
    "softmax",
    "log_softmax",
    "cumprod",
    "cumsum",
    "sum",
}  # computed in float32 without a copy of the input
FLASH_MOST = 256  # the widest head that flash attention supports (torch's sdp_utils.cpp, check_head_dim_size_flash)


_experts = ContextVar("experts", default=1)


@final
class Routing:
    """Forward hooks of a mixture of experts: each boolean mask selects an equal share of rows, since fake tensors
    have no values.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts

    def begin(self, *_: Any) -> None:
        """Pre-hook of the forward pass."""
        _experts.set(self._experts)

    def end(self, *_: Any) -> None:
        """Hook after the forward pass."""
        _experts.set(1)


def _share(mask: Tensor) -> Tensor:
    """Row indices for an equal share of `mask`."""
    return torch.arange(-(-len(mask) // _experts.get()))


@final
class Cuda(TorchFunctionMode):
    """Within, torch functions on fake CPU tensors behave as on CUDA, including autocast where `autocast` is entered.

    Attributes:
        dtype: the dtype of autocast; None where it is off.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}
        self._depth = 0
        self._backward: torch.dtype | None = None  # recomputation in the backward pass uses the forward pass's dtype

    @contextlib.contextmanager
    def autocast(self, dtype: torch.dtype | None) -> Iterator[None]:
        """`torch.autocast("cuda", dtype)`; None: off. Casts each trained float32 leaf once until the outermost
        context ends.
        """
        before, self.dtype = self.dtype, dtype
        self._depth += 1
        self._backward = self._backward or dtype
        try:
            yield
        finally:
            self.dtype = before
            self._depth -= 1
            if not self._depth:
                self._casts = {}

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """The forward pass's mode and autocast for a backward pass, where checkpointed blocks are recomputed."""
        before, self.dtype = self.dtype, self._backward
        try:
            with self:  # the mode is off inside Tensor.backward, a torch function
                yield
        finally:
            self.dtype = before

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.dtype is not None:
            if name in LOWER:
                args, kwargs = self._all_cast(args, self.dtype), self._all_cast(kwargs, self.dtype)
            elif name in FLOAT32:
                args, kwargs = self._all_cast(args, torch.float32), self._all_cast(kwargs, torch.float32)
            elif (
                name in FLOAT32_RESULT
                and isinstance(args[0], Tensor)
                and args[0].dtype in (torch.float16, torch.bfloat16)
            ):
                kwargs = kwargs | {"dtype": kwargs.get("dtype") or torch.float32}
        if name == "scaled_dot_product_attention":
            return attention(*args, **kwargs)
        if name == "rms_norm":
            return rms_norm(*args, **kwargs)
        if (
            name in ("__getitem__", "__setitem__")
            and isinstance(args[1], Tensor)
            and args[1].dtype == torch.bool
            and _experts.get() > 1
        ):
            args = (args[0], _share(args[1]), *args[2:])
        return func(*args, **kwargs)

    def _all_cast(self, values: Any, dtype: torch.dtype) -> Any:
        if isinstance(values, Tensor):
            return self._cast(values, dtype)
        if isinstance(values, tuple | list):
            return type(values)(self._all_cast(value, dtype) for value in values)
        if isinstance(values, dict):
            return {key: self._all_cast(value, dtype) for key, value in values.items()}
        return values

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype in (torch.float64, dtype):
            return tensor
        # autocast_mode.cpp, cached_cast: only of leaves that train, from float32, and no views
        if not (
            self._depth
            and tensor.dtype == torch.float32
            and tensor.requires_grad
            and tensor.is_leaf
            and not tensor._is_view()
        ):
            return tensor.to(dtype)
        if id(tensor) not in self._casts:
            self._casts[id(tensor)] = tensor, tensor.to(dtype)
        return self._casts[id(tensor)][1]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` with the kernel that CUDA selects (sdp_utils.cpp): flash, else memory-efficient.

    Query, key and value are [B, heads, L, width]. Flash needs 16-bit values and no mask; the other takes the mask as a
    bias [B, heads, L, S].
    """
    if enable_gqa and key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    width = query.shape[-1]
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and width <= FLASH_MOST:
        missing = -width % 8  # _pad_last_dim: flash needs multiples of 8
        if missing:
            query, key, value = (torch.nn.functional.pad(tensor, (0, missing)) for tensor in (query, key, value))
        out = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale or width**-0.5
        )[0]
        return cast(Tensor, out[..., :width] if missing else out)
    bias = None
    if attn_mask is not None:
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        if attn_mask.dtype == torch.bool:  # convert_boolean_attn_mask: to 0 and −inf
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                attn_mask.logical_not(), float("-inf")
            )
        bias = attn_mask.to(query.dtype).expand(shape)
    needs_gradient = any(tensor.requires_grad for tensor in (query, key, value))
    found: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]
    return found


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Within, tensors have shapes and dtypes but no memory; networks can be built, converted and trained as usual."""
    with FakeTensorMode(allow_non_fake_inputs=True), patched(nn.Module, "_apply", _apply):
        yield


def _apply(net: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which implements `.to`: torch's version swaps tensors, which fails for fake ones with
    references.
    """
    for child in net.children() if recurse else ():
        child._apply(convert)
    for parameter in net.parameters(recurse=False):
        parameter.data = convert(parameter.data)
    for name, buffer in net.named_buffers(recurse=False):
        net._buffers[name] = convert(buffer)
    return net


def rms_norm(values: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """RMSNorm in one kernel each way, as on CUDA (aten::_fused_rms_norm): a layer norm, which also stores a mean per
    row.
    """
    return torch.layer_norm(values, shape, weight, None, 1e-5 if eps is None else eps)


def _has_foreach(tensors: list[Tensor], device: torch.device) -> bool:
    return True


@contextlib.contextmanager
def cuda() -> Iterator[Cuda]:
    """Within, steps run as on CUDA: `Cuda`, also for recomputation in the backward pass, and foreach gradient
    clipping.
    """
    mode, run_backward = Cuda(), torch.autograd.graph._engine_run_backward

    def run(*args: Any, **kwargs: Any) -> Any:
        with mode.backward():
            return run_backward(*args, **kwargs)

    @contextlib.contextmanager
    def autocast(
        device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, cache_enabled: bool | None = None
    ) -> Iterator[None]:
        with mode.autocast((dtype or torch.float16) if enabled else None):
            yield

    def autocast_dtype(device: str) -> torch.dtype | None:
        return mode.dtype

    with (
        mode,
        patched(torch.autograd, "_engine_run_backward", run),
        patched(torch, "autocast", autocast),
        backend.override(autocast_dtype=autocast_dtype),
        patched(clip_grad, "_has_foreach_support", _has_foreach),
    ):
        yield mode
