"""The `net` section of Glow."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets.flow import Flow
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="glow",
    title="Glow, Flow++",
    implementation="finetune.models.scratch.flows.glow",
    kind="flow",
    tasks=("unconditional", "class-conditional"),
    paper="1807.03039",
)


@dataclass(frozen=True)
class Net(Flow):
    """Keys of the `net` section of Glow, Flow++."""
