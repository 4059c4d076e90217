"""Denoising diffusion in pixel space (Ho et al. 2020, arXiv:2006.11239)."""

from __future__ import annotations

from typing import final

from finetune.data.scan import Audit
from finetune.errors import UserError
from finetune.models.diffusion import DiffusionModel
from finetune.models.paths import Preserving
from finetune.models.pixels import Space, begin, space_of
from finetune.models.samplers import Options
from finetune.models.turn import Model
from finetune.nets.ddpm import Net
from finetune.planning import Plan
from finetune.recipe import Diffusion


@final
class Ddpm(DiffusionModel):
    objective = "noise"

    def __init__(self, space: Space, section: Net, loss: Diffusion | None = None) -> None:
        path = Preserving(section.timesteps, section.schedule, section.prediction, loss)
        super().__init__(space, section, path, Options(variance=section.variance))


def build(plan: Plan, audit: Audit) -> Model:
    loss = plan.recipe.diffusion
    if loss is not None and loss.zero_terminal_snr:
        raise UserError("the schedules of pixel space end in noise: α is below 0.007 there", where="diffusion.zero_terminal_snr", remedy="remove it")
    space = space_of(plan, audit)
    return begin(plan, audit, lambda: Ddpm(space, plan.recipe.net, loss))


def create(space: Space, section: Net) -> Ddpm:
    return Ddpm(space, section)
