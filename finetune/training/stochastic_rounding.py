"""Stochastic rounding (Gupta et al. 2015, arXiv:1502.02551): up or down at random, and right on average.

A bfloat16 weight has 8 significant bits. Rounding to nearest loses every update below 1/512 of the weight; stochastic
rounding keeps it with a probability proportional to its size (Zamirai et al. 2020, arXiv:2010.06192).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 → bfloat16, rounded up with the probability of the part that is cut off: E[rounded(x)] = x.

    A bfloat16 is the upper half of a float32's bits. Adding a uniform 16-bit number to the lower half carries into the
    upper half in (lower half) of 2¹⁶ cases; then the lower half is cut off. The sign bit is separate, so both signs are
    rounded alike. Infinities and arithmetic NaNs have an empty lower half and do not change.
    """
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)
