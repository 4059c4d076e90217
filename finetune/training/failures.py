"""What training cannot go on with, said so that a person knows what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from finetune.config.schema import Recipe
from finetune.errors import UserError
from finetune.estimate.advice import MOST_WAYS, advice, assignment
from finetune.estimate.constants import GIB
from finetune.estimate.forecast import forecast, memory_options
from finetune.estimate.monitor import Expected
from finetune.training import checkpoint

TIGHTER = 0.9  # the share of what did not suffice in which an edited run is to fit


def not_finite(
    step: int, turn: str, loss: float, norm: float, images: Sequence[str], folder: Path, taken: bool = False
) -> UserError:
    """The loss or the gradient of `step` (counted from 0) of the run in `folder` is NaN or infinite; `taken`: weights have it already."""
    before = checkpoint.checkpoints(folder / "checkpoints")
    return UserError(
        f"step {step + 1}: the {turn} loss is {loss:g} and its gradient's norm {norm:g}; stopped "
        + ("when the weights had taken it (train.fused_backward)" if taken else "before the weights took it"),
        where="; ".join(images),
        remedy=f"the last good checkpoint is {before[-1] if before else 'none yet'}; try a lower optimizer.lr or train.precision: float32",
    )


def too_far(done: int, steps: int, folder: Path) -> UserError:
    """The run in `folder` has taken more steps than it is asked for."""
    return UserError(
        f"the run has taken {done} steps, and {steps} are asked for",
        where=str(folder),
        remedy=f"set train.steps: {done} or more",
    )


@contextlib.contextmanager
def memory_explained(recipe: Recipe, expected: Expected, live: Callable[[], dict[str, int]]) -> Iterator[None]:
    """Within, running out of a device's memory is a `UserError` that says what was estimated, what was live, and the edits that fit.

    Args:
        live: bytes on the device by part, asked for while the step that failed still holds its tensors.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        ways = "".join(f"\n         {saved}  {text}" for saved, text in edits(recipe, expected))
        raise UserError(
            f"the device has no memory left{f' for {wanted[1]} more' if wanted else ''}",
            where=f"{expected.line}; live: {_listed(live()) or 'nothing that this process counts'}",
            remedy=f"with an edit that needs less (checkpoints are untouched; --resume goes on where the edit allows it){ways}",
        ) from error


def edits(recipe: Recipe, expected: Expected) -> list[tuple[str, str]]:
    """As `advice`: what would fit into less than what did not suffice, however the estimate came out."""
    one = expected.forecast
    if one is None:
        return [(assignment(option), option.cost) for option in memory_options(recipe)[:MOST_WAYS]] or [
            ("none", "a larger GPU, or a smaller model")
        ]
    tight = dataclasses.replace(one.gpu, visible_gib=TIGHTER * min(one.limit, one.memory.peak) / GIB)
    return advice(forecast(one.recipe, one.name, tight, one.images, group=one.group))


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts.items() if size)
