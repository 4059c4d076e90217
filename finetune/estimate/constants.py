"""Constants of the estimates that are not properties of a GPU or a cost profile, each with its source or fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

MIB, GIB = 1 << 20, 1 << 30

# cuBLAS's workspace, which PyTorch allocates from its own cache for each handle
# (aten/src/ATen/cuda/CublasHandlePool.cpp,
# getChosenWorkspaceSize: `:4096:2:16:8`, and 32 MiB on Hopper). A step uses two handles: the forward and the backward
# thread's.
WORKSPACE = 2 * (2 * 4096 + 8 * 16) * 1024
WORKSPACE_HOPPER = 2 * 32 * MIB

# Memory of a process on a GPU outside PyTorch's cache: the CUDA context and loaded kernels. The median of nine reports
# of 2022–2026, 0.13 to 0.60 GiB (shown by `ft estimate --json` as "CUDA context"); github pytorch/pytorch #16417,
# diffusers #10994 and others.
CONTEXT = int(0.49 * GIB)

# Bytes per second that a GPU sends to the next in a ring over PCI Express 4.0 × 16: half of its 32 GB/s.
INTERCONNECT = 16e9


@final
@dataclass(frozen=True)
class Pace:
    """How fast a GPU and its host execute a step's operators.

    Attributes:
        launch: host seconds per operator that Python runs and autograd records, with modules, PEFT and autocast.
        launch_engine: host seconds per operator that autograd's engine or an optimizer runs.
        matmul, conv, attention: share of the dense 16-bit peak that kernels of this kind reach.
        bandwidth: share of the memory bandwidth that kernels reach.
        float32: share of the 16-bit peak that float32 operands reach: tensor cores are off by default
            (torch.backends.cuda.matmul.allow_tf32).
    """

    launch: float
    launch_engine: float
    matmul: float
    conv: float
    attention: float
    bandwidth: float
    float32: float


# Fitted to published runs by benchmarks/check_estimates.py, which prints the fit and the errors with each model left
# out. Few runs depend on convolutions and attention, so the fit is flat there; these values are from a round where
# they were physical.
PACE = Pace(launch=57e-6, launch_engine=6.1e-6, matmul=0.645, conv=0.363, attention=0.382, bandwidth=1.0, float32=0.251)
