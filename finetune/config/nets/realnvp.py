"""The `net` section of RealNVP."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets.flow import Flow


@dataclass(frozen=True)
class Net(Flow):
    """As any flow's."""

    kind = "flow"
