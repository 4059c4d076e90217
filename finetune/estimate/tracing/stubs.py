"""Stubs for what fake tensors cannot run: bitsandbytes' 8-bit AdamW, packed convolutions, and CPU kernels' scratch
memory.

State layout (optim/optimizer.py, `Optimizer2State.init_state`) and temporaries are those of bitsandbytes, to the
byte; tests compare them with the real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.estimate.tracing.recorder import Recorder
from finetune.kernels import backend
from finetune.replaceable import patched
from finetune.training import optimizers

SMALLEST = 4096  # elements; smaller tensors keep float32 state (bitsandbytes' min_8bit_size)
PAGED = 100_000  # elements; smaller tensors' state is not paged (`get_state_buffer`)
BLOCK = 256  # elements of optimizer state that share one float32 scale

Device = Literal["cuda", "cpu"]


@final
class AdamW8bit(torch.optim.Optimizer):
    """The state of bitsandbytes' AdamW8bit: one byte per element and moment, one scale per block, two maps of 256
    values.

    Paged moments are not allocated by PyTorch.
    """

    def __init__(self, parameters: Any, device: Device = "cuda", is_paged: bool = False, **defaults: Any) -> None:
        super().__init__(parameters, defaults)
        self._maps: list[Tensor] = []
        self._paged = is_paged
        self._on_cpu = device == "cpu"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Allocate, read and write as a step of bitsandbytes' optimizer does; values are meaningless."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= self._layout(parameter)
                if self._on_cpu:
                    _step_on_cpu(parameter, state["state1"], state["state2"])
                else:  # one kernel reads gradient and moments and writes weights and moments
                    parameter.add_(parameter.grad)

    def _layout(self, parameter: Tensor) -> dict[str, Tensor]:
        count = parameter.numel()
        if count < SMALLEST:
            return {
                "state1": torch.zeros_like(parameter, dtype=torch.float32),
                "state2": torch.zeros_like(parameter, dtype=torch.float32),
            }
        if not self._maps:
            self._maps = [torch.empty(256), torch.empty(256)]
        blocks = -(-count // BLOCK)
        moments = [
            torch.zeros(0) if self._paged and count >= PAGED else torch.zeros_like(parameter, dtype=torch.uint8)
            for _ in range(2)
        ]
        return {
            "state1": moments[0],
            "state2": moments[1],
            "absmax1": torch.zeros(blocks),
            "absmax2": torch.zeros(blocks),
            "qmap1": self._maps[0],
            "qmap2": self._maps[1],
        }


def _step_on_cpu(parameter: Tensor, state1: Tensor, state2: Tensor) -> None:
    """The float32 temporaries of bitsandbytes' CPU kernels (backends/cpu/ops.py), which consist of torch operators."""
    assert parameter.grad is not None
    first, second = state1.float(), state2.float()  # copies 8-bit state only
    gradient = parameter.grad * 1.0
    denominator = (second.sqrt() / 1.0).add_(0.0)
    parameter.addcdiv_(first.add_(gradient), denominator)


@final
class PackedConv:
    """A frozen convolution whose weights a CPU holds twice more."""

    def __init__(self, weight: Tensor, padding: tuple[int, ...], inputs: Tensor) -> None:
        self._weight, self._padding = weight.detach(), padding
        self._held = [torch.empty_like(self._weight) for _ in range(2)]

    def matches(self, weight: Tensor) -> bool:
        return True

    def __call__(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(inputs, self._weight, bias, padding=self._padding)

    def add_input_gradient(self, total: Tensor, gradient: Tensor) -> None:
        geometry = (1, 1), self._padding, (1, 1)
        wanted = [True, False, False]
        total += torch.ops.aten.convolution_backward(
            gradient, total, self._weight, None, *geometry, False, [0, 0], 1, wanted
        )[0]


@contextlib.contextmanager
def in_place(device: Device = "cuda") -> Iterator[None]:
    """Within, runs use the stubs of `device`: 8-bit AdamW, paged or not, and packed convolutions on a CPU."""

    def adamw8bit(bitsandbytes: Any, trained: list[nn.Parameter], arguments: dict[str, Any]) -> torch.optim.Optimizer:
        return AdamW8bit(trained, emulated, **arguments)

    def pages(section: Any, device: torch.device) -> bool:
        return bool(section.paged) and emulated == "cuda"

    emulated = device
    with (
        backend.override(
            pack=PackedConv, uses_onednn=lambda weight: emulated == "cpu" and weight.dtype == torch.float32
        ),
        optimizers.adamw8bit.replaced_by(adamw8bit),
        optimizers.pages.replaced_by(pages),
    ):
        yield


@contextlib.contextmanager
def recorder(device: Device) -> Iterator[Recorder]:
    """Record a step's events; on a CPU including kernels' scratch memory and the random states that checkpointing
    stores.

    (On CUDA those states are in host memory.)
    """
    found, take_state = Recorder(_cpu_scratch if device == "cpu" else None), torch.get_rng_state

    def state_seen() -> Tensor:
        state = take_state()
        found.adopt([state])
        return state

    with found, patched(torch, "get_rng_state", state_seen if device == "cpu" else take_state):
        yield found


def _cpu_scratch(name: str, arguments: Any) -> int:
    """Scratch bytes of a CPU's float32 kernel; known for convolutions and the fused AdamW.

    oneDNN's scratchpads and the row sums of norms and attention, a few KiB each, are left out.
    """
    if name.startswith("convolution"):
        return _convolution_scratch(arguments, name == "convolution_backward")
    if name == "_fused_adamw_":  # one gradient at a time is made contiguous
        return max((gradient.nbytes for gradient in arguments[1] if not gradient.is_contiguous()), default=0)
    return 0


def _convolution_scratch(arguments: Any, backward: bool) -> int:
    """By torch's ATen/native/Convolution.cpp (`use_mkldnn`) and ATen/native/mkldnn/Conv.cpp.

    What lies in another layout than the kernel's is copied. oneDNN reorders the weights, and in the plain layout also
    what they meet; the gradient of the weights passes through oneDNN's layout and the plain one.
    """
    tensors: tuple[Tensor, ...] = arguments[: 3 if backward else 2]
    values, weight = tensors[-2:]
    if values.dim() != 4:
        return 0
    last = torch.channels_last in (_layout(values), _layout(weight))
    copies = sum(
        one.nbytes
        for one in tensors
        if not one.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    )
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
