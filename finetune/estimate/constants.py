"""Every constant of the estimates that is no fact of a GPU or a profile: few, global, each with its source or its fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

MIB, GIB = 1 << 20, 1 << 30

# cuBLAS's workspace, which PyTorch takes from its own cache for each handle (aten/src/ATen/cuda/CublasHandlePool.cpp,
# getChosenWorkspaceSize: `:4096:2:16:8`, and 32 MiB on Hopper). A step uses two handles: the forward and the backward thread's.
WORKSPACE = 2 * (2 * 4096 + 8 * 16) * 1024
WORKSPACE_HOPPER = 2 * 32 * MIB

# What a process holds on a GPU besides PyTorch's cache: CUDA's context and the kernels in use. The median of nine reports
# of 2022–2026, 0.13 to 0.60 GiB (shown by `ft estimate --json` as "CUDA context"); github pytorch/pytorch #16417, diffusers #10994 and others.
CONTEXT = int(0.49 * GIB)

# Bytes a second that a GPU sends to the next in a ring, where nothing better than PCI Express 4.0 × 16 joins them: half of its 32 GB/s.
INTERCONNECT = 16e9


@final
@dataclass(frozen=True)
class Pace:
    """How fast a GPU and its host work through a step's operators.

    Attributes:
        launch: seconds that the host takes for one operator that Python runs and autograd records, modules, PEFT and autocast included.
        launch_engine: likewise for one that autograd's engine or an optimizer runs.
        matmul, conv, attention: the share of the dense 16-bit peak that kernels of this kind reach.
        bandwidth: the share of the memory's bandwidth that kernels reach.
        float32: the share of the 16-bit peak that float32 factors reach: tensor cores are off by default
            (torch.backends.cuda.matmul.allow_tf32).
    """

    launch: float
    launch_engine: float
    matmul: float
    conv: float
    attention: float
    bandwidth: float
    float32: float


# Fit on the published runs by benchmarks/check_estimates.py, which prints its fit and the errors with each model left out. Few of
# the runs hang on convolutions and attention, so the fit is flat there: these values are of the round in which they were physical.
PACE = Pace(launch=57e-6, launch_engine=6.1e-6, matmul=0.645, conv=0.363, attention=0.382, bandwidth=1.0, float32=0.251)
