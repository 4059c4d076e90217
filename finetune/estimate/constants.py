"""Every constant of the estimates that is no fact of a GPU or a card: few, global, each with its source or its fit."""

from __future__ import annotations

MIB, GIB = 1 << 20, 1 << 30

# cuBLAS's workspace, which PyTorch takes from its own cache for each handle (aten/src/ATen/cuda/CublasHandlePool.cpp,
# getChosenWorkspaceSize: `:4096:2:16:8`, and 32 MiB on Hopper). A step uses two handles: the forward and the backward thread's.
WORKSPACE = 2 * (2 * 4096 + 8 * 16) * 1024
WORKSPACE_HOPPER = 2 * 32 * MIB

# What a process holds on a GPU besides PyTorch's cache: CUDA's context and the kernels in use. The median of nine reports
# of 2022–2026, 0.13 to 0.60 GiB (shown by `ft estimate --json` as "CUDA context"); github pytorch/pytorch #16417, diffusers #10994 and others.
CONTEXT = int(0.49 * GIB)

# Seconds that the host takes to launch one operator of a training step through Python, autograd and PEFT. Fit on steps bound by the
# host: SD 1.5 LoRA, batch 1, on an H100 and on an L40S (SimpleTuner, SEGMENTED_CHECKPOINTING.md); scripts/check_estimates.py shows it.
LAUNCH = 55e-6

# Share of the dense 16-bit peak, and of the memory's bandwidth, that kernels of a kind reach. A first setting, checked by scripts/check_estimates.py.
EFFICIENCY = {"matmul": 0.60, "conv": 0.50, "attention": 0.45, "other": 1.0}
BANDWIDTH = 0.75
FLOAT32_SHARE = 0.25  # of the 16-bit tensor peak, for float32 factors: tensor cores are off by default (torch.backends.cuda.matmul.allow_tf32)
