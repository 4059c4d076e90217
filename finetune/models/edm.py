"""EDM in pixel space (Karras et al. 2022, arXiv:2206.00364), written from the paper: its authors' code may not be used freely."""

from __future__ import annotations

from typing import final

from finetune.errors import UserError
from finetune.models.diffusion import DiffusionModel
from finetune.models.paths import Exploding, Preconditioned
from finetune.models.pixels import Space, started
from finetune.nets.edm import Net

build = started


@final
class Edm(DiffusionModel):
    def __init__(self, space: Space, section: Net) -> None:
        if section.least >= section.most:
            raise UserError("drawing goes from much noise to little", where="net.least, net.most", remedy="set net.least below net.most")
        learned = Preconditioned(section.spread, section.mean, section.deviation)
        super().__init__(space, section, Exploding(learned, section.least, section.most, section.rho))


def create(space: Space, section: Net) -> Edm:
    return Edm(space, section)
