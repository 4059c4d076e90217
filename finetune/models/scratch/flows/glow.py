"""Glow (Kingma & Dhariwal 2018, arXiv:1807.03039): scales of a squeeze and ActNorm, 1×1 convolution, coupling."""

from __future__ import annotations

from typing import final

from finetune.config.nets.flow import Flow
from finetune.config.nets.glow import Net
from finetune.models.scratch.base import Space, build_from_scratch
from finetune.models.scratch.flows.base import FlowModel, coupling
from finetune.models.scratch.flows.bijections import ActNorm, Bijection, InvertibleConv, Squeeze

build = build_from_scratch


@final
class Glow(FlowModel):
    """Glow."""

    def steps(self, section: Flow, channels: int, number: int) -> list[Bijection]:
        result: list[Bijection] = [Squeeze()]
        for _ in range(section.steps):
            result += [ActNorm(4 * channels), InvertibleConv(4 * channels), coupling(section, 4 * channels, True)]
        return result


def create(space: Space, section: Net) -> Glow:
    return Glow(space, section)
