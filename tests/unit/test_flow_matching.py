"""The flow-matching objective against diffusers' schedulers and the paper's formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from finetune.config.schema import Flow
from finetune.models.objectives.flow_matching import FlowMatching, shift
from finetune.rng import Draw

CLEAN = torch.randn(8, 4, 6, 10, generator=torch.Generator().manual_seed(3))
DRAW = Draw(1, 2, range(8))
TOKENS = 15  # in patches of 2×2


def objective(scheduler: Any, sampling: Any = "logit_normal", **loss: Any) -> FlowMatching:
    return FlowMatching(scheduler.config, Flow(**loss), sampling, patch=2)


@pytest.mark.parametrize("shifted", [1.0, 3.0])
def test_flow_noise_matches_the_schedulers_scale_noise(shifted: float) -> None:
    """`scale_noise` at the sampled noise levels, given to the scheduler as its list."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shifted)
    noised = objective(scheduler).noise(CLEAN, DRAW)
    noise = DRAW.normal("noise", CLEAN.shape[1:])
    unshifted = 1 / (1 + shifted * (1000 / noised.timestep - 1))  # the scheduler shifts them to these timesteps
    scheduler.set_timesteps(sigmas=unshifted.tolist())
    torch.testing.assert_close(scheduler.timesteps, noised.timestep, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        scheduler.scale_noise(CLEAN, scheduler.timesteps, noise), noised.sample, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(noised.target, noise - CLEAN)


def test_flow_target_velocity_leads_the_sampler_to_the_clean_latents() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    noise = DRAW.normal("noise", CLEAN.shape[1:])
    target = objective(scheduler).noise(CLEAN, DRAW).target
    sample = noise
    for timestep in scheduler.timesteps:
        sample = scheduler.step(target, timestep, sample).prev_sample
    torch.testing.assert_close(sample, CLEAN, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_matches_the_scheduler(kind: Any) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, time_shift_type=kind
    )
    for tokens in (256, 1024, 4096):
        mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
        scheduler.set_timesteps(sigmas=[0.25, 0.5], mu=mu)
        factor = shift(scheduler.config, tokens)
        expected = [factor * level / (1 + (factor - 1) * level) for level in (0.25, 0.5)]
        numpy.testing.assert_allclose(scheduler.sigmas[:2].numpy(), expected, rtol=1e-6)


def test_shift_of_a_flow_under_dpm_solver_is_read_from_its_config() -> None:
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    assert shift(scheduler.config, 1024) == 3.0


def test_noise_levels_follow_the_papers_distributions() -> None:
    """Logit-normal by its CDF, mode sampling (eq. 20) by its quantiles; a recipe's shift replaces the scheduler's."""
    scheduler, many = FlowMatchEulerDiscreteScheduler(shift=3.0), Draw(0, 0, range(4000))
    clean = torch.zeros(4000, 1, 2, 2)

    def levels(**loss: Any) -> numpy.ndarray:
        found: numpy.ndarray = (objective(scheduler, **loss).noise(clean, many).timestep / 1000).numpy()
        return found

    normal = torch.distributions.Normal(0.5, 0.8)
    at = numpy.array([0.3, 0.5, 0.7])
    expected = normal.cdf(torch.logit(torch.tensor(at))).numpy()
    below = [(levels(mean=0.5, std=0.8, shift=1.0) < level).mean() for level in at]
    numpy.testing.assert_allclose(below, expected, atol=0.025)
    uniform = numpy.array([0.2, 0.5, 0.8])
    # f(u) = 1 − u − s (cos²(πu/2) − 1 + u) decreases in u: a share u of the levels lies above f(u).
    quantiles = 1 - uniform - 1.29 * (numpy.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)
    numpy.testing.assert_allclose(
        [(levels(sampling="mode", shift=1.0) > level).mean() for level in quantiles], uniform, atol=0.025
    )
    even = levels(sampling="uniform")
    numpy.testing.assert_allclose([(even < 3 * u / (1 + 2 * u)).mean() for u in uniform], uniform, atol=0.025)


@pytest.mark.parametrize("weighting", ["none", "cosmap", "sigma_sqrt"])
def test_flow_loss_weights_match_diffusers(weighting: Any) -> None:
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    noised = objective(FlowMatchEulerDiscreteScheduler(), weighting=weighting).noise(CLEAN, DRAW)
    torch.testing.assert_close(noised.weight, compute_loss_weighting_for_sd3(weighting, noised.timestep / 1000))


def test_network_trained_by_flow_matching_samples_its_example() -> None:
    """A small network is trained on one latent.

    The scheduler's steps along its velocities lead from noise to that latent.
    """
    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    learned, clean = objective(scheduler), torch.tensor([1.5, -0.5, 0.3, -1.2]).view(1, 1, 2, 2)
    net = torch.nn.Sequential(
        torch.nn.Linear(5, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 4)
    )

    def velocity(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = net(torch.cat([sample.flatten(1), timestep.view(-1, 1) / 1000], dim=1)).view(sample.shape)
        return found

    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(400):
        noised = learned.noise(clean.expand(64, -1, -1, -1), Draw(0, step, range(64)))
        loss = learned.error(velocity(noised.sample, noised.timestep), noised).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.set_timesteps(20)
    sample = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    start = (sample - clean).abs().mean()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            sample = scheduler.step(velocity(sample, timestep.expand(8)), timestep, sample).prev_sample
    assert (sample - clean).abs().mean() < 0.15 * start  # a wrong sign or noise level would increase it
