"""Stochastic rounding (Gupta et al. 2015, arXiv:1502.02551): up or down at random, so that what is rounded is right on average.

A bfloat16 weight has 8 significant bits. A step under a 512th of the weight is lost when it is rounded to the nearest, at every step again;
rounded at random it is taken as often as it is large (Zamirai et al. 2020, arXiv:2010.06192).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 → bfloat16, up with the probability of what is cut off: E[rounded(x)] = x.

    A bfloat16 is the upper half of a float32's bits. To the lower half, a uniform 16-bit number is added: it carries into the upper
    half in (lower half) of 2¹⁶ cases; then it is cut off. Signs are apart from magnitudes, so both are rounded alike. Infinities and
    the NaN of arithmetic have an empty lower half and stay.
    """
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)
