"""Samplers of pretrained pipelines: diffusers' schedulers on the noise levels of the base's own.

The base's scheduler says which noise levels a number of steps visits; the sampler is only the solver between them.
diffusers' pipelines of flow models hand their schedulers `sigmas` and `mu`, which not every scheduler takes: the
classes here do, and compute the levels as the base's own scheduler does.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from finetune.config.samplers import SAMPLERS
from finetune.errors import UserError
from finetune.models.spec import FamilySpec

NEARLY_ONE = 1 - 1e-6  # multistep solvers take the logarithm of 1 − σ


@contextlib.contextmanager
def sampling_with(pipeline: Any, spec: FamilySpec, sampler: str | None) -> Iterator[None]:
    """Within, the pipeline samples with `sampler`; None leaves its own scheduler.

    Raises:
        UserError: the sampler cannot follow the noise schedule that the model was trained with.
    """
    if sampler is None:
        yield
        return
    own = pipeline.scheduler
    pipeline.scheduler = _flow(own, sampler) if spec.objective == "flow" else _noise(own, sampler)
    try:
        yield
    finally:
        pipeline.scheduler = own


def _noise(own: Any, sampler: str) -> Any:
    cls: Any = getattr(diffusers, SAMPLERS[sampler].noise)
    if own.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in inspect.signature(cls).parameters:
        problem = f"the sampler {sampler} does not support zero terminal SNR, which this model was trained with"
        raise UserError(problem, where="sample.sampler", remedy="choose ddim, euler or dpm++")
    return cls.from_config(own.config)


def _flow(own: Any, sampler: str) -> Any:
    if SAMPLERS[sampler].flow == type(own).__name__:
        return own
    return _on_levels_of(SAMPLERS[sampler].flow)(own)


def flow_levels(own: Any, steps: int | None, sigmas: Any, mu: float | None) -> Tensor:
    """Noise levels that the base's scheduler would visit, [steps] float32, falling from 1, without the final 0."""
    if isinstance(own, FlowMatchEulerDiscreteScheduler):
        euler = FlowMatchEulerDiscreteScheduler.from_config(own.config)
    else:  # Sana's, a multistep solver with a static shift
        euler = FlowMatchEulerDiscreteScheduler(shift=own.config.get("flow_shift") or 1.0)
    dynamic = {"mu": mu} if euler.config.use_dynamic_shifting else {}
    if sigmas is not None:
        euler.set_timesteps(sigmas=sigmas, **dynamic)
    else:
        euler.set_timesteps(steps, **dynamic)
    found: Tensor = euler.sigmas[:-1]
    return found


@functools.cache
def _on_levels_of(class_name: str) -> Any:
    """A scheduler class of diffusers whose noise levels are those of another scheduler, which its constructor takes."""
    base: Any = getattr(diffusers, class_name)
    multistep = "use_flow_sigmas" in inspect.signature(base).parameters

    class OnLevels(base):  # type: ignore[misc]
        def __init__(self, own: Any) -> None:
            super().__init__(**({"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if multistep else {}))
            self.own = own
            # Pipelines read the shift's settings here.
            self.register_to_config(**{key: value for key, value in own.config.items() if key not in self.config})

        def set_timesteps(
            self,
            num_inference_steps: int | None = None,
            device: Any = None,
            sigmas: Any = None,
            mu: float | None = None,
            timesteps: Any = None,
        ) -> None:
            levels = flow_levels(self.own, num_inference_steps, sigmas, mu)
            if base is FlowMatchEulerDiscreteScheduler:
                super().set_timesteps(sigmas=levels.tolist(), device=device)
                return
            super().set_timesteps(len(levels), device)
            if multistep:
                times = levels.clamp(max=NEARLY_ONE)
                self.sigmas = torch.cat([times, torch.zeros(1)])  # on the CPU, where these schedulers keep them
            else:  # Heun's: all levels but the first stand twice, for the two calls of a step
                times = torch.cat([levels[:1], levels[1:].repeat_interleave(2)])
                self.sigmas = torch.cat([times, torch.zeros(1)]).to(device)
            self.timesteps = (times * 1000).to(device)

    return OnLevels
