"""What training cannot go on with, said so that a person knows what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.engine import checkpoint
from finetune.errors import UserError


def not_finite(step: int, turn: str, loss: float, norm: float, pictures: Sequence[str], folder: Path) -> UserError:
    """The loss or the gradient of `step` (counted from 0) of the run in `folder` is NaN or infinite."""
    before = checkpoint.checkpoints(folder / "checkpoints")
    return UserError(
        f"step {step + 1}: the {turn} loss is {loss:g} and its gradient's norm {norm:g}; stopped before the weights took it",
        where="; ".join(pictures),
        remedy=f"the last good checkpoint is {before[-1] if before else 'none yet'}; try a lower optimizer.lr or train.precision: float32",
    )
