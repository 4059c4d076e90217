"""Glow (Kingma & Dhariwal 2018, arXiv:1807.03039): at each scale a squeeze, then steps of ActNorm, 1×1 convolution and coupling."""

from __future__ import annotations

from typing import final

from finetune.models.bijections import ActNorm, Bijection, Mix, Squeeze
from finetune.models.flow import FlowModel, coupling
from finetune.models.pixels import Space, started
from finetune.nets._flow import Flow
from finetune.nets.glow import Net

build = started


@final
class Glow(FlowModel):
    def steps(self, section: Flow, channels: int, number: int) -> list[Bijection]:
        found: list[Bijection] = [Squeeze()]
        for _ in range(section.steps):
            found += [ActNorm(4 * channels), Mix(4 * channels), coupling(section, 4 * channels, True)]
        return found


def create(space: Space, section: Net) -> Glow:
    return Glow(space, section)
