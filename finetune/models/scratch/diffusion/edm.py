"""EDM in pixel space (Karras et al. 2022, arXiv:2206.00364), written from the paper (the authors' code is not free)."""

from __future__ import annotations

import math
from typing import final

from finetune.config.nets.edm import Net
from finetune.models.objectives.noise_paths import EdmObjective, VarianceExploding
from finetune.models.objectives.samplers import Level
from finetune.models.scratch.base import Space, build_from_scratch
from finetune.models.scratch.diffusion.flow_likelihood import FlowLikelihood

build = build_from_scratch


@final
class Edm(FlowLikelihood):
    """EDM: a preconditioned denoiser on the variance-exploding path."""

    def __init__(self, space: Space, section: Net) -> None:
        learned = EdmObjective(section.sigma_data, section.log_sigma_mean, section.log_sigma_std)
        self._exploding = VarianceExploding(learned, section.sigma_min, section.sigma_max, section.rho)
        super().__init__(space, section, self._exploding)

    def at_angle(self, angle: float) -> Level:
        return self._exploding.level(math.tan(angle))

    def max_angle(self) -> float:
        return math.atan(self._exploding.initial_std)


def create(space: Space, section: Net) -> Edm:
    return Edm(space, section)
