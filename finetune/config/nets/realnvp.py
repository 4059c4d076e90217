"""The `net` section of RealNVP."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets.flow import Flow
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="realnvp",
    title="RealNVP",
    implementation="finetune.models.scratch.flows.realnvp",
    kind="flow",
    tasks=("unconditional", "class-conditional"),
    paper="1605.08803",
)


@dataclass(frozen=True)
class Net(Flow):
    """Keys of the `net` section of RealNVP."""
