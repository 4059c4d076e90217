"""RealNVP (Dinh et al. 2017, arXiv:1605.08803): checkerboard couplings, a squeeze, channel couplings.

ActNorm (Kingma & Dhariwal 2018) replaces batch normalization, so that the likelihood of an image does not depend on
others.
"""

from __future__ import annotations

from typing import final

from finetune.config.nets.flow import Flow
from finetune.config.nets.realnvp import Net
from finetune.models.scratch.base import Space, build_from_scratch
from finetune.models.scratch.flows.base import FlowModel, coupling
from finetune.models.scratch.flows.bijections import ActNorm, Bijection, Checkerboard, Coupling, Squeeze

build = build_from_scratch


@final
class RealNvp(FlowModel):
    """RealNVP."""

    def steps(self, section: Flow, channels: int, number: int) -> list[Bijection]:
        """Half of the couplings (rounded up) on the checkerboard, the others on the squeezed channels."""

        def alternating(channels: int, count: int) -> list[Bijection]:
            pairs: list[tuple[ActNorm, Coupling]] = [
                (ActNorm(channels), coupling(section, channels, bool(n % 2))) for n in range(count)
            ]
            return [part for pair in pairs for part in pair]

        first = alternating(2 * channels, section.steps - section.steps // 2)
        return [
            Checkerboard(),
            *first,
            Checkerboard(inverted=True),
            Squeeze(),
            *alternating(4 * channels, section.steps // 2),
        ]


def create(space: Space, section: Net) -> RealNvp:
    return RealNvp(space, section)
