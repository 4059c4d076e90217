"""Noise paths against diffusers' schedulers and the papers' tables; samplers on Gaussian data."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.models.objectives.noise_paths import (
    EdmObjective,
    LinearPath,
    VarianceExploding,
    VariancePreserving,
    alphas_cumprod,
)
from finetune.models.objectives.noise_paths import Path as NoisePath
from finetune.models.objectives.samplers import SAMPLERS, Level, Options, posterior
from finetune.rng import Draw
from tests.helpers.gaussian import DEVIATION, MEAN, angle, flow_solution, oracle

EDM = EdmObjective(0.5, -1.2, 1.2)
PREDICTIONS: tuple[Any, ...] = ("epsilon", "sample", "v_prediction")


def no_noise(number: int) -> Tensor:
    raise AssertionError("a deterministic sampler must not add noise")


@functools.cache
def scheduler(prediction: str = "epsilon", **keys: Any) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(prediction_type=prediction, clip_sample=False, timestep_spacing="trailing", **keys)


def test_noise_added_step_by_step_equals_the_closed_form() -> None:
    """x_t = √(1 − β) x + √β ε, T times; the schedules match diffusers, and fewer steps end in noise too."""
    for schedule, name in (("linear", "linear"), ("cosine", "squaredcos_cap_v2")):
        bars = torch.tensor(alphas_cumprod(1000, schedule), dtype=torch.float64)  # type: ignore[arg-type]
        torch.testing.assert_close(bars.float(), scheduler(beta_schedule=name).alphas_cumprod, rtol=2e-4, atol=1e-9)
        signal, variance = 1.0, 0.0
        for before, after in itertools.pairwise([1.0, *bars.tolist()]):
            beta = 1 - after / before
            signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
            assert (signal**2, variance) == pytest.approx((after, 1 - after), abs=1e-12)
    assert alphas_cumprod(1000, "linear")[-1] == pytest.approx(4.036e-5, rel=1e-3)
    assert [alphas_cumprod(steps, "linear")[-1] < 5e-5 for steps in (30, 100, 4000)] == [True] * 3


@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_step_matches_diffusers(prediction: Any, variance: Any) -> None:
    """Mean and noise of `DDPMScheduler.step`, for neighboring timesteps and for timesteps 20 apart.

    Its last step of 50 adds the large variance's noise to the final image; Ho et al.'s algorithm 2 does not, nor do we.
    """
    path, theirs = (
        VariancePreserving(1000, "linear", prediction),
        scheduler(prediction, variance_type=f"fixed_{variance}"),
    )
    noisy, said = torch.randn(2, 1, 3, 5, 5, generator=torch.Generator().manual_seed(0))

    def denoise(noisy: Tensor, level: Level) -> Tensor:
        return path.clean(said, noisy, level)

    def step_noise(seed: int, number: int) -> Tensor:
        return torch.randn(noisy.shape, generator=torch.Generator().manual_seed(seed))

    for steps, every in ((1000, 83), (50, 7)):
        theirs.set_timesteps(steps)
        levels = path.levels(steps)
        assert [level.timestep for level in levels[:-1]] == theirs.timesteps.tolist()
        for place in [*range(0, steps - 1, every), *([steps - 1] if steps == 1000 or variance == "small" else [])]:
            now, then = levels[place : place + 2]
            expected = theirs.step(
                said, int(now.timestep), noisy, generator=torch.Generator().manual_seed(place)
            ).prev_sample
            ours = SAMPLERS["ddpm"](
                denoise, noisy, [now, then], functools.partial(step_noise, place), Options(variance=variance)
            )
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "path",
    [
        *(VariancePreserving(1000, "cosine", one) for one in PREDICTIONS),
        LinearPath(3.0),
        VarianceExploding(EDM, 0.002, 80, 7),
    ],
)
def test_noise_path_with_the_target_as_prediction_recovers_the_image(path: NoisePath) -> None:
    """The loss target, interpreted as a prediction, gives x_0.

    The scaled input matches what sampling passes the network.
    """
    clean, draw = torch.randn(6, 2, 3, 3), Draw(1, 2, range(6))
    noised, noise = path.objective.noise(clean, draw), draw.normal("noise", (2, 3, 3))
    for number in range(6):
        told = float(noised.timestep[number])
        if isinstance(path, VariancePreserving):
            level = path.level(int(told))
        else:
            level = path.level(math.exp(4 * told) if isinstance(path, VarianceExploding) else told / 1000)  # type: ignore[attr-defined]
        assert level.timestep == pytest.approx(told, rel=1e-4, abs=1e-6)
        noisy = level.alpha * clean[number] + level.sigma * noise[number]
        torch.testing.assert_close(path.scale_input(noisy, level), noised.sample[number], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(path.clean(noised.target[number], noisy, level), clean[number], rtol=1e-3, atol=2e-3)
    assert torch.equal(noised.weight, torch.ones(6))


def test_edm_preconditioning_matches_the_papers_table() -> None:
    """c_skip, c_out, c_in, c_noise and λ at σ = 0.7; input and target have variance 1 at each level.

    The loss is λ |D − x_0|².
    """
    skip, out, in_, told = EDM.scales(torch.tensor([0.7], dtype=torch.float64))
    assert [float(one) for one in (skip, out, in_, told)] == pytest.approx(
        [0.25 / 0.74, 0.35 / math.sqrt(0.74), 1 / math.sqrt(0.74), math.log(0.7) / 4]
    )
    assert 0.74 / 0.35**2 * float(out) ** 2 == pytest.approx(1), "λ c_out² = 1"
    noised = EDM.noise(0.5 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)), Draw(0, 0, range(4000)))
    assert (float(noised.sample.std()), float(noised.target.std())) == pytest.approx((1, 1), abs=0.02)
    sigma = (4 * noised.timestep).exp()
    assert (float(sigma.log().mean()), float(sigma.log().std())) == pytest.approx((-1.2, 1.2), abs=0.05)
    levels = VarianceExploding(EDM, 0.002, 80, 7).levels(18)
    assert [levels[0].sigma, levels[17].sigma, levels[18].sigma] == pytest.approx([80, 0.002, 0])
    assert levels[5].sigma == pytest.approx((80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)


# Continuous times, from much noise to little.
GRIDS: dict[str, tuple[Callable[[float], Level], float, float]] = {
    "preserving": (angle, 1.5, 0.1),
    "straight": (LinearPath().level, 0.97, 0.05),
    "exploding": (VarianceExploding(EDM, 0.002, 80, 7).level, 3.0, 0.05),
}


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpm++", 2)])
@pytest.mark.parametrize("grid", GRIDS)
def test_sampler_converges_at_its_order(grid: str, sampler: str, order: int) -> None:
    at, first, last = GRIDS[grid]
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def error(steps: int) -> float:
        ratio = (last / first) ** (1 / steps)
        levels = [at(first * ratio**number) for number in range(steps + 1)]
        return float(
            (
                SAMPLERS[sampler](oracle, start, levels, no_noise, Options())
                - flow_solution(start, levels[0], levels[-1])
            )
            .abs()
            .max()
        )

    errors = [error(steps) for steps in (80, 160, 320)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize(
    "path", [VariancePreserving(1000, "linear", "epsilon"), LinearPath(), VarianceExploding(EDM, 0.002, 80, 7)]
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_distributed_as_the_data(path: NoisePath, sampler: str) -> None:
    """4000 independent samples from the path's initial noise to σ = 0.

    The same with the integer steps of a discrete path.
    """
    start = path.initial_std * torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def step_noise(number: int) -> Tensor:
        return torch.randn(4000, generator=torch.Generator().manual_seed(number + 1), dtype=torch.float64)

    drawn = SAMPLERS[sampler](oracle, start, path.levels(200), step_noise, Options())
    assert (float(drawn.mean()), float(drawn.std())) == pytest.approx((MEAN, DEVIATION), abs=0.02)


def test_ddim_eta_interpolates_between_deterministic_and_ddpm() -> None:
    """At 0 no noise is added; at 1 the steps are DDPM's with the posterior's variance, on every path."""
    paths: Sequence[NoisePath] = (
        VariancePreserving(1000, "linear", "epsilon"),
        LinearPath(),
        VarianceExploding(EDM, 0.002, 80, 7),
    )
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def step_noise(number: int) -> Tensor:
        return torch.randn(9, generator=torch.Generator().manual_seed(number), dtype=torch.float64)

    for path in paths:
        levels = path.levels(20)
        SAMPLERS["ddim"](oracle, start, levels, no_noise, Options(eta=0))
        one, ancestral = (
            SAMPLERS[name](oracle, start, levels, step_noise, Options(eta=1)) for name in ("ddim", "ddpm")
        )
        torch.testing.assert_close(one, ancestral)
        half = SAMPLERS["ddim"](oracle, start, levels, step_noise, Options(eta=0.5))
        assert not torch.allclose(half, one)
    now, then = paths[0].levels(1000)[400:402]
    beta, bar, before = 1 - now.alpha**2 / then.alpha**2, now.alpha**2, then.alpha**2
    assert posterior(now, then).small == pytest.approx((1 - before) / (1 - bar) * beta)
    assert posterior(now, then).large == pytest.approx(beta)
