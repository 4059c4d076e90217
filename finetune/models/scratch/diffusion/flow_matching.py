"""Flow matching in pixel space on straight paths.

Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003.
"""

from __future__ import annotations

import math
from typing import final

from finetune.config.nets.flow_matching import Net
from finetune.config.schema import Flow
from finetune.data.audit.audit import Audit
from finetune.models.base import Model
from finetune.models.objectives.noise_paths import LinearPath
from finetune.models.objectives.samplers import Level
from finetune.models.scratch.base import Space, initialize, space_of
from finetune.models.scratch.diffusion.flow_likelihood import FlowLikelihood
from finetune.planning import Plan


@final
class RectifiedFlow(FlowLikelihood):
    """Velocity prediction on the straight path."""

    def __init__(self, space: Space, section: Net, loss: Flow | None = None) -> None:
        self._straight = LinearPath(section.shift, loss)
        super().__init__(space, section, self._straight)

    def at_angle(self, angle: float) -> Level:
        return self._straight.level(math.sin(angle) / (math.sin(angle) + math.cos(angle)))

    def max_angle(self) -> float:
        return math.pi / 2


def build(plan: Plan, audit: Audit) -> Model:
    """Build the model with random weights, and the recipe's `flow` section as its loss."""
    loss = plan.recipe.flow
    space = space_of(plan, audit)
    return initialize(plan, audit, lambda: RectifiedFlow(space, plan.recipe.net, loss))


def create(space: Space, section: Net) -> RectifiedFlow:
    return RectifiedFlow(space, section)
