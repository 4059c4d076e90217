"""Samplers of pretrained pipelines: each runs, solvers of the same flow agree, and no choice changes nothing."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.config.samplers import SAMPLERS, valid_for
from finetune.errors import UserError
from finetune.models.base import SampleRequest
from finetune.models.objectives import samplers as scratch
from finetune.models.pretrained import loading
from finetune.models.pretrained.family import Family, family_of
from finetune.models.pretrained.model import generate_from_prompt
from finetune.models.pretrained.schedulers import flow_levels, sampling_with
from finetune.models.registry import specs
from tests.helpers import tiny

REQUEST = SampleRequest(("a red circle",), (3,), steps=4, guidance=3.0, size=(32, 32))
PIPELINES = ("sd15", "sd21", "sdxl", *tiny.FLOWS)


@functools.cache
def opened(name: str) -> tuple[Family, Any]:
    family = family_of(tiny.family(name))
    section = tiny.recipe(name, "full", folder=tiny.root() / "unused").model
    pipeline: Any = loading.open_pipeline(section, family.spec.pipeline, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return family, pipeline


@torch.no_grad()
def image(name: str, sampler: str | None, steps: int = 4, guidance: float = 3.0) -> Tensor:
    family, pipeline = opened(name)
    request = replace(REQUEST, sampler=sampler, steps=steps, guidance=guidance)
    drawn = generate_from_prompt(family, pipeline, request, REQUEST.prompts[0], 3)
    return torch.frombuffer(bytearray(drawn.thumbnail().tobytes()), dtype=torch.uint8).float()


@pytest.mark.parametrize(
    ("name", "sampler"), [(name, one) for name in PIPELINES for one in valid_for(tiny.family(name))]
)
def test_sampler_valid_for_the_family_runs(name: str, sampler: str) -> None:
    own = opened(name)[1].scheduler
    found = image(name, sampler)
    assert found.std() > 1
    assert opened(name)[1].scheduler is own


@pytest.mark.parametrize("name", PIPELINES)
def test_sampler_none_uses_the_pipelines_scheduler(name: str) -> None:
    family, pipeline = opened(name)
    with sampling_with(pipeline, family.spec, None):
        assert type(pipeline.scheduler).__name__ == type(opened(name)[1].scheduler).__name__
    own = [one for one in valid_for(family.spec.slug) if type(pipeline.scheduler).__name__ in _classes(family, one)]
    plain = image(name, None)
    assert torch.equal(plain, image(name, None))
    for sampler in own:
        assert torch.equal(image(name, sampler), plain)


def _classes(family: Family, sampler: str) -> str:
    return SAMPLERS[sampler].flow if family.spec.objective == "flow" else SAMPLERS[sampler].noise


@pytest.mark.parametrize("name", ["sd3", "flux1", "sana"])
def test_flow_solvers_with_small_steps_agree(name: str) -> None:
    """With small steps, every solver follows the same flow."""
    reference = image(name, "heun", steps=60, guidance=1.0)
    for sampler in ("euler", "dpm++", "unipc"):
        assert (image(name, sampler, steps=60, guidance=1.0) - reference).abs().mean() < 2.0


@pytest.mark.parametrize("name", ["flux1", "qwen-image", "sd3"])
def test_flow_levels_match_the_pipelines_scheduler(name: str) -> None:
    own = opened(name)[1].scheduler
    sigmas, mu = [1.0, 0.75, 0.5, 0.25], 0.6 if own.config.use_dynamic_shifting else None
    levels = flow_levels(own, None, sigmas, mu)
    own.set_timesteps(sigmas=sigmas, **({"mu": mu} if mu else {}))
    torch.testing.assert_close(levels, own.sigmas[:-1])


def test_sampler_of_another_objective_is_refused(tmp_path: Any) -> None:
    with pytest.raises(
        UserError, match=r"the sampler ddim is not valid for family flux1[\s\S]*dpm\+\+, heun, euler, unipc"
    ):
        tiny.recipe("flux1", "lora", "sample.sampler=ddim", folder=tmp_path)
    with pytest.raises(UserError, match=r'no sampler is called "eulr"'):
        tiny.recipe("sdxl", "lora", "sample.sampler=eulr", folder=tmp_path)
    with pytest.raises(UserError, match=r"eta is DDIM's"):
        tiny.recipe("sdxl", "lora", "sample.sampler=euler", "sample.eta=0.5", folder=tmp_path)


def test_sampler_that_ignores_zero_terminal_snr_is_refused() -> None:
    with pytest.raises(UserError, match=r"heun does not support zero terminal SNR"):
        image("emoji", "heun")


def test_ddim_eta_adds_noise() -> None:
    family, pipeline = opened("sd15")
    plain, noisy = (
        generate_from_prompt(family, pipeline, replace(REQUEST, sampler="ddim", eta=eta), REQUEST.prompts[0], 3)
        .thumbnail()
        .tobytes()
        for eta in (0.0, 1.0)
    )
    assert plain != noisy


def test_sampler_table_lists_the_implemented_samplers() -> None:
    assert {name for name, sampler in SAMPLERS.items() if sampler.scratch} == scratch.SAMPLERS.keys()
    assert all(valid_for(slug) for slug, spec in specs().items() if spec.pretrained)
