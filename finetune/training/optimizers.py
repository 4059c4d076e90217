"""Optimizers, learning-rate schedules and averaged weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from finetune.config.schema import Optimizer
from finetune.errors import UserError
from finetune.replaceable import replaceable

# Up to this many weights, all tensors are updated at once: a few launches instead of several per tensor, at the cost
# of a few float32 copies of what trains (at most 128 MiB each here; more than the gradients for a whole network).
AT_ONCE = 1 << 25
CAME_RESIDUAL = 0.9999  # the third β of CAME (arXiv:2307.02047, §4.1)


def make_optimizer(
    section: Optimizer, parameters: Iterable[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer over float32 `parameters`.

    AdamW is torch's fused kernel: one pass over each tensor instead of a dozen. Adafactor is transformers' with the
    recipe's fixed learning rate.
    """
    trained = list(parameters)
    betas = section.moments
    common: dict[str, Any] = {"lr": section.lr, "weight_decay": section.weight_decay}
    found: torch.optim.Optimizer
    if section.name == "adamw":
        found = torch.optim.AdamW(
            trained, betas=(betas[0], betas[1]), eps=section.eps, fused=device.type in ("cpu", "cuda"), **common
        )
    elif section.name == "adamw8bit":
        found = _eight_bit(trained, common | {"betas": betas, "eps": section.eps, "is_paged": pages(section, device)})
    elif section.name == "adafactor":
        from transformers.optimization import Adafactor

        found = Adafactor(trained, relative_step=False, scale_parameter=False, **common)
    else:
        found = _adaptive(section, trained, common | {"betas": betas})
    return found


@replaceable
def pages(section: Optimizer, device: torch.device) -> bool:
    """Whether the optimizer's state is in CUDA's unified memory, which is paged between host and GPU."""
    return section.paged and device.type == "cuda"


def _eight_bit(trained: list[nn.Parameter], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """bitsandbytes' 8-bit AdamW; tensors under 4,096 elements keep float32 state."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "adamw8bit needs bitsandbytes, which cannot be imported",
            remedy="pip install bitsandbytes, or set optimizer.name: adamw",
        ) from error
    for parameter in trained:
        # bitsandbytes does this at its first step: a resumed run must start with the same layout as an unbroken one.
        parameter.data = parameter.data.contiguous()
    return adamw8bit(bitsandbytes, trained, arguments)


@replaceable
def adamw8bit(bitsandbytes: Any, trained: list[nn.Parameter], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """Make bitsandbytes' optimizer."""
    found: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(trained, **arguments)
    return found


def _adaptive(section: Optimizer, trained: list[nn.Parameter], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """Prodigy (arXiv:2306.06101), schedule-free AdamW (2405.15682), Lion (2302.06675) or CAME (2307.02047).

    Prodigy uses bias correction and `safeguard_warmup`, as its authors advise for diffusion models. CAME keeps its own
    two ε.
    """
    import pytorch_optimizer

    arguments["foreach"] = sum(parameter.numel() for parameter in trained) <= AT_ONCE
    if section.name == "came":
        arguments["betas"] = (*arguments["betas"], CAME_RESIDUAL)
    if section.name in ("prodigy", "schedulefree"):
        arguments["eps"] = section.eps
    if section.name == "prodigy":
        arguments |= {"bias_correction": True, "safeguard_warmup": True}
    names = {"prodigy": "Prodigy", "schedulefree": "ScheduleFreeAdamW", "lion": "Lion", "came": "CAME"}
    found: torch.optim.Optimizer = getattr(pytorch_optimizer, names[section.name])(trained, **arguments)
    return found


def effective_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the last step; Prodigy's is its own estimate d times the recipe's."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))


@contextlib.contextmanager
def schedule_free(optimizer: Any) -> Iterator[None]:
    """Within, a schedule-free optimizer's weights are its averages x instead of y, where it computes gradients.

    Computing y back from x would round, and validation would change a run: y is kept aside, on the host.
    """
    if "train_mode" not in optimizer.param_groups[0]:
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)


def average(section: Optimizer, parameters: Iterable[nn.Parameter], state: dict[str, Any]) -> None:
    """Turn the weights y of a schedule-free optimizer into its averages x, in place; for others, do nothing.

    Args:
        parameters: everything it trains, in its order.
        state: the optimizer's state of the same step.
    """
    if section.name == "schedulefree":
        optimizer: Any = make_optimizer(section, parameters, torch.device("cpu"))
        optimizer.load_state_dict(state)
        optimizer.eval()


def learning_rate(section: Optimizer, step: int, steps: int) -> float:
    """The rate of `step` (from 0) of `steps`: linear warm-up from lr / warmup_steps, then the schedule down to 0."""
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
    """Exponential moving average of the trained weights: e ← decay·e + (1 − decay)·w after each step.

    The decay grows with the step n, min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten
    (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, trained: dict[str, nn.Parameter], decay: float) -> None:
        self._trained, self._decay = trained, decay
        # In float32 for bfloat16 weights too: bfloat16 cannot represent what one step changes in an average.
        self.averages = {name: parameter.detach().float().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights after `step` (counted from 0)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        if all(parameter.dtype == torch.float32 for parameter in self._trained.values()):
            torch._foreach_lerp_(list(self.averages.values()), [p.detach() for p in self._trained.values()], 1 - decay)
            return
        for name, parameter in self._trained.items():  # one float32 copy at a time
            self.averages[name].lerp_(parameter.detach().float(), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages: before sampling and saving, and again afterwards."""
        for name, parameter in self._trained.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(kept)
