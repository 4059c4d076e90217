"""Optimizers and learning-rate schedules, by the recipe's section."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from finetune.errors import UserError
from finetune.recipe import Optimizer


def make_optimizer(section: Optimizer, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over float32 `parameters`.

    AdamW is torch's fused kernel: one pass over each tensor instead of a dozen. 8-bit AdamW is bitsandbytes', whose
    tensors under 4,096 elements keep float32 state. Adafactor is transformers', with the recipe's fixed rate.
    """
    trained = list(parameters)
    beta1, beta2 = section.betas
    if section.name == "adamw":
        return torch.optim.AdamW(
            trained, lr=section.lr, betas=(beta1, beta2), eps=section.eps, weight_decay=section.weight_decay, fused=device.type in ("cpu", "cuda")
        )
    if section.name == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise UserError(
                "adamw8bit needs bitsandbytes, which cannot be imported here", remedy="pip install bitsandbytes, or set optimizer.name: adamw"
            ) from error
        for parameter in trained:
            # bitsandbytes would do so at its first step: a resumed run must find the layout that the unbroken one has.
            parameter.data = parameter.data.contiguous()
        eight: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            trained, lr=section.lr, betas=(beta1, beta2), eps=section.eps, weight_decay=section.weight_decay
        )
        return eight
    from transformers.optimization import Adafactor

    found: torch.optim.Optimizer = Adafactor(trained, lr=section.lr, weight_decay=section.weight_decay, relative_step=False, scale_parameter=False)
    return found


def learning_rate(section: Optimizer, step: int, steps: int) -> float:
    """The rate of `step` (counted from 0) of `steps`: linear warm-up from lr / warm-up, then the schedule, to 0 at the end."""
    warmup = section.warmup_steps
    if step < warmup:
        return section.lr * (step + 1) / warmup
    if section.schedule == "constant":
        return section.lr
    progress = (step - warmup) / max(1, steps - warmup)
    if section.schedule == "linear":
        return section.lr * (1 - progress)
    return section.lr * 0.5 * (1 + math.cos(math.pi * progress))


class Ema:
    """Exponential moving average of what trains: e ← decay·e + (1 − decay)·w after each step.

    The decay grows with the step, min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten
    (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, trained: dict[str, nn.Parameter], decay: float) -> None:
        self._trained, self._decay = trained, decay
        self.averages = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), [p.detach() for p in self._trained.values()], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages: before sampling and saving, and once more after."""
        for name, parameter in self._trained.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(kept)
