"""Byte-exact stand-ins for what fake tensors do not show: bitsandbytes' 8-bit AdamW and 4-bit layers, and CPU kernels' own memory.

Their layouts are bitsandbytes' (optim/optimizer.py, `Optimizer2State.init_state`; functional.py, `quantize_4bit`), their temporaries
those of its kernels; tests hold them against the real ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal, final
from unittest import mock

import torch
from torch import Tensor, nn

from finetune.estimate.trace import Recorder

SMALLEST = 4096  # elements; tensors with fewer keep float32 state (bitsandbytes' min_8bit_size)
BLOCK = 256  # elements that share one float32 scale: of an optimizer's state, and of double-quantised scales
BLOCK_4BIT = 64  # weights that share one scale

Device = Literal["cuda", "cpu"]


@final
class AdamW8bit(torch.optim.Optimizer):
    """The state of bitsandbytes' AdamW8bit: a byte an element and moment, a scale a block, two maps of 256 values for all."""

    def __init__(self, parameters: Any, device: Device = "cuda", **defaults: Any) -> None:
        super().__init__(parameters, defaults)
        self._maps: list[Tensor] = []
        self._on_cpu = device == "cpu"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= self._layout(parameter)
                if self._on_cpu:
                    _step_on_cpu(parameter, state["state1"], state["state2"])
                else:  # one kernel reads the gradient and both moments and writes the weights and both moments
                    parameter.add_(parameter.grad)

    def _layout(self, parameter: Tensor) -> dict[str, Tensor]:
        count = parameter.numel()
        if count < SMALLEST:
            return {"state1": torch.zeros_like(parameter, dtype=torch.float32), "state2": torch.zeros_like(parameter, dtype=torch.float32)}
        if not self._maps:
            self._maps = [torch.empty(256), torch.empty(256)]
        blocks = -(-count // BLOCK)
        return {
            "state1": torch.zeros_like(parameter, dtype=torch.uint8),
            "state2": torch.zeros_like(parameter, dtype=torch.uint8),
            "absmax1": torch.zeros(blocks),
            "absmax2": torch.zeros(blocks),
            "qmap1": self._maps[0],
            "qmap2": self._maps[1],
        }


def _step_on_cpu(parameter: Tensor, state1: Tensor, state2: Tensor) -> None:
    """The float32 temporaries of bitsandbytes' CPU kernels (backends/cpu/ops.py), which are made of torch's operators."""
    assert parameter.grad is not None
    first, second = state1.float(), state2.float()  # of 8-bit state only: no copies of what is float32
    gradient = parameter.grad * 1.0
    denominator = (second.sqrt() / 1.0).add_(0.0)
    parameter.addcdiv_(first.add_(gradient), denominator)


@final
class Linear4bit(nn.Linear):
    """bitsandbytes' Linear4bit: two weights a byte, a float32 scale a block, or a byte a scale and a float32 for a block of scales.

    Its kernel makes the weights whole in the dtype of the input, for as long as the product takes, forward and backward. (On CUDA a fused
    kernel spares that where few tokens are multiplied.)
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
    ) -> None:
        super().__init__(input_features, output_features, bias)
        count = input_features * output_features
        blocks = -(-count // BLOCK_4BIT)
        weight: Any = nn.Parameter(torch.empty((count + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        weight.compress_statistics, weight.quant_type = compress_statistics, quant_type  # PEFT reads them
        self.weight, self.compute_dtype = weight, compute_dtype
        self.register_buffer("code", torch.empty(16))
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8 if compress_statistics else torch.float32))
        if compress_statistics:
            self.register_buffer("absmax2", torch.empty(-(-blocks // BLOCK)))
            self.register_buffer("code2", torch.empty(256))
            self.register_buffer("offset", torch.empty(()))

    def forward(self, values: Tensor) -> Tensor:
        dtype = self.compute_dtype = self.compute_dtype or values.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        found: Tensor = _Product.apply(values.to(dtype), bias, self)  # type: ignore[no-untyped-call]
        return found.to(values.dtype)

    def whole(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weights [out, in] in `dtype`, and their scales in float32."""
        absmax: Tensor = self.get_buffer("absmax")
        scales = torch.empty(absmax.shape) + self.get_buffer("offset") if absmax.dtype == torch.uint8 else absmax
        return torch.empty(self.out_features, self.in_features, dtype=dtype), scales


@final
class _Product(torch.autograd.Function):
    """`MatMul4Bit` (autograd/_functions.py): it keeps neither the input nor the whole weights."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        weight, _scales = layer.whole(values.dtype)
        return nn.functional.linear(values, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        return gradients[0] @ ctx.layer.whole(gradients[0].dtype)[0], None, None


def quantise(net: nn.Module, compress_statistics: bool) -> None:
    """Put frozen layers in NF4, as QLoRA has them (arXiv:2305.14314), in the place of a net's linear layers; `compress_statistics`: doubly quantised.

    Their weights are new ones: it is for runs whose values do not matter. The net is marked as diffusers marks it, which is how PEFT knows it.
    """
    import bitsandbytes

    for module in list(net.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                arguments = {"compress_statistics": compress_statistics, "quant_type": "nf4"}
                packed = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **arguments)
                module.set_submodule(name, packed.to("cpu").requires_grad_(False))  # quantised on the way to its device
    net.is_loaded_in_4bit = True  # type: ignore[assignment]


@contextlib.contextmanager
def in_place(device: Device = "cuda") -> Iterator[None]:
    """Within, `bitsandbytes.optim.AdamW8bit` and `bitsandbytes.nn.Linear4bit` are their stand-ins."""
    import bitsandbytes

    with (
        mock.patch.object(bitsandbytes.optim, "AdamW8bit", functools.partial(AdamW8bit, device=device)),
        mock.patch.object(bitsandbytes.nn, "Linear4bit", Linear4bit),
    ):
        yield


@contextlib.contextmanager
def recorder(device: Device) -> Iterator[Recorder]:
    """A recorder of a step's events. A CPU's also count what kernels take for themselves, and the random states that checkpointing keeps.

    (On CUDA those states are the host's.)
    """
    found, take_state = Recorder(_cpu_scratch if device == "cpu" else None), torch.get_rng_state

    def state_seen() -> Tensor:
        state = take_state()
        found.adopt([state])
        return state

    with found, mock.patch.object(torch, "get_rng_state", state_seen if device == "cpu" else take_state):
        yield found


def _cpu_scratch(name: str, arguments: Any) -> int:
    """Bytes that a CPU's float32 kernel takes for itself beside what it returns; none but of convolutions and the fused AdamW are known.

    Left out are oneDNN's scratchpads and the row sums of norms and attention, some KiB each.
    """
    if name.startswith("convolution"):
        return _convolution_scratch(arguments, name == "convolution_backward")
    if name == "_fused_adamw_":  # one gradient at a time is laid out plainly
        return max((gradient.nbytes for gradient in arguments[1] if not gradient.is_contiguous()), default=0)
    return 0


def _convolution_scratch(arguments: Any, backward: bool) -> int:
    """By torch's ATen/native/Convolution.cpp (`use_mkldnn`) and ATen/native/mkldnn/Conv.cpp.

    What lies in another layout than the kernel's is copied. oneDNN reorders the weights, and in the plain layout also what they meet;
    the gradient of the weights passes through oneDNN's layout and the plain one.
    """
    tensors: tuple[Tensor, ...] = arguments[: 3 if backward else 2]
    values, weight = tensors[-2:]
    if values.dim() != 4:
        return 0
    last = torch.channels_last in (_layout(values), _layout(weight))
    copies = sum(one.nbytes for one in tensors if not one.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format))
    stride = max(arguments[4 if backward else 3])
    if weight.shape[2:].numel() == stride == 1 and len(values) < 16 and torch.get_num_threads() == 1:
        return copies  # a plain product
    of_weights = backward and arguments[10][1]
    if last:
        return copies + (2 if of_weights else 1) * weight.nbytes
    met = tensors[0].nbytes  # forward the input, backward the gradient of the output
    return copies + met + (values.nbytes if of_weights else weight.nbytes)


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch._prims_common.suggest_memory_format(tensor)
