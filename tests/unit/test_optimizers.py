"""The optimizers of pytorch-optimizer: their papers' formulas, their state, and the plan's notes on them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune import planning
from finetune.config import machine
from finetune.config.schema import Optimizer
from finetune.data.audit.audit import scan
from finetune.estimate.memory import bytes_a_weight
from finetune.estimate.tracing.cuda_mode import fake_tensors
from finetune.estimate.tracing.recorder import Recorder
from finetune.training.optimizers import effective_lr, learning_rate, make_optimizer, schedule_free
from tests.helpers import tiny

SHAPE, STEPS = (6, 9), 40


def gradients() -> tuple[Tensor, list[Tensor]]:
    """Initial weights, and gradients that mostly agree, so that there is a distance for Prodigy to estimate."""
    generator = torch.Generator().manual_seed(0)
    start, common = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    return start, [common + 0.3 * torch.randn(SHAPE, generator=generator) for _ in range(STEPS)]


def lion(one: Optimizer) -> Tensor:
    """arXiv:2302.06675, algorithm 2."""
    weight, found = gradients()
    moment, (beta1, beta2) = torch.zeros(SHAPE), (0.9, 0.99)
    for step, gradient in enumerate(found):
        rate = learning_rate(one, step, STEPS)
        weight = weight - rate * ((beta1 * moment + (1 - beta1) * gradient).sign() + one.weight_decay * weight)
        moment = beta2 * moment + (1 - beta2) * gradient
    return weight


def schedulefree(one: Optimizer) -> Tensor:
    """arXiv:2405.15682, algorithm 1; returns the average x."""
    start, found = gradients()
    average, anchor, second, summed, (beta1, beta2) = start, start, torch.zeros(SHAPE), 0.0, (0.9, 0.999)
    for step, gradient in enumerate(found):
        rate = learning_rate(one, step, STEPS)
        looked = (1 - beta1) * anchor + beta1 * average
        second = beta2 * second + (1 - beta2) * gradient**2
        scaled = gradient / ((second / (1 - beta2 ** (step + 1))).sqrt() + one.eps)
        anchor = anchor - rate * (scaled + one.weight_decay * looked)
        summed += rate**2
        share = rate**2 / summed
        average = (1 - share) * average + share * anchor
    return average


def prodigy(one: Optimizer) -> Tensor:
    """arXiv:2306.06101, algorithm 4, with Adam's bias correction.

    The factor 1 − √β₂ in r and s is omitted, since it cancels in d̂. During warm-up, s uses γ = 1, so that small rates
    do not make the distance look large (`safeguard_warmup`).
    """
    start, found = gradients()
    weight, first, second, ratio, total = start, torch.zeros(SHAPE), torch.zeros(SHAPE), 0.0, torch.zeros(SHAPE)
    distance, (beta1, beta2) = 1e-6, (0.9, 0.999)
    for step, gradient in enumerate(found):
        rate = (
            distance * learning_rate(one, step, STEPS) * math.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 1))
        )
        ratio = math.sqrt(beta2) * ratio + distance * rate * float((gradient * (start - weight)).sum())
        total = math.sqrt(beta2) * total + distance * distance * gradient
        first = beta1 * first + (1 - beta1) * distance * gradient
        second = beta2 * second + (1 - beta2) * distance**2 * gradient**2
        distance = max(distance, ratio / float(total.abs().sum()))
        weight = weight * (1 - one.weight_decay * rate) - rate * first / (second.sqrt() + distance * one.eps)
    return weight


def came(one: Optimizer) -> Tensor:
    """arXiv:2307.02047, algorithm 2: Adafactor's update, its momentum, divided by the deviation of the two."""
    weight, found = gradients()
    moment, rows, columns, far_rows, far_columns = (
        torch.zeros(SHAPE),
        *(torch.zeros(size) for size in SHAPE),
        *(torch.zeros(size) for size in SHAPE),
    )
    beta1, beta2, beta3 = 0.9, 0.999, 0.9999
    for step, gradient in enumerate(found):
        rate = learning_rate(one, step, STEPS)
        rows = beta2 * rows + (1 - beta2) * (gradient**2 + 1e-30).mean(1)
        columns = beta2 * columns + (1 - beta2) * (gradient**2 + 1e-30).mean(0)
        update = gradient / (torch.outer(rows, columns) / rows.mean()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        moment = beta1 * moment + (1 - beta1) * update
        apart = (update - moment) ** 2 + 1e-16
        far_rows = beta3 * far_rows + (1 - beta3) * apart.mean(1)
        far_columns = beta3 * far_columns + (1 - beta3) * apart.mean(0)
        weight = (
            weight * (1 - rate * one.weight_decay)
            - rate * moment / (torch.outer(far_rows, far_columns) / far_rows.mean()).sqrt()
        )
    return weight


@pytest.mark.parametrize("reference", [lion, schedulefree, prodigy, came])
def test_optimizer_steps_match_its_papers_algorithm(reference: Callable[[Optimizer], Tensor]) -> None:
    name: Any = reference.__name__
    section = Optimizer(name=name, lr=1.0 if name == "prodigy" else 1e-2, weight_decay=0.1, warmup_steps=2)
    start, found = gradients()
    weight = nn.Parameter(start)
    optimizer = make_optimizer(section, [weight], torch.device("cpu"))
    for step, gradient in enumerate(found):
        weight.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = learning_rate(section, step, STEPS)
        optimizer.step()
    trained = weight.detach().clone()
    with schedule_free(optimizer):
        moved = (weight.detach() - gradients()[0]).norm()
        torch.testing.assert_close(
            weight.detach() - gradients()[0], reference(section) - gradients()[0], rtol=1e-3, atol=1e-5 * float(moved)
        )
    assert torch.equal(weight, trained)
    if name == "prodigy":
        assert 1e-6 < effective_lr(optimizer) < 1, "the reported rate must be the estimated one"


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy", "schedulefree", "lion", "came"])
def test_optimizer_state_has_the_planned_size(name: Any, fake: bool) -> None:
    """An adapter of rank 8, with real and fake tensors; step counters and the like take a few bytes."""
    rank, width = 8, 512
    with contextlib.ExitStack() as stack:
        if fake:
            stack.enter_context(fake_tensors())
            recorder = stack.enter_context(Recorder())
            recorder.section("optimizer")
        parameters = [nn.Parameter(torch.ones(rank, width)), nn.Parameter(torch.ones(width, rank))]
        optimizer = make_optimizer(Optimizer(name=name), parameters, torch.device("cpu"))
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert name != "prodigy" or "d_hat" in optimizer.param_groups[0], (
            "tracing must not stop where the step checks whether all gradients are zero"
        )
        kept = sum(
            value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        )
    assert kept / (2 * rank * width) == pytest.approx(bytes_a_weight(name, 1 / rank + 1 / width), abs=0.01)


def test_optimizer_settings_that_are_probably_mistakes_are_noted(tmp_path: Path) -> None:
    def notes(*overrides: str) -> str:
        long = ("train.steps=1000", "sample.every=100")  # else the length is noted
        recipe = tiny.recipe("sd15", "lora", *long, *overrides, folder=tmp_path)
        device = machine.Machine("cpu", "a CPU", 1, 1, True, 1 << 30)
        return " ".join(planning.make_plan(recipe, scan(recipe.data), device).notes)

    assert "1 is usual" in notes("optimizer.name=prodigy")
    assert not notes("optimizer.name=prodigy", "optimizer.lr=1")
    assert "averages the weights instead" in notes("optimizer.name=schedulefree", "optimizer.schedule=cosine")
    assert not notes("optimizer.name=schedulefree")
