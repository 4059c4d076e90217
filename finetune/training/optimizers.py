"""Optimizers and learning-rate schedules, by the recipe's section."""

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

# Weights up to which an update is made of all tensors at once. It has a few launches instead of some a tensor, and holds a few float32
# copies of what trains: little for an adapter (128 MiB each at most), and more than the gradients for a whole net.
AT_ONCE = 1 << 25
CAME_RESIDUAL = 0.9999  # the third β of CAME (arXiv:2307.02047, §4.1)


def make_optimizer(
    section: Optimizer, parameters: Iterable[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer over float32 `parameters`.

    AdamW is torch's fused kernel: one pass over each tensor instead of a dozen. Adafactor is transformers', with the recipe's fixed rate.
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
    """Whether the optimizer's state lies in memory that CUDA moves between host and GPU as it is used."""
    return section.paged and device.type == "cuda"


def _eight_bit(trained: list[nn.Parameter], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """bitsandbytes' 8-bit AdamW, whose tensors under 4,096 elements keep float32 state."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "adamw8bit needs bitsandbytes, which cannot be imported here",
            remedy="pip install bitsandbytes, or set optimizer.name: adamw",
        ) from error
    for parameter in trained:
        # bitsandbytes would do so at its first step: a resumed run must find the layout that the unbroken one has.
        parameter.data = parameter.data.contiguous()
    return adamw8bit(bitsandbytes, trained, arguments)


@replaceable
def adamw8bit(bitsandbytes: Any, trained: list[nn.Parameter], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """Make bitsandbytes' optimizer."""
    found: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(trained, **arguments)
    return found


def _adaptive(section: Optimizer, trained: list[nn.Parameter], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """pytorch-optimizer's Prodigy (arXiv:2306.06101), schedule-free AdamW (2405.15682), Lion (2302.06675) or CAME (2307.02047).

    Prodigy corrects its moments' bias, and a warm-up does not count in the distance it judges, as its authors advise for diffusion
    models. CAME's own two ε stay as they are.
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
    """The rate of the last step: Prodigy's is what it found, d times the recipe's."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))


@contextlib.contextmanager
def schedule_free(optimizer: Any) -> Iterator[None]:
    """Within, weights are the averages x that a schedule-free optimizer is judged by, not the y at which it takes gradients. Others have none.

    The way back by arithmetic would round, and a run would depend on when one looked: y is kept aside, on the host.
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
    """Turn weights as a schedule-free optimizer trains them into the averages that it is judged by, in place, for good; others stay.

    Args:
        parameters: all that it trains, in its order.
        state: its own, of the same step: it alone knows them.
    """
    if section.name == "schedulefree":
        optimizer: Any = make_optimizer(section, parameters, torch.device("cpu"))
        optimizer.load_state_dict(state)
        optimizer.eval()


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
        # In float32 also of bfloat16 weights: what a step changes in an average is smaller than those could hold.
        self.averages = {name: parameter.detach().float().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Draw the averages towards the weights as they are after `step` (counted from 0)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        if all(parameter.dtype == torch.float32 for parameter in self._trained.values()):
            torch._foreach_lerp_(list(self.averages.values()), [p.detach() for p in self._trained.values()], 1 - decay)
            return
        for name, parameter in self._trained.items():  # one float32 copy at a time
            self.averages[name].lerp_(parameter.detach().float(), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages: before sampling and saving, and once more after."""
        for name, parameter in self._trained.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(kept)
