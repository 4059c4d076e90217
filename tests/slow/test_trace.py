"""Traces against real CPU runs, in bytes: stubs of bitsandbytes, workspaces of kernels, whole steps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import check_trace
from finetune.adapters.peft import add_adapter
from finetune.config.schema import Adapter, Quantization
from finetune.estimate.tracing import stubs
from finetune.estimate.tracing.cuda_mode import fake_tensors
from finetune.estimate.tracing.recorder import tensors_of
from finetune.memory.quantization import quantize
from finetune.training import optimizers

SCRATCHPAD = 64 << 10  # bytes: oneDNN's scratchpad, which the trace omits
SCALARS = 16  # bytes: scalar operands


def real(prepare: Callable[[], tuple[nn.Module, Callable[[], object]]]) -> tuple[int, int]:
    """Bytes of the network, and the peak that `work` allocates on top."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        net, work = prepare()
        with record_function(check_trace.TRAINING):
            kept = work()
    del kept
    return check_trace.held(net), check_trace.counted(profiled)


def traced(prepare: Callable[[], tuple[nn.Module, Callable[[], object]]]) -> tuple[int, int]:
    """The same on fake tensors."""
    with fake_tensors(), stubs.in_place("cpu"):
        net, work = prepare()
        gc.collect()
        with stubs.recorder("cpu") as recorder:
            held = recorder.adopt(tensors_of(net))
            start = len(recorder.events)
            kept = work()
            peak = check_trace.peak_of(recorder.events, start)
    del kept
    return held, peak - held


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_traced_quantized_layers_allocate_as_real_ones(kind: Quantization) -> None:
    """Two layers under PEFT's adapters: their size, and the allocations of forward and backward."""

    def prepare() -> tuple[nn.Module, Callable[[], object]]:
        blocks = nn.ModuleList([nn.Linear(512, 1024), nn.Linear(1024, 512, bias=False)])
        net = nn.ModuleDict({"blocks": blocks})
        assert len(quantize(net, kind, torch.float32)) == 2
        add_adapter(net, Adapter(rank=4, targets="all-linear"))
        return net, lambda: blocks[1](nn.functional.silu(blocks[0](torch.zeros(2, 64, 512)))).square().mean().backward()

    assert traced(prepare) == pytest.approx(real(prepare), abs=SCALARS)


def test_traced_adamw8bit_allocates_as_the_real_one() -> None:
    """Two steps: the first creates the state. On a CPU both compute in float32 copies, one tensor at a time."""

    def prepare() -> tuple[nn.Module, Callable[[], object]]:
        net = nn.Sequential(nn.Linear(300, 500), nn.Linear(20, 30))

        def work() -> object:
            optimizer = optimizers.adamw8bit(bitsandbytes, list(net.parameters()), {})
            for _ in range(2):
                for parameter in net.parameters():
                    parameter.grad = torch.zeros(parameter.shape)
                optimizer.step()
            return optimizer

        return net, work

    assert traced(prepare) == pytest.approx(real(prepare), abs=SCALARS)


@pytest.mark.parametrize("last", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("kernel", "stride", "batch"), [(3, 2, 2), (1, 1, 2), (1, 1, 16)])
def test_traced_convolution_allocates_as_cpu_kernels(
    kernel: int, stride: int, batch: int, last: tuple[bool, bool]
) -> None:
    """Inputs and weights contiguous or channels last: copies, reordered weights, gradients in transit."""

    def laid_out(tensor: Tensor, last: bool) -> Tensor:
        return tensor.to(memory_format=torch.channels_last) if last else tensor

    def prepare() -> tuple[nn.Module, Callable[[], object]]:
        net = nn.Conv2d(160, 192, kernel, stride, padding=kernel // 2)
        net.weight.data = laid_out(net.weight.data, last[1])
        return net, lambda: net(laid_out(torch.zeros(batch, 160, 32, 32), last[0]).requires_grad_()).sum().backward()

    (held, peak), (really_held, real_peak) = traced(prepare), real(prepare)
    assert held == really_held
    assert peak == pytest.approx(real_peak, abs=SCRATCHPAD)


def test_traced_step_allocates_as_the_real_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of the configurations of benchmarks/check_trace.py."""
    case = next(case for case in check_trace.cases(tmp_path) if case.name == "base, LoRA, checkpointing")
    assert check_trace.compared(case), capsys.readouterr().out
