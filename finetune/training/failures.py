"""Errors that stop training, with what to do about them."""

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
from finetune.terminal import plural
from finetune.training import checkpoint

TIGHTER = 0.9  # an edited run should fit into this share of the memory that was not enough
HOST_IS_FULL = "DefaultCPUAllocator: can't allocate memory"  # of the RuntimeError that PyTorch raises on a CPU


def not_finite(
    step: int, train_step: str, loss: float, norm: float, images: Sequence[str], folder: Path, applied: bool = False
) -> UserError:
    """The loss or the gradient of `step` (counted from 0) is NaN or infinite.

    Args:
        folder: of the run.
        applied: whether the weights have been updated already.
    """
    before = checkpoint.checkpoints(folder / "checkpoints")
    return UserError(
        f"step {step + 1}: the {train_step} loss is {loss:g} and its gradient norm {norm:g}; stopped "
        + ("after the weights were updated (train.fused_backward)" if applied else "before the weights were updated"),
        where="; ".join(images),
        remedy=f"the last good checkpoint is {before[-1] if before else 'none yet'};"
        " try a lower optimizer.lr or train.precision: float32",
    )


def too_far(done: int, steps: int, folder: Path) -> UserError:
    """The run in `folder` has taken more steps than the recipe asks for."""
    return UserError(
        f"the run has taken {plural(done, 'step')}, and the recipe asks for {steps:,}",
        where=str(folder),
        remedy=f"set train.steps: {done} or more",
    )


def all_damaged(notes: Sequence[str], folder: Path) -> UserError:
    """No checkpoint in `folder` is intact; `notes` say what is wrong with each."""
    return UserError(
        "this run cannot be resumed: all its checkpoints are damaged",
        where=f"{folder}: {'; '.join(note.removesuffix(' and is skipped') for note in notes)}",
        remedy="restore one of them from a backup, or start again from step 0: --resume --force",
    )


@contextlib.contextmanager
def memory_explained(recipe: Recipe, expected: Expected, live: Callable[[], dict[str, int]]) -> Iterator[None]:
    """Within, running out of memory raises a `UserError` with the estimate, what was live, and the edits that fit.

    Args:
        live: returns bytes on the device by part; called while the failed step still holds its tensors.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or HOST_IS_FULL in str(error)):
            raise
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        ways = "".join(f"\n         {saved}  {text}" for saved, text in edits(recipe, expected))
        raise UserError(
            f"out of memory{f': {wanted[1]} more could not be allocated' if wanted else ''}",
            where=f"{expected.line}; live: {_listed(live()) or 'unknown'}",
            remedy=f"use less memory (checkpoints are untouched; --resume continues if the edit allows it):{ways}",
        ) from error


def edits(recipe: Recipe, expected: Expected) -> list[tuple[str, str]]:
    """As `advice`: edits that fit into less memory than was not enough, whatever the estimate said."""
    one = expected.forecast
    if one is None:
        return [(assignment(option), option.cost) for option in memory_options(recipe)[:MOST_WAYS]] or [
            ("none", "a larger GPU, or a smaller model")
        ]
    tight = dataclasses.replace(one.gpu, visible_gib=TIGHTER * min(one.limit, one.memory.peak) / GIB)
    return advice(forecast(one.recipe, one.name, tight, one.images, group=one.group))


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts.items() if size)
